"""Bits and bytes counted from files, against hand computations, and the damage that counting must report."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.files.size import count_folder, readable_size

# Layers of the tiny model: outputs, inputs. Two blocks of each.
LAYERS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
WEIGHTS = 2 * sum(outputs * inputs for outputs, inputs in LAYERS.values())
VOCABULARY_BYTES = 258 * 128 * 2  # the embeddings; the head takes the same
NORM_BYTES = (2 * 2 + 1) * 128 * 2
QUERY = "model.layers.0.self_attn.q_proj"


def row_bytes(setting, inputs):
    """Bytes of one output channel, according to the documented formats."""
    groups = inputs // 64
    return {
        "pcdvq-2.0": inputs // 8 * 2 + 4,
        "pcdvq-2.25": inputs // 8 * 2 + inputs // 32 + 4,
        "ccq-2.75": groups * 22 + 4,
        "ccq-2.5": groups * 10 * 2 + 4,
        "ccq-2.0625": groups * 16 + math.ceil(groups / 2) + 3 * 4,
        "stream-2.0": inputs / 4 + 4,
        "stream-2.5": inputs * 2.5 / 8 + 4,
    }[setting]


SETTINGS = {
    "pcdvq-2.0": PcdvqConfig(bits=2.0),
    "pcdvq-2.25": PcdvqConfig(),
    "ccq-2.75": CcqConfig(layout="2.75"),
    "ccq-2.5": CcqConfig(layout="2.5"),
    "ccq-2.0625": CcqConfig(layout="2.0625"),
    "stream-2.0": CcqConfig(layout="stream"),
    "stream-2.5": CcqConfig(layout="stream", bits=2.5),
}


def packed(source, folder, config, **options):
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def packed_once(tiny_model_dir, tmp_path_factory):
    return packed(tiny_model_dir, tmp_path_factory.mktemp("report") / "packed", PcdvqConfig())


@pytest.fixture
def packed_dir(packed_once, tmp_path):
    """A packed folder with the default setting, which the test may modify."""
    return shutil.copytree(packed_once, tmp_path / "packed")


def rewrite(folder, change):
    """Let `change` edit the dictionary of tensors in a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewrite_config(folder, **fields):
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["quantization_config"] |= fields
    file.write_text(json.dumps(settings))


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("setting", SETTINGS)
def test_bits_equal_a_hand_computation(tiny_model_dir, tmp_path, setting):
    count = count_folder(packed(tiny_model_dir, tmp_path / "packed", SETTINGS[setting]))
    assert len(count.layers) == 14
    for layer in count.layers:
        outputs, inputs = LAYERS[layer.name.split(".", 3)[3]]
        assert (layer.out_features, layer.in_features) == (outputs, inputs)
        assert layer.nbytes == outputs * row_bytes(setting, inputs)
        assert layer.bits_per_weight == 8 * row_bytes(setting, inputs) / inputs
    total = 2 * sum(outputs * row_bytes(setting, inputs) for outputs, inputs in LAYERS.values())
    assert count.packed_bytes == total
    assert count.bits_per_packed_weight == 8 * total / WEIGHTS
    assert (count.embedding_bytes, count.head_bytes) == (VOCABULARY_BYTES, VOCABULARY_BYTES)
    assert count.other_bytes == NORM_BYTES


def test_parts_add_up_to_the_file_and_parameters_to_the_model(tiny_model_dir, packed_dir):
    count = count_folder(packed_dir)
    size = (packed_dir / "model.safetensors").stat().st_size
    assert count.file_bytes == size
    record = json.loads(json.dumps(count.to_dict()))
    assert sum(record["bytes"].values()) == record["file_bytes"] == size
    assert sum(tensor["bytes"] for layer in record["layers"] for tensor in layer["tensors"]) == count.packed_bytes
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert count.parameters == dense.num_parameters()
    assert count.bits_per_parameter == 8 * size / dense.num_parameters()


def test_a_layer_lists_its_tensors(packed_dir):
    record = next(layer for layer in count_folder(packed_dir).to_dict()["layers"] if layer["name"] == QUERY)
    assert record["tensors"] == [
        {"name": f"{QUERY}.weight", "dtype": "uint8", "shape": [128, 32], "bytes": 128 * 32},
        {"name": f"{QUERY}.weight_magnitude", "dtype": "uint8", "shape": [128, 4], "bytes": 128 * 4},
        {"name": f"{QUERY}.weight_scale", "dtype": "float32", "shape": [128], "bytes": 128 * 4},
    ]


def test_shards_count_like_one_file(tiny_model_dir, packed_dir, tmp_path):
    whole = count_folder(packed_dir)
    shards = packed(tiny_model_dir, tmp_path / "shards", PcdvqConfig(), max_shard_size="100KB")
    files = list(shards.glob("*.safetensors"))
    assert len(files) > 1
    count = count_folder(shards)
    assert count.file_bytes == sum(file.stat().st_size for file in files)
    assert (count.packed_bytes, count.embedding_bytes, count.other_bytes) == (
        whole.packed_bytes,
        whole.embedding_bytes,
        whole.other_bytes,
    )
    assert count.header_bytes > whole.header_bytes


def test_dense_folder_has_no_packed_layers(tiny_model_dir):
    count = count_folder(tiny_model_dir)
    assert (count.layers, count.config, count.bits_per_packed_weight, count.left_unpacked) == ((), None, None, {})
    assert (count.embedding_bytes, count.head_bytes) == (VOCABULARY_BYTES, VOCABULARY_BYTES)
    assert count.other_bytes == NORM_BYTES + 2 * WEIGHTS
    assert 16 < count.bits_per_parameter < 17  # bfloat16 and the header


def test_layers_that_were_skipped_are_counted_as_dense_and_named(tiny_model_dir, tmp_path):
    config = PcdvqConfig(modules_to_not_convert=["down_proj"])
    count = count_folder(packed(tiny_model_dir, tmp_path / "packed", config))
    assert len(count.layers) == 12
    assert count.other_bytes == NORM_BYTES + 2 * 128 * 192 * 2
    assert "modules_to_not_convert (x2)" in count.left_unpacked["model.layers.*.mlp.down_proj.weight"]
    assert "model.embed_tokens.weight" in count.left_unpacked


def test_tied_head_takes_no_space_of_its_own(packed_dir):
    rewrite(packed_dir, lambda tensors: tensors.pop("lm_head.weight"))
    count = count_folder(packed_dir)
    assert (count.embedding_bytes, count.head_bytes) == (VOCABULARY_BYTES, 0)


def test_bias_of_a_packed_layer_is_not_part_of_its_weight(packed_dir):
    before = count_folder(packed_dir)
    rewrite(packed_dir, lambda tensors: tensors.update({f"{QUERY}.bias": torch.zeros(128, dtype=torch.bfloat16)}))
    after = count_folder(packed_dir)
    assert after.packed_bytes == before.packed_bytes
    assert after.other_bytes == before.other_bytes + 256


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("parameter", ["weight", "weight_scale", "weight_magnitude"])
def test_missing_tensor_of_a_packed_layer_is_named(packed_dir, parameter):
    rewrite(packed_dir, lambda tensors: tensors.pop(f"{QUERY}.{parameter}"))
    with pytest.raises(ValueError, match=f"{QUERY}' lacks {QUERY}.{parameter};"):
        count_folder(packed_dir)


@pytest.mark.parametrize(
    ("parameter", "tensor"),
    [
        ("weight_scale", torch.ones(128, 1)),
        ("weight_scale", torch.ones(128, dtype=torch.bfloat16)),
        ("weight_magnitude", torch.zeros(128, 3, dtype=torch.uint8)),
        ("weight", torch.zeros(128, 31, dtype=torch.uint8)),
        ("weight", torch.zeros(128 * 32, dtype=torch.uint8)),
        ("weight", torch.zeros(128, 32, dtype=torch.int32)),
        ("weight", torch.zeros(128, 128)),
    ],
)
def test_tensor_of_the_wrong_shape_or_dtype_is_named(packed_dir, parameter, tensor):
    rewrite(packed_dir, lambda tensors: tensors.update({f"{QUERY}.{parameter}": tensor}))
    found = re.escape(f"{QUERY}.{parameter} is {tensor.dtype} {list(tensor.shape)}")
    with pytest.raises(ValueError, match=f"{found}(, but|; expected)"):
        count_folder(packed_dir)


def test_scales_of_another_number_of_channels_are_refused(packed_dir):
    rewrite(packed_dir, lambda tensors: tensors.update({f"{QUERY}.weight_scale": torch.ones(127)}))
    with pytest.raises(ValueError, match=rf"{QUERY}.weight is .*\[128, 32\], but a layer of 127 outputs"):
        count_folder(packed_dir)


def test_other_methods_and_newer_formats_are_refused(packed_dir):
    rewrite_config(packed_dir, format_version=99)
    with pytest.raises(ValueError, match="format_version 99 is newer"):
        count_folder(packed_dir)
    rewrite_config(packed_dir, quant_method="gptq")
    with pytest.raises(ValueError, match="quantized with 'gptq'"):
        count_folder(packed_dir)


def test_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/config.json is missing"):
        count_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        count_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_readable_sizes(nbytes, text):
    assert readable_size(nbytes) == text
