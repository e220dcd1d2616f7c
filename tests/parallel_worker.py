"""What each of two processes does for `test_parallel.py`: it loads and trains packed models in every way and records what
it sees. The test does the same in one process, with the functions here.

torchrun --nproc-per-node 2 parallel_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import hf_pcdvq_kernels as ops
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import PackedModule
from hf_pcdvq.modules.divided import local_part, whole

IDS = torch.arange(3, 40)[None]
WINDOWS = torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(1))
BATCH = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(0))
TENSORS, EXPERTS, DATA = (
    {"tp_size": 2},
    {"tp_size": 2, "ep_size": 2, "enable_expert_parallel": True},
    {"fsdp_size": 2},
)
MLP = [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
WAYS = {
    ("llama", "tensors"): TENSORS,
    ("qwen3", "tensors"): TENSORS,
    ("mixtral", "tensors"): TENSORS,
    ("mixtral", "experts"): EXPERTS,
    ("deepseek", "tensors"): TENSORS,
    ("deepseek", "experts"): EXPERTS,
    ("tied", "tensors"): TENSORS,
    ("head", "tensors"): TENSORS,
    ("llama", "fsdp"): DATA,
    ("llama", "whole mlp"): {**TENSORS, "tp_plan": dict.fromkeys(MLP, "replicate")},
}
REFUSED = {"small rings": TENSORS, "small blocks": TENSORS, "three experts": EXPERTS, "not packed": TENSORS}
ADVISED = {
    "small rings": {
        **TENSORS,
        "tp_plan": dict.fromkeys([f"model.layers.*.self_attn.{x}_proj" for x in "qkvo"], "replicate"),
    },
    "smaller blocks": TENSORS,
    "three experts": TENSORS,
}


def load(folder, way=None, **options):
    distributed = None if way is None else DistributedConfig(**way)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=distributed, **options
    )


def load_cast(folder, way=None):
    """A model whose dense layers are rounded to bfloat16; packed ones are not."""
    return load(folder, way).to(torch.bfloat16).to(torch.float32)


def load_dense(folder, way=None):
    return load(folder, way, quantization_config=PcdvqConfig(dequantize=True))


def outputs(model, ids=IDS):
    """What every layer returns, and the logits."""
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    return [*found.hidden_states[1:], found.logits]


def gradient(model):
    """The gradient of the logits, weighted, with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return embedded.grad


def held(model):
    """Bytes of packed layers in this process."""
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    return sum(local_part(tensor).nbytes for layer in layers for tensor in layer.parameters(recurse=False))


def observe(model):
    """What a model computes: with exact products in PyTorch, and with the kernels, for many and for few tokens."""
    found = {"held": held(model), "kernels": outputs(model), "few": outputs(model, IDS[:, :2])}
    ops.set_backend("reference")
    found |= {"reference": outputs(model), "gradient": gradient(model)}
    found["tokens"] = model.generate(IDS, max_new_tokens=3, do_sample=False, cache_implementation="static")
    ops.set_backend("auto")
    return found


def with_adapters(folder):
    """A packed model with LoRA, the same in every process."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(load(folder), config)


def step(model, ids):
    """What is trained, before and after one step with exact products."""
    ops.set_backend("reference")
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: whole(parameter.detach()).clone() for name, parameter in trained.items()}
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    ops.set_backend("auto")
    return before, {name: whole(parameter.detach()).clone() for name, parameter in trained.items()}


def trainer_step(folder, output):
    """What is trained, before and after two steps of the Trainer on two windows each, in one or more processes."""
    ops.set_backend("reference")
    model = with_adapters(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        str(output),
        max_steps=2,
        per_device_train_batch_size=2 // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=0.1,
        optim="sgd",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    windows = [{"input_ids": window, "labels": window} for window in WINDOWS]
    Trainer(model, arguments, train_dataset=windows).train()
    ops.set_backend("auto")
    return before, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def refusal(folder, way):
    options = {"quantization_config": PcdvqConfig()} if folder.name == "not packed" else {}
    try:
        load(folder, way, **options)
    except ValueError as error:
        return str(error)
    return "was not refused"


def adapter_refusal(model):
    try:
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    except RuntimeError as error:
        return str(error)
    return "was not refused"


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {"refused": {name: refusal(folder / name, way) for name, way in REFUSED.items()}}
    for (kind, name), way in WAYS.items():
        model = load(folder / kind, way)
        model.save_pretrained(folder / f"{kind} {name}")
        found[kind, name] = observe(model)
        found[kind, name]["adapters"] = adapter_refusal(model)
    for kind, name in (("llama", "tensors"), ("mixtral", "tensors"), ("mixtral", "experts")):
        model = load_dense(folder / kind, WAYS[kind, name])
        model.save_pretrained(folder / f"{kind} {name} dense")
        found[kind, name]["dense"] = outputs(model)
    found["cast"] = outputs(load_cast(folder / "llama", TENSORS))
    for kind, way in ADVISED.items():
        found[kind, "advised"] = outputs(load(folder / kind, way))
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", sharded)):
        found[name] = step(wrap(with_adapters(folder / "llama")), BATCH[rank : rank + 1])
    found["trainer"] = trainer_step(folder / "llama", folder / f"trainer {rank}")
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
