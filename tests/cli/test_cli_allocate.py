"""`hf-pcdvq allocate`, and `quantize` with bits by layer."""

import json

import pytest
from command_line import fail, succeed

from hf_pcdvq.files.size import count_folder

SMALL = ("--samples", "12", "--length", "32")
TARGET = ("--bits", "auto", "--target-bits", "2.35", "--setting", "pcdvq-2.0")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{number} of many small words" for number in range(150)))
    return file


def test_allocate_then_quantize_is_what_quantize_does(tiny_model_dir, text, tmp_path):
    common = ("--dataset", text, *SMALL)
    bits = tmp_path / "bits"
    shown = succeed("allocate", tiny_model_dir, "--out", bits, *TARGET, *common).output
    found = json.loads((bits / "allocation.json").read_text())
    assert "self_attn.k_proj + self_attn.v_proj" in shown and f"Kept: {found['kept']}, because" in shown
    assert not (bits / ".parts").exists()
    fail(1, "allocation.json exists", "allocate", tiny_model_dir, "--out", bits, *TARGET, *common)

    by_hand, at_once = tmp_path / "by_hand", tmp_path / "at_once"
    allocated = ("--allocation", bits / "allocation.json", *common)
    parts = succeed("quantize", tiny_model_dir, "--out", by_hand, *allocated)
    whole = succeed("quantize", tiny_model_dir, "--out", at_once, *TARGET, *common)
    assert 'loaded into memory whole: bits="auto" measures' in whole.stderr and "whole" not in parts.stderr
    assert "Kept: " in whole.output and (at_once / "allocation.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "bits", "by_hand", "at_once"}
    counted = [count_folder(folder) for folder in (by_hand, at_once)]
    assert all(2.24 < count.bits_per_packed_weight <= 2.35 for count in counted)
    assert "other settings for some layers" in succeed("inspect", at_once).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "auto"), "needs one of --target-bits and --target-size"),
        (("--target-bits", "2.3"), "needs one of --target-bits and --target-size"),
        (("--bits", "auto", "--target-bits", "2.3", "--target-size", "1GB"), "needs one of"),
        (("--bits", "auto", "--target-bits", "2.3", "--no-calibration"), "leave out --no-calibration"),
        (("--bits", "auto", "--target-size", "big"), "target_size must be a number of bytes"),
        (("--bits", "auto", "--target-bits", "2.3", "--setting", "ccq-2.5"), 'rates of layout "stream"'),
    ],
)
def test_wrong_usage(tiny_model_dir, tmp_path, arguments, message):
    fail(2, message, "quantize", tiny_model_dir, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_target_out_of_range_says_the_range(tiny_model_dir, text, tmp_path):
    arguments = ("--bits", "auto", "--target-bits", "1.5", "--dataset", text, *SMALL)
    result = fail(
        1, "target_bits 1.5 is out of range", "allocate", tiny_model_dir, "--out", tmp_path / "bits", *arguments
    )
    assert "can take 2.2333 to 8.2333 bits" in result.stderr
