"""What a downloaded folder holds does not steer the terminal, and SIGTERM leaves nothing behind."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from command_line import run, succeed
from foreign_files import without_record

from hf_pcdvq_cli import main

ESCAPE = "\x1b]0;owned\x07\x1b[2J[link=https://evil.example]here[/link]"


@pytest.fixture(scope="module")
def packed_once(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "packed"
    succeed("quantize", "--no-calibration", tiny_model_dir, "--out", folder)
    return folder


@pytest.fixture
def hostile(packed_once, tmp_path):
    """A packed model whose config holds terminal escapes."""
    folder = shutil.copytree(packed_once, tmp_path / "packed")
    without_record(folder)  # with it, another config would be refused
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["left_unpacked"] = {ESCAPE: ESCAPE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_tensor(folder, name):
    """Add an empty tensor to the header of `model.safetensors`."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    raw = json.dumps({**header, name: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}}).encode()
    raw += b" " * (-len(raw) % 8)
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def test_tables_show_escapes_and_markup_as_text(hostile):
    shown = succeed("inspect", hostile).stdout
    assert "\x1b" not in shown and "\x07" not in shown
    assert r"\x1b]0;owned" in "".join(shown.split())
    assert "[/link]" in shown


def test_errors_show_escapes_as_text(hostile):
    add_tensor(hostile, f"model.{ESCAPE}.weight")
    result = run("check", hostile)
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr and r"model.\x1b]0;owned\x07" in result.stderr
    config = json.loads((hostile / "config.json").read_text())
    config["quantization_config"]["quant_method"] = ESCAPE
    (hostile / "config.json").write_text(json.dumps(config))
    for command in (["inspect"], ["quantize", "--no-calibration", "--out", str(hostile) + "-again"]):
        result = run(*command, hostile)
        assert result.exit_code == 1 and "\x1b" not in result.output, result.output


def test_names_of_files_are_shown_as_text(packed_once, tmp_path):
    folder = shutil.copytree(packed_once, tmp_path / "packed")
    (folder / "a\x1b[2Jb.txt").write_text("x")
    result = CliRunner().invoke(main, ["push", str(folder), "me/tiny", "--dry-run"])
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert r"Left out: a\x1b[2Jb.txt" in result.stderr


def test_sigterm_ends_a_command_like_an_error(tiny_model_dir, tmp_path):
    """The folder that the result is written to first is deleted."""
    program = (
        "import time\n"
        "from transformers import PreTrainedModel\n"
        "def save(model, folder, **options):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(60)\n"
        "PreTrainedModel.save_pretrained = save\n"
        "from hf_pcdvq_cli import main\n"
        "main(prog_name='hf-pcdvq')\n"
    )
    arguments = ["quantize", "--no-calibration", str(tiny_model_dir), "--out", str(tmp_path / "packed")]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    # The folder and its lock, the folder of finished blocks, and that for activations.
    assert {path.name[:8] for path in tmp_path.iterdir()} == {".packed.", ".hf_pcdv"}
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
