"""Packed models divided among two processes, which talk through gloo: by Transformers' tensor and expert parallelism, by
FSDP2 and DDP. One pair of processes does everything, see `parallel_worker.py`."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import moe_models
import parallel_worker as worker
import pytest
import torch
from filelock import FileLock
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, TensorParallelLayer

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.codecs import SETTINGS
from hf_pcdvq.modules import dense_weights, packed_type, stack_packed
from hf_pcdvq.modules.tied import install
from hf_pcdvq.quantizer import PackedHfQuantizer

# Small, but each half of a weight is a ring of `stream` (256 outputs), and rotated in blocks of up to 128.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 258,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# Every layer is packed with another setting.
_ALL = PcdvqConfig(overrides={rf"layers\.{number}\.": setting for number, setting in enumerate(SETTINGS)})
_STREAM = PcdvqConfig(overrides={".": "stream-2.0"})


def llama(layers=1, **sizes):
    fields = {**_SIZES, "num_hidden_layers": layers, "attention_bias": True, "mlp_bias": True, **sizes}
    return LlamaForCausalLM(LlamaConfig(**fields))


def qwen3(layers):
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_hidden_layers=layers))


def mixtral(layers=1, experts=2):
    fields = {**_SIZES, "num_hidden_layers": layers, "num_local_experts": experts, "num_experts_per_tok": 1}
    return MixtralForCausalLM(MixtralConfig(**fields))


_MODELS = {
    "llama": lambda: (llama(len(SETTINGS)), _ALL),
    "qwen3": lambda: (qwen3(len(SETTINGS)), _ALL),
    "mixtral": lambda: (mixtral(len(SETTINGS)), _ALL),
    # Attention with low-rank projections, whole in every process; a shared expert; a layer without experts.
    "deepseek": lambda: (moe_models.model("deepseek"), PcdvqConfig(bits=2.0, hadamard_block=16)),
    "tied": lambda: (llama(tie_word_embeddings=True), PcdvqConfig(head="int8")),  # whole in every process
    "head": lambda: (llama(), PcdvqConfig(head="int8")),  # not tied, and divided like any other layer
    "small rings": lambda: (llama(num_key_value_heads=2), _STREAM),  # keys have one ring, which is not cut
    "small blocks": lambda: (llama(intermediate_size=192), PcdvqConfig()),  # half of 192 inputs is 1.5 blocks of 64
    "smaller blocks": lambda: (llama(intermediate_size=192), PcdvqConfig(hadamard_block=32)),
    "three experts": lambda: (mixtral(experts=3), PcdvqConfig()),
}


@cache
def encoded(codec, rows, columns):
    generator = torch.Generator().manual_seed(0)
    return codec.encode(0.1 * torch.randn(rows, columns, generator=generator))


def packed_like(weight, codec):
    """A packed weight or stack of that size, with the codes of any other of that size and scales of its own."""
    if weight.ndim == 3:
        return stack_packed([packed_like(part, codec) for part in weight])
    packed = {suffix: tensor.clone() for suffix, tensor in encoded(codec, *weight.shape).items()}
    return {**packed, "scale": packed["scale"] * (0.5 + torch.rand(len(weight)))}


def make(folder, kind):
    """Save a packed model with random weights. Encoding those of each layer anew would take a minute."""
    torch.manual_seed(0)
    model, config = _MODELS[kind]()
    quantizer = PackedHfQuantizer(config, pre_quantized=False)
    for name in quantizer.select(model):
        dense, codec = model.get_submodule(name), config.codec_of(name)
        packed = {key: packed_like(weight, codec) for key, weight in dense_weights(dense).items()}
        install(model, name, packed_type(dense).from_packed(dense, codec, packed))
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = True
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    quantizer.postprocess_model(model)
    model.save_pretrained(folder / kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the models, and what either process has seen of them."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent  # shared by all processes of pytest-xdist
    folder = parent / "parallel"
    with FileLock(parent / "parallel.lock"):
        if not (folder / "1.pt").exists():
            for kind in _MODELS:
                make(folder, kind)
            qwen3(1).save_pretrained(folder / "not packed")
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run([*launch, worker.__file__, folder], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@cache
def alone(folder: Path, kind: str):
    """What this process sees of the same model."""
    return worker.observe(worker.load(folder / kind))


def differences(found, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("run", worker.WAYS, ids=" ".join)
def test_every_format_computes_the_same_as_in_one_process(runs, run):
    """Sums over inputs are made of two parts, and otherwise in the same order: float32 rounds to 6e-8."""
    folder, (first, second) = runs
    expected = alone(folder, run[0])
    found = first[run]
    assert max(differences(found["reference"], expected["reference"])) < 5e-6
    assert differences([found["gradient"]], [expected["gradient"]])[0] < 2e-5
    assert torch.equal(found["tokens"], expected["tokens"])
    for kernels in ("kernels", "few"):  # those of a CPU round activations to 15 bits, of half as many inputs
        assert max(differences(found[kernels], expected[kernels])) < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(found["reference"], second[run]["reference"], strict=True))


@pytest.mark.parametrize("run", [run for run in worker.WAYS if run[0] not in ("deepseek", "tied")], ids=" ".join)
def test_a_process_holds_half_of_the_packed_layers(runs, run):
    folder, seen = runs
    share = [ranks[run]["held"] / alone(folder, run[0])["held"] for ranks in seen]
    # Scales of what is cut by inputs are held twice; three of seven equally large matrices may be whole.
    low, high = ((0.5 + 1.5 / 7) - 0.02, (0.5 + 1.5 / 7) + 0.02) if run[1] == "whole mlp" else (0.49, 0.51)
    assert all(low < part < high for part in share)


@pytest.mark.parametrize("run", worker.WAYS, ids=" ".join)
def test_a_divided_model_saves_the_files_of_the_whole(runs, run):
    folder, _ = runs
    for file in ("model.safetensors", "config.json"):
        assert (folder / " ".join(run) / file).read_bytes() == (folder / run[0] / file).read_bytes()


def test_a_cast_leaves_packed_tensors_as_they_are(runs):
    folder, (seen, _) = runs
    assert max(differences(seen["cast"], worker.outputs(worker.load_cast(folder / "llama")))) < 1e-3


@pytest.mark.parametrize("run", [("llama", "tensors"), ("mixtral", "tensors"), ("mixtral", "experts")], ids=" ".join)
def test_a_divided_model_can_be_decoded(runs, run, tmp_path):
    folder, (seen, _) = runs
    dense = worker.load_dense(folder / run[0])
    assert max(differences(seen[run]["dense"], worker.outputs(dense))) < 5e-6
    dense.save_pretrained(tmp_path)
    saved = folder / f"{' '.join(run)} dense"
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "layer", "advice"),
    [
        ("small rings", "model.layers.0.self_attn.k_proj", "256 outputs are not a multiple of 512"),
        ("small rings", "model.layers.0.self_attn.k_proj", "'model.layers.*.self_attn.k_proj': 'replicate'"),
        ("small blocks", "model.layers.0.mlp.down_proj", "hadamard_block=32"),
        ("three experts", "model.layers.0.mlp.experts.gate_up_proj", "an ep_size that divides 3"),
        ("not packed", "Qwen3ForCausalLM", "Quantize it in one process"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(runs, name, layer, advice):
    for seen in runs[1]:
        assert layer in seen["refused"][name] and advice in seen["refused"][name]


@pytest.mark.parametrize("run", [("llama", "tensors"), ("mixtral", "experts")], ids=" ".join)
def test_adapters_on_a_model_divided_by_tensors_are_refused_with_what_works(runs, run):
    """DDP and FSDP2, which it names, train adapters in `test_training_adapters_changes_them_as_one_process_does`."""
    for seen in runs[1]:
        advice = seen[run]["adapters"]
        assert "QuantLinear: weight is packed and divided among processes" in advice
        assert "without tp_size" in advice and "DDP" in advice and "FSDP2" in advice and "dequantize" not in advice


class OtherOutputs(ColwiseParallel):
    """A user's style, which inherits from one that is known but may cut otherwise."""

    def shard_param(self, module, param, mesh):
        raise AssertionError("packed tensors must not be cut like this")


class OtherSums(TensorParallelLayer):
    """A user's style that cuts nothing."""


@pytest.fixture
def users_styles(monkeypatch):
    styles = {**ALL_PARALLEL_STYLES._global_mapping, "other_outputs": OtherOutputs(), "other_sums": OtherSums()}
    monkeypatch.setattr(type(ALL_PARALLEL_STYLES), "_global_mapping", styles)


def planned(style):
    """A packed layer, and the style of a plan for its weight when a user gives `style` for it."""
    model, config = llama(), PcdvqConfig()
    name = "model.layers.0.mlp.up_proj"
    dense, codec = model.get_submodule(name), config.codec
    packed = {key: packed_like(weight, codec) for key, weight in dense_weights(dense).items()}
    model.set_submodule(name, packed_type(dense).from_packed(dense, codec, packed))
    PackedHfQuantizer(config, pre_quantized=True).update_parallel_plan(model, model.tp_plan)
    plan = model.tp_plan | {"model.layers.*.mlp.up_proj": style}
    return model.get_submodule(name), plan.get("model.layers.*.mlp.up_proj.weight")


def test_a_style_whose_cuts_are_not_known_is_refused_by_name(users_styles):
    layer, style = planned("other_outputs")
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.up_proj cannot .* style 'other_outputs' \(OtherOutputs\)"
    ):
        ALL_PARALLEL_STYLES[style].validate_param(
            layer, "weight", SimpleNamespace(size=lambda: 2), "model.layers.0.mlp.up_proj.weight"
        )


def test_a_style_that_cuts_nothing_needs_no_rule(users_styles):
    assert planned("other_sums")[1] is None


def test_a_plan_that_cannot_be_completed_is_refused_when_a_model_is_divided():
    model, quantizer = llama(), PackedHfQuantizer(PcdvqConfig(), pre_quantized=True)
    quantizer.update_parallel_plan(model, dict(model.tp_plan))  # in one process nothing is cut
    model.config.distributed_config = object()
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM keeps its parallel plan where"):
        quantizer.update_parallel_plan(model, dict(model.tp_plan))


@pytest.mark.parametrize("name", worker.ADVISED)
def test_what_the_refusal_advises_works(runs, name):
    folder, (seen, _) = runs
    assert max(differences(seen[name, "advised"], worker.outputs(worker.load(folder / name)))) < 1e-3


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "trainer"])
def test_training_adapters_changes_them_as_one_process_does(runs, way, tmp_path):
    folder, seen = runs
    if way == "trainer":
        before, after = worker.trainer_step(folder / "llama", tmp_path)
    else:
        before, after = worker.step(worker.with_adapters(folder / "llama"), worker.BATCH)
    for ranks in seen:
        start, end = ranks[way]
        assert end.keys() == after.keys() and all(torch.equal(start[name], before[name]) for name in before)
        found, expected = (torch.cat([(p[n] - before[n]).flatten() for n in before]) for p in (end, after))
        assert expected.norm() > 0.1 and differences([found], [expected])[0] < 1e-5
