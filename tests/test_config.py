"""The configs: what they accept, what they reject and how, and that they survive a JSON round trip."""

import json

import pytest

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig
from hf_pcdvq.codecs import SETTINGS
from hf_pcdvq.codecs.stream import StreamCodec


@pytest.mark.parametrize("bits", [2.0, 2.25, 2])
def test_pcdvq_survives_json(bits):
    config = PcdvqConfig(bits=bits, magnitude="projection", modules_to_not_convert=["mlp"], hadamard_seed=7)
    again = PcdvqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.codec == config.codec
    assert again.codec.bits == bits and again.codec.seed == 7 and again.codec.magnitude == "projection"


@pytest.mark.parametrize("layout", ["2.75", "2.5", "2.0625"])
@pytest.mark.parametrize("hadamard", [False, True])
def test_ccq_survives_json(layout, hadamard):
    config = CcqConfig(layout=layout, hadamard=hadamard)
    again = CcqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.codec.layout == layout and bool(again.codec.max_block) == hadamard


@pytest.mark.parametrize("bits, window_bits", [(2, 12), (2.25, 16), (2.5, 13)])
def test_stream_survives_json(bits, window_bits):
    config = CcqConfig(layout="stream", bits=bits, window_bits=float(window_bits))
    again = CcqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.codec.bits == bits and again.codec.window_bits == window_bits and again.codec.max_block == 128


def test_published_layouts_have_their_own_bits():
    assert CcqConfig(layout="2.75").bits == 2.75
    assert CcqConfig.from_dict({"layout": "2.0625", "quant_method": "ccq"}).codec.bits == 2.0625


REFUSED = [
    (PcdvqConfig, {"bits": 3}, r"bits must be one of 2.0, 2.25, got 3"),
    (PcdvqConfig, {"bits": "2.0"}, r"bits must be one of 2.0, 2.25, got '2.0'"),
    (PcdvqConfig, {"magnitude": "median"}, r"magnitude must be one of 'norm', 'projection', got 'median'"),
    (PcdvqConfig, {"codebook": "e8p"}, r"unknown codebook 'e8p'.* pcdvq-a14-v1"),
    (PcdvqConfig, {"bits": 2.0, "codebook": "pcdvq-a16-v1"}, r"'pcdvq-a16-v1' is for 2.25 bits, but bits is 2.0"),
    (
        PcdvqConfig,
        {"codebook": "../../x"},
        r"unknown codebook '../../x'; this version of hf_pcdvq_kernels ships pcdvq-a14-v1",
    ),
    (PcdvqConfig, {"codebook": ["pcdvq-a16-v1"]}, r"codebook must be the name of a codebook, got \['pcdvq-a16-v1'\]"),
    (PcdvqConfig, {"codebook_sha256": "0" * 64}, r"SHA-256 000.*would decode to different weights"),
    (CcqConfig, {"layout": "2"}, r"layout must be one of '2.75', '2.5', '2.0625', 'stream', got '2'"),
    (CcqConfig, {"layout": 2.5}, r"layout must be one of .*, got 2.5"),
    (CcqConfig, {"layout": "2.5", "bits": 3.0}, r"bits 3.0 needs layout 'stream', the layout is '2.5'"),
    (CcqConfig, {"layout": "2.5", "window_bits": 12}, r"window_bits 12 needs layout 'stream', the layout is '2.5'"),
    (CcqConfig, {"layout": "stream", "bits": 2.1}, r"bits must be one of 2.0, 2.25, 2.5, 3.0, 4.0, got 2.1"),
    (CcqConfig, {"layout": "stream", "window_bits": 17}, r"window_bits must be one of 12, 13, 14, 15, 16, got 17"),
    (CcqConfig, {"hadamard": 1}, r"hadamard must be one of False, True, got 1"),
    (CcqConfig, {"hadamard_block": 100}, r"hadamard_block must be a power of two from 8 to 1024, got 100"),
    (PcdvqConfig, {"hadamard_seed": -1}, r"hadamard_seed must be an integer from 0 .*, got -1"),
    (PcdvqConfig, {"hadamard_seed": True}, r"hadamard_seed must be an integer .*, got True"),
    (PcdvqConfig, {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert must be a list .*, got 'lm_head'"),
    (CcqConfig, {"modules_to_convert": [3]}, r"modules_to_convert must be a list .*, got \[3\]"),
    (CcqConfig, {"modules_to_convert": 3}, r"modules_to_convert must be a list .*, got 3"),
    (CcqConfig, {"hadamard_block": 128.0}, r"hadamard_block must be a power of two from 8 to 1024, got 128.0"),
    (CcqConfig, {"layout": "stream", "window_bits": [12]}, r"window_bits must be one of 12, .*, got \[12\]"),
    (CcqConfig, {"layout": "stream", "bits": {}}, r"bits must be one of 2.0, .*, got \{\}"),
    (CcqConfig, {"left_unpacked": ["x"]}, r"left_unpacked must map names of parameters to reasons, got \['x'\]"),
    (CcqConfig, {"overrides": [[1.5, "int8"]]}, r"overrides: 1.5 is not a text of up to 1000 characters"),
    (CcqConfig, {"overrides": 0}, r"overrides must map patterns to settings, got 0"),
    (CcqConfig, {"overrides": {"(" * 900: "int8"}}, r"overrides: .* is not a regular expression"),
    (CcqConfig, {"overrides": {"a" * 1001: "int8"}}, r"is not a text of up to 1000 characters"),
    (CcqConfig, {"dequantize": "yes"}, r"dequantize must be one of False, True, got 'yes'"),
    (CcqConfig, {"format_version": "1"}, r"format_version must be an integer .*, got '1'"),
    (CcqConfig, {"quant_method": "pcdvq"}, r"quant_method must be 'ccq', got 'pcdvq'"),
    (PcdvqConfig, {"bit": 2.0}, r"PcdvqConfig: unknown field 'bit'"),
    (PcdvqConfig, {"calibration": 3}, r"calibration must be a Calibration, a dictionary or a name, got 3"),
    (CcqConfig, {"calibration": {"sample": 3}}, r"calibration: unknown field 'sample'"),
    (Calibration, {"samples": 0}, r"samples must be an integer from 1 .*, got 0"),
    (Calibration, {"sweeps": 1.0}, r"sweeps must be an integer .*, got 1.0"),
    (Calibration, {"correction": 2}, r"correction must be a number from 0.0 to 1.0, got 2"),
    (Calibration, {"damp_percent": 0}, r"damp_percent must be a number .*, got 0"),
    (Calibration, {"desc_act": 1}, r"desc_act must be True or False, got 1"),
    (Calibration, {"dataset": ["text"]}, r"dataset must be a path, a name or None, got \['text'\]"),
]


@pytest.mark.parametrize("config, fields, message", REFUSED)
def test_bad_fields_are_refused_by_name(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_newer_format_is_refused_with_its_version():
    fields = {**CcqConfig().to_dict(), "format_version": 7, "trellis": "wide"}
    with pytest.raises(
        ValueError, match=r"format_version 7 is newer than 1.*fields unknown here: trellis.*pip install \./kernels"
    ):
        CcqConfig.from_dict(fields)
    with pytest.raises(ValueError, match="format_version 7 is newer"):
        CcqConfig(format_version=7)


def test_calibration_may_be_its_dataset_its_fields_or_an_object_and_survives_json():
    expected = Calibration(dataset="wiki.txt")
    for given in (expected, "wiki.txt", expected.to_dict(), {"dataset": "wiki.txt"}):
        config = PcdvqConfig(calibration=given, tokenizer=object())
        assert config.calibration == expected
        again = PcdvqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.calibration == expected
        assert again.tokenizer is None


def test_the_wish_to_dequantize_is_not_saved():
    assert "dequantize" not in PcdvqConfig(dequantize=True).to_dict()


def test_a_file_cannot_wish_to_dequantize():
    with pytest.raises(ValueError, match="dequantize is for callers and may not stand in config.json"):
        PcdvqConfig.from_dict({**PcdvqConfig().to_dict(), "dequantize": True})


def test_configs_do_not_share_lists():
    names = ["mlp"]
    config = PcdvqConfig(modules_to_not_convert=names)
    names.append("lm_head")
    assert config.modules_to_not_convert == ["mlp"]


def test_two_codecs_may_not_claim_the_same_format_of_a_method(monkeypatch):
    class Other(StreamCodec):
        pass

    monkeypatch.setitem(SETTINGS, "other-2.0", (Other, {"layout": "stream", "bits": 2.0}))
    with pytest.raises(ValueError, match="layout 'stream' is claimed by two codecs of 'ccq'"):
        CcqConfig(layout="stream")
