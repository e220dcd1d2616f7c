"""`hf-pcdvq allocate`, and `quantize` with bits by layer."""

import json

import pytest
from command_line import fail, succeed

from hf_pcdvq.allocation.report import Allocation, GroupBits, Measured
from hf_pcdvq.files.size import count_folder

SMALL = ("--samples", "12", "--length", "32")
TARGET = ("--bits", "auto", "--target-bits", "2.35", "--setting", "pcdvq-2.0")


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
    assert (by_hand / "allocation.json").read_bytes() == (bits / "allocation.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "bits", "by_hand", "at_once"}
    counted = [count_folder(folder) for folder in (by_hand, at_once)]
    assert all(2.24 < count.bits_per_packed_weight <= 2.35 for count in counted)
    assert "other settings for some layers" in succeed("inspect", at_once).output


def allocation_of(prefix, file, skip=(), setting="pcdvq-2.25"):
    """An allocation of bits to the layers of a tiny Llama, one a group, without those whose names end with `skip`."""
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    groups = [
        GroupBits(block, part, [f"{prefix}.{block}.{part}"], 1, 0.1, setting, setting, 1)
        for block in range(2)
        for part in parts
        if not part.endswith(tuple(skip))
    ]
    overrides = [[f"^{group.modules[0]}$".replace(".", r"\."), setting] for group in groups]
    same = Measured(1, 2.25, None)
    found = Allocation("2.3", 1, "pcdvq-2.0", overrides, groups, {}, same, same, "mixed", "so", 0.0)
    file.write_text(json.dumps(found.to_dict()))
    return file


@pytest.mark.parametrize("calibration", [("--no-calibration",), SMALL])
@pytest.mark.parametrize(
    ("prefix", "skip", "arguments", "message"),
    [
        ("gpt.layers", (), (), "gpt.layers.0.self_attn.q_proj, which is no layer to pack"),
        ("model.layers", ("up_proj",), (), "says nothing of model.layers.0.mlp.up_proj"),
        ("model.layers", (), ("--skip", "v_proj"), "self_attn.v_proj, which is no layer to pack"),
        ("model.layers", (), ("--override", "1.mlp.up_proj=int8"), "gives pcdvq-2.25 to model.layers.1.mlp.up_proj"),
    ],
)
def test_an_allocation_of_something_else_is_refused(
    tiny_model_dir, text, tmp_path, calibration, prefix, skip, arguments, message
):
    file = allocation_of(prefix, tmp_path / "allocation.json", skip)
    data = () if "--no-calibration" in calibration else ("--dataset", text)
    rest = ("--allocation", file, *calibration, *data, *arguments)
    fail(1, message, "quantize", tiny_model_dir, "--out", tmp_path / "out", *rest)
    assert not (tmp_path / "out").exists()


def test_an_allocation_made_with_skip_is_used_with_it(tiny_model_dir, tmp_path):
    file, out = allocation_of("model.layers", tmp_path / "allocation.json", ("up_proj",)), tmp_path / "out"
    rest = ("--allocation", file, "--no-calibration", "--skip", "up_proj")
    succeed("quantize", tiny_model_dir, "--out", out, *rest)
    assert json.loads((out / "allocation.json").read_text())["base"] == "pcdvq-2.0"
    unchanged = ("--allocation", file, "--setting", "pcdvq-2.25", "--force")
    fail(2, "leave out --setting", "quantize", tiny_model_dir, "--out", out, *unchanged)


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
