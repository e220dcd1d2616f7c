"""Packed modules under DistributedDataParallel: two processes on this machine, which talk through gloo."""

import gc
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.modules import QuantLinear

CODECS = {
    "pcdvq-2.0": PcdvqConfig(bits=2.0).codec,
    "pcdvq-2.25": PcdvqConfig().codec,
    "ccq-2.5": CcqConfig(layout="2.5").codec,
}


def step(rank, codec):
    """One step of training, and what the model holds after it."""
    torch.manual_seed(rank)  # the packed words of rank 0 must reach rank 1
    model = nn.Sequential(nn.Linear(64, 64), QuantLinear.from_linear(nn.Linear(64, 8), codec))
    model = DistributedDataParallel(model)
    model(torch.full((2, 64), 0.1 * (rank + 1))).sum().backward()
    return {**model.module.state_dict(), "gradient": model.module[0].weight.grad}


def train(rank, folder):
    """A step per format on each of two ranks, which start with different weights and see different inputs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=2)
    results = {name: step(rank, codec) for name, codec in CODECS.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    gc.collect()  # a model that outlives the group keeps the process from ending
    dist.barrier()
    dist.destroy_process_group()


def test_packed_layers_train_on_two_ranks(tmp_path):
    mp.spawn(train, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in CODECS:
        assert first[name]["1.weight"].dtype == torch.uint8 and first[name]["gradient"].abs().sum() > 0
        for key, tensor in first[name].items():
            assert torch.equal(tensor, second[name][key]), (name, key)
