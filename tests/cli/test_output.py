"""What commands print where a program reads it: JSON, whole names, no progress bars."""

import json
import shutil
import subprocess
import sys

import pytest
from command_line import run, succeed

# Wider than the 80 columns that are assumed where there is no terminal.
LONG = "a_folder_whose_name_is_longer_than_the_line_of_a_terminal_that_is_eighty_characters_wide_or_so"


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / LONG
    succeed("quantize", tiny_model_dir, "--out", folder, "--no-calibration")
    return folder


def test_names_stay_on_one_line_where_there_is_no_terminal(packed):
    shown = succeed("inspect", packed).stdout
    assert str(packed) in shown
    assert "model.layers.*.self_attn.q_proj" in shown


@pytest.mark.parametrize("quiet", [False, True])
def test_no_progress_bars_where_there_is_no_terminal(tiny_model_dir, tmp_path, quiet):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()  # gives a note: the model is saved without tokenizer
    options = ["--no-calibration", *(["--quiet"] if quiet else [])]
    command = [sys.executable, "-m", "hf_pcdvq_cli", "quantize", "model", "--out", "packed", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "it/s]" not in done.stderr and "weight/s" not in done.stderr
    assert ("Warning: " in done.stderr) is not quiet
    assert "Saved in " in done.stdout


def test_figures_as_json(packed, tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the river rises in a mountain and falls slowly down to the sea. " * 40)
    again = ["--samples", 4, "--length", 32, "--dataset", text, "--setting", "pcdvq-2.0"]
    made = json.loads(succeed("quantize", tiny_model_dir, "--out", tmp_path / "again", *again, "--json").stdout)
    assert made["bits_per_packed_weight"] > 2 and made["comparison"]["kl_mean"] > 0
    measure = ["eval", tiny_model_dir, packed, "--text", text, "--context", 32, "--windows", 4, "--json"]
    evaluated = json.loads(succeed(*measure).stdout)
    compared = json.loads(succeed("compare", packed, "--out", tmp_path / "comparison", "--json").stdout)
    assert compared[LONG]["metrics"] == evaluated["metrics"]
    speed = json.loads(succeed("speed", packed, "--new-tokens", 2, "--json").stdout)
    assert speed["tokens_per_second"] > 0
    assert json.loads((packed / "speed.json").read_text())["tokens_per_second"] == speed["tokens_per_second"]
    checked, inspected = (json.loads(succeed(command, packed, "--json").stdout) for command in ("check", "inspect"))
    assert checked == inspected and len(checked["layers"]) > 0


@pytest.mark.parametrize("command", ["inspect", "check", "speed", "generate", "tune"])
def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(command):
    options = {"generate": ["--prompt", "a"], "tune": ["--device", "cuda"]}.get(command, [])
    result = run(command, "./no/such/folder", *options)
    assert result.exit_code == 1 and "folder ./no/such/folder does not exist" in result.stderr
