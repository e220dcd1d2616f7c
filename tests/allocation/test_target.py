"""`bits="auto"` in a config: what is refused, and what it becomes."""

import json

import pytest

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.allocation.target import Target


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("1.2GB", 1_200_000_000), ("900 MiB", 900 << 20), ("64kb", 64_000), (12345, 12345), ("77B", 77)],
)
def test_sizes(size, nbytes):
    assert Target.of(None, size).size == nbytes


@pytest.mark.parametrize("config", [PcdvqConfig, lambda **fields: CcqConfig(layout="stream", **fields)])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "auto"}, 'bits="auto" needs target_bits or target_size'),
        ({"target_bits": 2.3}, 'they need bits="auto"'),
        ({"bits": "auto", "target_bits": 2.3, "target_size": "1GB"}, "not both"),
        ({"bits": "auto", "target_bits": -1}, "positive number of bits per weight, got -1"),
        ({"bits": "auto", "target_bits": "2.3"}, "positive number of bits per weight, got '2.3'"),
        ({"bits": "auto", "target_size": "1.2 gigabytes"}, 'like "1.2GB" or "900MiB", got \'1.2 gigabytes\''),
        ({"bits": "auto", "target_size": True}, "got True"),
        ({"bits": "most", "target_bits": 2.3}, "got bits 'most'"),
    ],
)
def test_refused(config, fields, message):
    with pytest.raises(ValueError, match="Config: ") as caught:
        config(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("fields", [{"layout": "2.5"}, {"layout": "stream", "hadamard": False}])
def test_only_rotated_streams_have_rates(fields):
    with pytest.raises(ValueError, match='rates of layout "stream"'):
        CcqConfig(**fields, bits="auto", target_bits=2.3)


def test_a_codebook_is_for_one_number_of_bits():
    with pytest.raises(ValueError, match="is for one number of bits"):
        PcdvqConfig(bits="auto", target_bits=2.1, codebook="pcdvq-a14-v1")


@pytest.mark.parametrize(
    "config",
    [
        PcdvqConfig(bits="auto", target_bits=2.1, magnitude="projection", hadamard_seed=3, calibration="text.txt"),
        CcqConfig(layout="stream", bits="auto", target_size="1GB", window_bits=13, overrides={"o_proj": "int8"}),
    ],
)
def test_round_trip_and_settling(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again.target == config.target

    setting = list({"pcdvq": {"pcdvq-2.25"}, "ccq": {"stream-2.5"}}[config.method])[0]
    settled = config.settled(setting, {"q_proj": setting, "k_proj": "int8"})
    assert settled.target is None and settled.bits == float(setting.rpartition("-")[2])
    # Details are those of the whole config, at every rate.
    assert settled.codec_of("q_proj") == settled.codec_of("other") == settled.codec
    assert settled.codec.details() == config.codec.details()
    assert settled.hadamard_seed == config.hadamard_seed and settled.calibration == config.calibration
    saved = json.loads(json.dumps(settled.to_dict()))
    assert not {"target_bits", "target_size"} & saved.keys()
    assert type(config).from_dict(saved).to_dict() == settled.to_dict()
