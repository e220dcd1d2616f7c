"""The plugin for vLLM reads from the files what hf_pcdvq has written there. Needs no vLLM."""

import json
import shutil

import pytest
import torch
from hf_pcdvq_vllm.coding import Coding
from hf_pcdvq_vllm.record import read_codings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.codecs import SETTINGS, codec_of_setting
from hf_pcdvq.codecs.description import description

OWN = [{}, {"magnitude": "projection"}, {"window_bits": 14}]


def codecs():
    for setting, (kind, _) in SETTINGS.items():
        for own in OWN:
            if own.keys() <= set(kind.__dataclass_fields__):
                yield codec_of_setting(setting, 64, 3, **own)


@pytest.mark.parametrize("codec", codecs(), ids=str)
def test_a_coding_decodes_as_its_codec_does(codec):
    coding = Coding.described(json.loads(json.dumps(description(codec))))
    assert (coding.format, coding.family, dict(coding.parameters)) == (
        codec.format,
        codec.family,
        {**codec.family.parameters(codec.format), **codec.parameters()},
    )
    expected, found = codec.tables(192), coding.tables(192)
    assert expected.keys() == found.keys()
    for name, table in expected.items():
        torch.testing.assert_close(found[name], table, rtol=0, atol=0)
    torch.manual_seed(0)
    packed = codec.encode(torch.randn(16, 192))
    tensors = {suffix or "weight": tensor for suffix, tensor in packed.items()}
    for ours, theirs in zip(coding.arguments(tensors, found), codec.arguments(packed, expected), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": "pcdvq-9"}, "unknown format 'pcdvq-9'"),
        ({"setting": None}, "with a setting"),
        ({"hadamard_block": 3}, "hadamard_block must be 0 or a power of two"),
        ({"hadamard_seed": -1}, "hadamard_seed must be an integer"),
        ({"magnitude": "loud"}, "magnitude must be one of norm, projection, got 'loud'"),
        ({"codebook": "../weights"}, "unknown codebook '../weights'"),
        ({"codebook": "pcdvq-a14-v1"}, "is not one of pcdvq-2.25"),
        ({"window_bits": 12}, "pcdvq-2.25 has no field 'window_bits'"),
        ({"setting": "stream-2.0", "window_bits": 40}, "window_bits must be one of"),
        ({"setting": "stream-2.0", "window_bits": "12"}, "stream-2.0: window_bits must be like 12, got '12'"),
        ({"setting": "ccq-2.5", "layout": "2.75"}, "what describes ccq-2.5 is that of ccq-2.75"),
    ],
)
def test_what_describes_no_codec_is_refused(change, message):
    described = {"setting": "pcdvq-2.25", "hadamard_block": 64, "hadamard_seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        Coding.described(described)


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    config = CcqConfig(overrides={"self_attn": "int8", "down_proj": None})
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config).save_pretrained(folder)
    return folder


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_every_packed_module_is_found_with_its_own_setting(packed):
    codings = read_codings(str(packed), None, settings(packed))
    formats = {name.removeprefix("model.layers.0."): coding.format for name, coding in codings.items()}
    assert formats["self_attn.q_proj"] == formats["self_attn.o_proj"] == "int8"
    assert formats["mlp.up_proj"] == "ccq-2.5"
    assert "mlp.down_proj" not in formats and not any("embed" in name or "head" in name for name in formats)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head": "int8"}, "quantized with head='int8': "),
        ({"embeddings": "int8"}, "quantized with embeddings='int8': "),
        ({"embeddings": "int8", "head": "int8"}, "quantized with embeddings='int8' and head='int8': "),
    ],
)
def test_packed_embeddings_and_heads_are_refused_with_what_works(options, named, tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=PcdvqConfig(modules_to_convert=["o_proj"], **options)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=f"{named}.*Quantize the model again without .* hf-pcdvq serve"):
        read_codings(str(tmp_path), None, settings(tmp_path))


def rewritten(folder, to, change):
    """A copy whose record has been changed by a function."""
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["hf_pcdvq"])
    change(record)
    save_file(load_file(file), file, {**metadata, "hf_pcdvq": json.dumps(record)})
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format_version=2), "format_version 2 is not one that this plugin reads"),
        (lambda record: record.pop("codecs"), "is not complete"),
        (lambda record: record["codecs"][0].append(1), "describes no codec"),
        (lambda record: record["codecs"][0].__setitem__(1, "lm_head"), "names no modules: 'lm_head'"),
        (
            lambda record: record["codecs"][0][1].append(record["codecs"][1][1][0]),
            r"packs model\..* both in .* and in",
        ),
        (lambda record: record["codecs"][0][0].update(hadamard_block=7), "hadamard_block must be"),
        (
            lambda record: record["settings"].update(hadamard_seed=5),
            "config.json says hadamard_seed 0, its files say 5",
        ),
    ],
)
def test_a_damaged_record_is_refused(packed, tmp_path, change, message):
    folder = rewritten(packed, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        read_codings(str(folder), None, settings(folder))


def test_files_without_a_record_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors files"):
        read_codings(str(tmp_path), None, {})
    file = tmp_path / "model.safetensors"
    save_file(load_file(packed / "model.safetensors"), file, {"format": "pt"})
    with pytest.raises(ValueError, match="does not say how its modules are packed: another program has written it"):
        read_codings(str(tmp_path), None, settings(packed))


def divided(folder, to):
    """A copy in two files with an index, and beside them what does not belong to the model."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = list(load_file(folder / "model.safetensors").items())
    half, weight_map = len(tensors) // 2, {}
    for file, part in zip(files, (tensors[:half], tensors[half:])):
        save_file(dict(part), to / file, metadata)
        weight_map |= dict.fromkeys(dict(part), file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for other in ("adapter_model", "model-00003-of-00003"):
        save_file({"weight": torch.zeros(1)}, to / f"{other}.safetensors")
    return to, files


def test_only_the_files_of_the_model_are_read(packed, tmp_path):
    expected = read_codings(str(packed), None, settings(packed))
    folder, _ = divided(packed, tmp_path / "divided")
    assert read_codings(str(folder), None, settings(folder)) == expected
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match="which is not in its folder"):
        read_codings(str(folder), None, settings(folder))


@pytest.mark.parametrize("number", [0, 1])
def test_files_with_other_settings_than_the_rest_are_refused(packed, tmp_path, number):
    folder, files = divided(packed, tmp_path / "divided")
    with safe_open(folder / files[number], framework="pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["hf_pcdvq"])
    record["settings"]["hadamard_seed"] = 5
    save_file(load_file(folder / files[number]), folder / files[number], {"hf_pcdvq": json.dumps(record)})
    with pytest.raises(ValueError, match="is of another model than the files before it"):
        read_codings(str(folder), None, settings(folder))


def test_another_codebook_than_the_installed_one_is_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    folder = rewritten(
        tmp_path / "packed", tmp_path / "changed", lambda record: record["settings"].update(codebook_sha256="0")
    )
    with pytest.raises(ValueError, match="the installed one has"):
        read_codings(str(folder), None, {**settings(folder), "codebook_sha256": "0"})
    folder = rewritten(
        tmp_path / "packed",
        tmp_path / "unnamed",
        lambda record: record["settings"].update(codebook=["a"], codebook_sha256="0"),
    )
    with pytest.raises(ValueError, match=r"name no codebook, but \['a'\]"):
        read_codings(str(folder), None, {**settings(folder), "codebook": ["a"], "codebook_sha256": "0"})
