"""Models with fused experts: packed while loading, saved, loaded, dequantized."""

import pytest
import torch
from moe_models import EXPERTS, KINDS, ernie, logits, model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.modules import QuantExperts, QuantLinear, encode_stack

EXPERT_LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module", params=KINDS)
def dense_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model(request.param).save_pretrained(folder)
    return folder


def load(folder, config=None, **options):
    options |= {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def relative(a, b):
    return (a - b).norm() / b.norm()


def test_every_expert_is_packed_and_the_router_is_not(dense_dir):
    packed = load(dense_dir, PcdvqConfig())
    layer = packed.get_submodule(EXPERT_LAYER)
    assert isinstance(layer, QuantExperts) and not layer.packed_tensors("gate_up_proj")[""].is_floating_point()
    dense = load(dense_dir).get_submodule(EXPERT_LAYER)
    for stack in ("gate_up_proj", "down_proj"):
        decoded, original = layer.decoded(stack, torch.float32), getattr(dense, stack)
        errors = (decoded - original).square().sum((1, 2)) / original.square().sum((1, 2))
        assert len(errors) == EXPERTS and errors.max() < 0.08  # 0.069 is the error of 2.25 bits on normal weights
    router = packed.get_submodule(EXPERT_LAYER.replace("experts", "gate"))
    assert torch.equal(router.weight, load(dense_dir).get_submodule(EXPERT_LAYER.replace("experts", "gate")).weight)
    assert isinstance(packed.model.layers[1].self_attn.o_proj, QuantLinear)


def test_packed_while_loading_is_what_packing_a_loaded_model_gives(dense_dir):
    """One expert at a time, as stored in the files, against the stacks of the model in memory."""
    packed = load(dense_dir, PcdvqConfig()).get_submodule(EXPERT_LAYER)
    dense = load(dense_dir).get_submodule(EXPERT_LAYER)
    for stack in ("gate_up_proj", "down_proj"):
        for expert, matrix in enumerate(getattr(dense, stack)):
            for suffix, tensor in packed.codec.encode(matrix).items():
                assert torch.equal(packed.packed_tensors(stack)[suffix][expert], tensor)


def test_two_rounds_of_saving_are_identical_and_consistent(dense_dir, tmp_path):
    packed = load(dense_dir, PcdvqConfig(bits=2.0))
    packed.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(load(tmp_path / "second")), logits(packed))
    stored = [key for key in first if ".1." in key and ".experts." in key]
    assert set(stored) == {key for key in packed.state_dict() if key.startswith(EXPERT_LAYER)}
    assert len(stored) == 4 and all(len(first[key]) == EXPERTS for key in stored)  # stacks, not split into experts
    count = count_folder(tmp_path / "first")
    (layer,) = (layer for layer in count.layers if "layers.1." in layer.name and ".experts.down" in layer.name)
    assert (layer.experts, layer.out_features, layer.in_features) == (EXPERTS, 64, 96)
    assert layer.bits_per_weight == pytest.approx(2 + 32 / 96)


def test_dequantized_models_compute_the_same_and_save_as_the_original_did(dense_dir, tmp_path):
    packed = load(dense_dir, PcdvqConfig())
    packed.save_pretrained(tmp_path / "packed")
    expected = logits(packed)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = load(tmp_path / "packed", PcdvqConfig(dequantize=True))
    for number, dense in enumerate((loaded, packed.dequantize())):
        assert isinstance(dense.get_submodule(EXPERT_LAYER).gate_up_proj, nn.Parameter)
        # The CPU kernels quantize activations to 15 bits.
        assert relative(logits(dense), expected) < 3e-4
        folder = tmp_path / f"dense{number}"
        dense.save_pretrained(folder)
        assert torch.equal(logits(load(folder)), logits(dense))
        with (
            safe_open(folder / "model.safetensors", "pt") as a,
            safe_open(dense_dir / "model.safetensors", "pt") as b,
        ):
            assert set(a.keys()) == set(b.keys())


def test_every_experts_implementation_gives_the_same(tmp_path):
    model("qwen3").save_pretrained(tmp_path / "dense")
    packed = load(tmp_path / "dense", PcdvqConfig(), experts_implementation="eager")
    expected = logits(packed)
    for implementation in ("eager", *ALL_EXPERTS_FUNCTIONS):
        packed.set_experts_implementation(implementation)
        assert torch.equal(logits(packed), expected)
        again = load(tmp_path / "dense", PcdvqConfig(), experts_implementation=implementation)
        assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="nonsense"):
        packed.set_experts_implementation("nonsense")


def test_float64_is_summed_in_float64():
    torch.manual_seed(0)
    dense, codec = model("qwen3").get_submodule(EXPERT_LAYER), PcdvqConfig().codec
    stacks = {name: encode_stack(codec, getattr(dense, name)) for name in ("gate_up_proj", "down_proj")}
    experts = QuantExperts.from_packed(dense, codec, stacks)
    x, index = torch.randn(5, 64), torch.randint(EXPERTS, (5, 2))
    weights = torch.rand(5, 2)
    out = experts(x.double(), index, weights.double())
    assert out.dtype == torch.float64
    assert (
        relative(out.float(), experts(x, index, weights)) < 3e-4
    )  # which the CPU kernels compute with 15-bit activations


def test_tokens_of_other_devices_are_skipped():
    dense = model("mixtral").get_submodule(EXPERT_LAYER)
    packed = QuantExperts(dense, PcdvqConfig().codec, "cpu")
    for stack in ("gate_up_proj", "down_proj"):
        parts = [packed.codec.encode(matrix) for matrix in getattr(dense, stack)]
        packed.set_packed(stack, {suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]})
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [EXPERTS, 2], [3, -1], [EXPERTS, EXPERTS], [7, 6]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    here = (index >= 0) & (index < EXPERTS)
    with torch.no_grad():
        out = packed(hidden, index, weights)
        expected = packed.dequantize(torch.float32)(hidden, index.clamp(0, EXPERTS - 1), weights * here)
    assert relative(out, expected) < 3e-4 and not out[3].any()  # the CPU kernels quantize activations to 15 bits


def test_bfloat16_and_layers_on_disk(tmp_path):
    model("deepseek").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
    )
    options = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    whole.save_pretrained(tmp_path / "packed")
    expected = logits(whole)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **options)), expected)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig(), **options)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("missing", ("w1", ""), ids=("one matrix", "a whole expert"))
def test_a_missing_expert_is_an_error(missing, tmp_path):
    model("mixtral").save_pretrained(tmp_path)
    whole = tensors(tmp_path)
    kept = {name: tensor for name, tensor in whole.items() if f"experts.7.{missing}" not in name}
    assert len(kept) < len(whole)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        load(tmp_path, PcdvqConfig())


def test_overrides_choose_a_setting_by_the_name_of_the_module(tmp_path):
    ernie(num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    overrides = {r"layers\.1\.mlp\.experts": "ccq-2.75", r"layers\.2\.mlp\.experts": None, "self_attn|shared": "int8"}
    # 96 inputs are not a multiple of 64, so the second stack cannot be packed as ccq-2.75.
    packed = load(tmp_path / "dense", CcqConfig(layout="stream", overrides=overrides))
    left = packed.config.quantization_config.left_unpacked
    assert "not a multiple of 64" in left["model.layers.*.mlp.experts.down_proj"]
    assert "left alone by overrides" in left["model.layers.*.mlp.experts.down_proj"]
    attention = packed.model.layers[0].self_attn.q_proj
    assert attention.codec.bits == 8 and packed.model.layers[0].mlp.up_proj.codec.bits == 2
    dense = load(tmp_path / "dense").model.layers[0].self_attn.q_proj.weight
    assert relative(attention.dequantize(torch.float32).weight, dense) < 0.01
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(packed))
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = load(tmp_path / "packed", CcqConfig(dequantize=True))
    assert relative(logits(dense), logits(packed)) < 1e-4
    assert count_folder(tmp_path / "packed").bits_per_packed_weight > 2


def test_experts_of_another_layout_are_named(tmp_path):
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=258, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "dense")
    packed = load(tmp_path / "dense", PcdvqConfig())
    left = packed.config.quantization_config.left_unpacked
    assert "GptOssExperts: its weights are transposed" in left["model.layers.*.mlp.experts.gate_up_proj"]
    assert not any(isinstance(module, QuantExperts) for module in packed.modules())


def test_a_failing_expert_is_named(tmp_path):
    dense = model("mixtral")
    dense.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: the weight holds infinite or NaN"):
        load(tmp_path / "dense", PcdvqConfig())
