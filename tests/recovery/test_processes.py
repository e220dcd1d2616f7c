"""Recovery in two processes on this machine, which talk through gloo."""

import gc
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packed_pairs import pair, tensors, windows

from hf_pcdvq import Recovery, recover

SETTINGS = Recovery(steps=4, batch=4, learning_rate=0.01, evaluations=2)


def recovered(folder, work_dir=None):
    packed, teacher = pair(folder)
    options = {"held_out": windows(2, seed=1), "settings": SETTINGS, "progress": False, "work_dir": work_dir}
    report = recover(packed, teacher, None, windows(10), **options)
    return {"model": tensors(packed), "losses": report.losses}


def run(rank, port, folder, original):
    torch.set_num_threads(1)
    # What `accelerate launch` and `torchrun` tell the processes that they start.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.save(recovered(original, folder / "state"), folder / f"{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_the_windows_and_end_with_the_model_of_one(tiny_model_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, (port, tmp_path, tiny_model_dir), nprocs=2)
    alone = recovered(tiny_model_dir)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-4, atol=1e-6)
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
        torch.testing.assert_close(tensor, alone["model"][name], rtol=1e-3, atol=1e-4)
