"""Damaged checkpoints and misuse: each raises an error that names the problem, and never returns a model."""

import importlib
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import hf_pcdvq
from hf_pcdvq import CcqConfig, PcdvqConfig

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "packed")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_magnitude"])
def test_a_missing_tensor_is_named(folder, suffix):
    change(folder, lambda tensors: tensors.pop(f"{NAME}.{suffix}"))
    with pytest.raises(ValueError, match=f"not in the checkpoint: {NAME}.{suffix}"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_magnitude"])
def test_a_missing_tensor_of_an_offloaded_layer_is_named(folder, suffix, tmp_path):
    change(folder, lambda tensors: tensors.pop(f"{NAME}.{suffix}"))
    places = dict.fromkeys(
        ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu"
    )
    with pytest.raises(ValueError, match=f"{NAME}.{suffix}"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
        )


@pytest.mark.parametrize("ignore", [False, True])
def test_a_wrong_shape_is_named(folder, ignore):
    change(folder, lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"][:100].clone()}))
    with pytest.raises(ValueError, match=rf"'{NAME}.weight' .* \[100, 32\], but .* \[192, 32\]"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_a_wrong_dtype_is_named(folder):
    change(folder, lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"].int()}))
    with pytest.raises(ValueError, match=f"'{NAME}.weight' .* is torch.int32"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_weight_in_the_place_of_a_packed_one_is_named(folder):
    change(folder, lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(192, 128, dtype=torch.bfloat16)}))
    with pytest.raises(ValueError, match=f"'{NAME}.weight' .* is torch.bfloat16"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is truncated: tensor .model.layers.1"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_companion_is_named_when_dequantizing(folder):
    change(folder, lambda tensors: tensors.pop(f"{NAME}.weight_magnitude"))
    with (
        pytest.raises(ValueError, match=f"not in the checkpoint: {NAME}.weight_magnitude"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=PcdvqConfig(dequantize=True))


def test_another_codebook_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codebook_sha256"] = "f" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="would decode to different weights"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_newer_format_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 2 is newer than 1"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_config_of_the_other_method_is_refused(folder):
    with pytest.raises(ValueError, match="PcdvqConfig but you are passing a CcqConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CcqConfig())


def test_a_damaged_original_is_refused(tiny_model_dir, tmp_path):
    source = shutil.copytree(tiny_model_dir, tmp_path / "dense")
    change(source, lambda tensors: tensors[f"{NAME}.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{NAME}.weight.*infinite or NaN"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PcdvqConfig())


def test_a_weight_that_the_original_lacks_is_named(tiny_model_dir, tmp_path):
    source = shutil.copytree(tiny_model_dir, tmp_path / "dense")
    change(source, lambda tensors: tensors.pop(f"{NAME}.weight"))
    with pytest.raises(ValueError, match=f"{NAME}.weight"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PcdvqConfig())


def test_dequantize_needs_a_packed_model(tiny_model_dir):
    with pytest.raises(ValueError, match="decodes a model that is packed already"):
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig(dequantize=True))


def test_registration_can_be_repeated():
    hf_pcdvq.register()
    importlib.reload(hf_pcdvq)
    assert auto.AUTO_QUANTIZER_MAPPING["pcdvq"] is hf_pcdvq.PackedHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ccq"] is CcqConfig
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(CcqConfig) == 1


def test_a_method_that_somebody_else_registered_is_left_alone(monkeypatch):
    class Foreign(auto.HfQuantizer):
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "ccq", Foreign)
    with pytest.warns(UserWarning, match="'ccq' is already registered by test_load_errors"):
        hf_pcdvq.register()
    assert auto.AUTO_QUANTIZER_MAPPING["ccq"] is Foreign
