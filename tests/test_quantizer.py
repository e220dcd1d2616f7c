"""Quantize on load, save, load, dequantize: the main workflow on a tiny model, for every setting."""

import json
import subprocess
import sys

import pytest
import torch
from new_process import reloaded_logits
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.modules import QuantLinear

SETTINGS = {
    "pcdvq-2.0": PcdvqConfig(bits=2.0),
    "pcdvq-2.25": PcdvqConfig(bits=2.25),
    "pcdvq-2.25-projection": PcdvqConfig(bits=2.25, magnitude="projection"),
    "ccq-2.75": CcqConfig(layout="2.75"),
    "ccq-2.5": CcqConfig(layout="2.5"),
    "ccq-2.5-published": CcqConfig(layout="2.5", hadamard=False),
    "ccq-2.0625": CcqConfig(layout="2.0625"),
    "stream-2.0": CcqConfig(layout="stream"),
    "stream-2.25": CcqConfig(layout="stream", bits=2.25),
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(params=SETTINGS)
def setting(request):
    return request.param


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def quantize(folder, config, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    """The tiny model packed with every setting. Shared: do not modify them."""
    return {setting: quantize(tiny_model_dir, config) for setting, config in SETTINGS.items()}


@pytest.fixture(scope="module")
def reloaded(models, tmp_path_factory):
    """The logits of the same models, saved and loaded again in a new process."""
    folder = tmp_path_factory.mktemp("saved")
    for setting, model in models.items():
        model.save_pretrained(folder / setting)
    return dict(zip(models, reloaded_logits([folder / setting for setting in models], IDS)))


@pytest.fixture
def packed_dir(tiny_model_dir, tmp_path):
    """A packed folder with the default setting, and the logits that it must produce."""
    model = quantize(tiny_model_dir, PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", logits(model)


def test_saved_and_reloaded_in_a_new_process_gives_identical_logits(models, reloaded, setting):
    assert torch.equal(reloaded[setting], logits(models[setting]))


def test_decoder_layers_are_packed_and_the_head_is_not(models, setting):
    model = models[setting]
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)
    assert type(model.lm_head) is nn.Linear
    assert model.is_quantized and model.quantization_method == SETTINGS[setting].method


def test_quantized_weights_resemble_the_original(tiny_model_dir, models, setting):
    """Relative squared error of the decoded weights: 0.12 is that of a 2-bit scalar quantizer."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir).model.layers
    packed = models[setting].model.layers
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = dense[0].get_submodule(name).weight.float()
        decoded = packed[0].get_submodule(name).dequantize(torch.float32).weight
        assert (decoded - weight).square().sum() / weight.square().sum() < 0.125


def test_dequantize_in_memory_and_on_load(tiny_model_dir, setting, tmp_path):
    config = SETTINGS[setting]
    model = quantize(tiny_model_dir, config, dtype=torch.float32)
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = quantize(tmp_path / "packed", type(config)(dequantize=True), dtype=torch.float32)
    for dense in (model.dequantize(), loaded):
        assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
        assert not hasattr(dense.config, "quantization_config")
        # float32, with the rotation applied to the weight instead of the activations: rounding of some hundred sums
        assert (logits(dense) - expected).norm() / expected.norm() < 1e-5
    loaded.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_runs_in_every_dtype(packed_dir, dtype):
    folder, expected = packed_dir
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    out = logits(model)
    assert out.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    # the model itself computes in dtype; the packed reference was bfloat16
    assert (out.float() - expected.float()).norm() / expected.float().norm() < 0.03


def test_sharded_save(packed_dir, tmp_path):
    folder, expected = packed_dir
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), expected)


def test_the_file_says_which_format_it_holds(packed_dir):
    folder, _ = packed_dir
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["hf_pcdvq"])
        assert record["format_version"] == 1 and record["settings"]["bits"] == 2.25
        weight = file.get_slice("model.layers.0.mlp.up_proj.weight")
        assert weight.get_dtype() == "U8" and weight.get_shape() == [192, 32]
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "pcdvq" and saved["format_version"] == 1 and len(saved["codebook_sha256"]) == 64
    assert "lm_head" in saved["modules_to_not_convert"]
    assert saved["left_unpacked"]["model.embed_tokens.weight"] == "embedding"


def test_without_the_plugin_loading_fails(packed_dir):
    folder, _ = packed_dir
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); print('LOADED')"
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert result.returncode != 0 and "LOADED" not in result.stdout
    assert "Error" in result.stderr


def test_auto_model_without_head(packed_dir):
    folder, _ = packed_dir
    base = AutoModel.from_pretrained(folder)
    full = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(base(IDS).last_hidden_state, full.model(IDS).last_hidden_state)


def test_packed_as_auto_model_and_opened_with_a_tied_head(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    AutoModel.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig()).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    assert torch.equal(logits(model), logits(direct))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    direct.save_pretrained(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(direct))


DEVICE_MAPS = {
    "auto": "auto",
    "cpu": "cpu",
    "disk": {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
        "model.norm": "cpu", "lm_head": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
def test_device_maps(tiny_model_dir, packed_dir, device_map, offload_buffers, tmp_path):
    folder, expected = packed_dir
    options = {"device_map": device_map, "offload_buffers": offload_buffers}
    loaded = AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path / "a", **options)
    fresh = quantize(tiny_model_dir, PcdvqConfig(), offload_folder=tmp_path / "b", **options)
    for model in (loaded, fresh):
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_dequantizing_an_offloaded_model_is_refused(packed_dir, tmp_path):
    folder, _ = packed_dir
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=DEVICE_MAPS["disk"], offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj is offloaded"):
        model.dequantize()


def test_pipeline(packed_dir):
    folder, _ = packed_dir
    generate = pipeline("text-generation", model=str(folder))
    text = generate("hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("hello")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = generate.tokenizer("hello", return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0]
    assert text == generate.tokenizer.decode(ids, skip_special_tokens=True)


def test_pipeline_quantizes_while_it_loads(tiny_model_dir):
    generate = pipeline(
        "text-generation", model=str(tiny_model_dir), model_kwargs={"quantization_config": CcqConfig()}
    )
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, QuantLinear)


def test_static_cache_generates_the_same(packed_dir):
    model = AutoModelForCausalLM.from_pretrained(packed_dir[0])
    options = {"max_new_tokens": 5, "do_sample": False}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(IDS, **options))


def test_quantizing_twice_gives_the_same_model(tiny_model_dir, models, setting):
    first, second = models[setting].state_dict(), quantize(tiny_model_dir, SETTINGS[setting]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
