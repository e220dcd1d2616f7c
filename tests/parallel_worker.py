"""What one of two processes does for `test_parallel.py`: loads packed models in every way, and records what it sees.

torchrun --nproc-per-node 2 parallel_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import hf_pcdvq_kernels as ops
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_pcdvq

IDS = torch.arange(3, 40)[None]


def load(folder, distributed=None, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=distributed, **options
    )


def outputs(model, backend):
    """What every layer returns, and the logits."""
    ops.set_backend(backend)
    with torch.no_grad():
        found = model(IDS, output_hidden_states=True)
    ops.set_backend("auto")
    return [*found.hidden_states[1:], found.logits]


def gradient(model):
    """The gradient of the logits, weighted, with respect to the embedded tokens."""
    ops.set_backend("reference")
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    ops.set_backend("auto")
    return embedded.grad


def tokens(model):
    ops.set_backend("reference")
    found = model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation="static")
    ops.set_backend("auto")
    return found


def held(model):
    """Bytes of the packed tensors that this process holds."""
    found = 0
    for module in model.modules():
        if isinstance(module, hf_pcdvq.modules.PackedModule):
            for tensor in module.parameters(recurse=False):
                found += (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes
    return found


def observe(model):
    return {
        "reference": outputs(model, "reference"),
        "auto": outputs(model, "auto"),
        "gradient": gradient(model),
        "tokens": tokens(model),
        "held": held(model),
    }


def refusal(folder, distributed, **options):
    try:
        load(folder, distributed, **options)
    except ValueError as error:
        return str(error)
    return "loaded"


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found = {}
    for kind in ("llama", "qwen3", "mixtral"):
        ways = {"tp": DistributedConfig(tp_size=2)}
        if kind == "mixtral":
            ways |= {"ep": DistributedConfig(tp_size=2, ep_size=2)}
        for way, distributed in ways.items():
            model = load(folder / kind, distributed)
            found[kind, way] = observe(model)
            model.save_pretrained(folder / f"{kind} saved {way}")
            print(rank, kind, way, flush=True)
            dense = load(folder / kind, distributed, quantization_config=hf_pcdvq.PcdvqConfig(dequantize=True))
            found[kind, f"{way} dequantized"] = {"reference": outputs(dense, "reference")}
            dense.save_pretrained(folder / f"{kind} dense {way}")
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
