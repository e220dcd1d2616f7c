"""A second decoder, in NumPy and written from docs/formats.md alone, decodes and checks whole checkpoints identically."""

import json
import struct

import hf_pcdvq_kernels
import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig

CODEBOOKS = hf_pcdvq_kernels.__path__[0] + "/codebooks/"
SHIFTS = {
    "2.75": (22, (4, 2, 0), 15, 8),
    "2.5": (10, (13, 11, 9, 6, 4, 2, 0), 7, 4),
    "2.0625": (16, (9, 6, 3, 0), 63, 32),
}
NEW_BITS = {
    2.0: ([2], 16, 1),
    2.25: ([2, 2, 2, 3], 128, 9),
    2.5: ([2, 3], 64, 5),
    3.0: ([3], 32, 3),
    4.0: ([4], 8, 1),
}


def words_of_two_bytes(stored):
    return stored[:, ::2] | stored[:, 1::2].astype(np.int64) << 8


def decode_pcdvq(config, words, scale, companions):
    book = load_file(f"{CODEBOOKS}{config['codebook']}.safetensors")
    words = words_of_two_bytes(words)
    if config["bits"] == 2.0:
        pattern, magnitude = words >> 7 & 127, words >> 14
    else:
        vectors = np.arange(words.shape[1])
        pattern, magnitude = words >> 7, companions["magnitude"][:, vectors // 4] >> 2 * (vectors % 4) & 3
    flips = words[..., None] >> np.arange(7) & 1
    flips = np.concatenate([flips, flips.sum(-1, keepdims=True) % 2], -1)
    levels = book[f"levels_{config['magnitude']}"][magnitude]
    vectors = (scale[:, None] * levels)[..., None] * (1 - 2 * flips) * book["patterns"][pattern]
    return vectors.reshape(len(words), -1)


def decode_ccq(config, words, scale, companions):
    layout = config["layout"]
    size, shifts, mask, offset = SHIFTS[layout]
    words = words_of_two_bytes(words) if layout == "2.5" else words.astype(np.int64)
    words = words.reshape(len(words), -1, size)
    groups = np.arange(words.shape[1])
    if layout == "2.0625":
        byte = companions["local_scale"][:, groups // 2].astype(np.int64)
        group_scale = np.where(groups % 2 == 0, byte >> 4, byte & 15)
        slope, start = (companions[name][:, None, None] for name in ("code_scale", "code_zero"))
        words = np.floor(words.astype(np.float32) * slope + start + np.float32(0.5)).astype(np.int64)
    else:
        group_scale = words[..., -1] & {"2.75": 15, "2.5": 8191}[layout]
    weights = np.arange(64)
    values = (words[..., weights // len(shifts)] >> np.take(shifts, weights % len(shifts)) & mask) - offset
    return ((group_scale * scale[:, None])[..., None] * values).reshape(len(words), -1)


def decode_stream(config, words, scale, companions):
    pattern, period, per_period = NEW_BITS[config["bits"]]
    words, length = words.view(np.uint32), config["window_bits"]
    rows = []
    for start in range(0, len(words) // per_period * period, 256):
        ring = words[start // period * per_period : (start + 256) // period * per_period]
        bits = (ring[:, None] >> np.arange(31, -1, -1)[None, :, None] & 1).reshape(-1, words.shape[1])
        end = 0
        for channel in range(len(ring) // per_period * period):
            end += pattern[channel % len(pattern)]
            window = bits[np.arange(end - length, end) % len(bits)]
            number = (window * (1 << np.arange(length - 1, -1, -1))[:, None]).sum(0)
            product = (number * 0x8A7050F1 % 2**32).astype(np.uint32)
            rows.append(product[:, None].view(np.int8).astype(np.int64).sum(1))
    return scale[:, None] * np.stack(rows)[: len(scale)]


def decode_int8(config, words, scale, companions):
    return words.view(np.int8) * scale[:, None]


SETTINGS = {
    "int8": {"quant_method": "int8"},
    "pcdvq-2.0": {"quant_method": "pcdvq", "bits": 2.0, "magnitude": "norm", "codebook": "pcdvq-a14-v1"},
    "pcdvq-2.25": {"quant_method": "pcdvq", "bits": 2.25, "magnitude": "norm", "codebook": "pcdvq-a16-v1"},
    **{
        f"ccq-{name}{suffix}": {"quant_method": "ccq", "layout": name}
        for name in SHIFTS
        for suffix in ("", "-published")
    },
    **{
        f"stream-{bits}": {"quant_method": "ccq", "layout": "stream", "bits": bits, "window_bits": 12}
        for bits in NEW_BITS
    },
}


def header_of(file):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def configs_of(file):
    """The settings of every packed module, from the record in the file's metadata."""
    record = json.loads(header_of(file)[0]["__metadata__"]["hf_pcdvq"])
    return {
        module: {**SETTINGS[described["setting"]], **described}
        for described, modules in record["codecs"]
        for module in modules
    }


def unrotate(rotated, limit, seed):
    features = rotated.shape[1]
    block = min(features & -features, limit)
    x = (np.arange(block) + 0x9E3779B9 * (seed + 1)) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    signs = 1 - 2 * ((x ^ x >> 16) & 1)
    index = np.arange(block)
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in index.tolist()] for i in index.tolist()])
    return (rotated.reshape(len(rotated), -1, block) @ hadamard * signs / block**0.5).reshape(rotated.shape)


def decode(config, tensors, name, expert=...):
    words, scale = tensors[name][expert], tensors[f"{name}_scale"][expert].astype(np.float64)
    companions = {
        key.removeprefix(f"{name}_"): tensor[expert] for key, tensor in tensors.items() if key.startswith(f"{name}_")
    }
    method = {"pcdvq": decode_pcdvq, "int8": decode_int8, "ccq": decode_ccq}[config["quant_method"]]
    rotated = (decode_stream if config.get("layout") == "stream" else method)(config, words, scale, companions)
    if not config["hadamard_block"]:
        return rotated
    return unrotate(rotated, config["hadamard_block"], config["hadamard_seed"])


@pytest.mark.parametrize(
    "config",
    [
        PcdvqConfig(bits=2.0, magnitude="norm"),
        PcdvqConfig(bits=2.25, hadamard_block=32, hadamard_seed=7),
        CcqConfig(layout="2.75"),
        CcqConfig(layout="2.5", hadamard=False),
        CcqConfig(layout="2.0625"),
        *(CcqConfig(layout="stream", bits=bits, window_bits=12) for bits in NEW_BITS),
        CcqConfig(layout="stream", bits=2.0, window_bits=13),
    ],
    ids=lambda config: f"{config.method}-{getattr(config, 'layout', '')}-{config.bits}",
)
def test_the_specification_is_enough_to_decode_a_checkpoint(tiny_model_dir, tmp_path, config):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config).save_pretrained(tmp_path)
    stored = configs_of(tmp_path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=type(config)(dequantize=True), dtype=torch.float32
    ).state_dict()
    # Read with NumPy, which has no bfloat16: packed tensors only.
    tensors = packed_tensors(tmp_path / "model.safetensors")
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    assert len(layers) == 14
    for layer in layers:
        decoded, weight = (
            decode(stored[layer], tensors, f"{layer}.weight"),
            expected[f"{layer}.weight"].double().numpy(),
        )
        np.testing.assert_allclose(decoded, weight, rtol=0, atol=1e-5 * np.abs(weight).max())


def test_it_is_enough_for_experts_and_other_settings(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4))
    model.save_pretrained(tmp_path / "dense")
    overrides = {r"layers\.1\..*experts": "stream-4.0", "experts": "pcdvq-2.0", "q_proj|k_proj": "int8"}
    config = PcdvqConfig(overrides=overrides, hadamard_seed=3)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    packed.save_pretrained(tmp_path)
    stored = configs_of(tmp_path / "model.safetensors")
    tensors, expected = packed_tensors(tmp_path / "model.safetensors"), packed.dequantize("float32").state_dict()
    names = [name.removesuffix("_scale") for name in tensors if name.endswith("_scale")]
    assert sum(".experts." in name for name in names) == 4 and len(names) == 4 + 2 * 4
    for name in names:
        for expert in range(4) if ".experts." in name else [...]:
            decoded = decode(stored[name.rpartition(".")[0]], tensors, name, expert)
            weight = expected[name][expert].double().numpy()
            np.testing.assert_allclose(decoded, weight, rtol=0, atol=1e-5 * np.abs(weight).max())


def test_it_is_enough_to_check_a_file(tiny_model_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig()).save_pretrained(tmp_path)
    header, data = header_of(tmp_path / "model.safetensors")
    record = json.loads(header.pop("__metadata__")["hf_pcdvq"])
    assert record["hashes"] == {
        name: xxhash.xxh3_128_hexdigest(
            f"{entry['dtype']} {entry['shape']} ".encode() + data[slice(*entry["data_offsets"])]
        )
        for name, entry in header.items()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert record["settings"].items() <= settings.items()
    for name in ("architectures", "dtype", "transformers_version"):
        config.pop(name)
    assert record["config"] == {
        name: xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode()) for name, value in config.items()
    }


def packed_tensors(file):
    from safetensors import safe_open

    with safe_open(file, framework="np") as handle:
        layers = [name.removesuffix("_scale") for name in handle.keys() if name.endswith("_scale")]
        return {
            name: handle.get_tensor(name) for name in handle.keys() if any(name.startswith(layer) for layer in layers)
        }
