"""`optimum-cli pcdvq` is the command line `hf-pcdvq`."""

import json
import subprocess
import sys

from command_line import succeed

OPTIMUM = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]


def optimum(*arguments):
    return subprocess.run([*OPTIMUM, *map(str, arguments)], capture_output=True, text=True)


def test_optimum_cli_quantizes(tiny_model_dir, tmp_path):
    options = ["--no-calibration", "--setting", "pcdvq-2.0"]
    done = optimum("pcdvq", "quantize", tiny_model_dir, "--out", tmp_path / "packed", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(succeed("inspect", tmp_path / "packed", "--json").stdout)
    assert found["quantization_config"]["bits"] == 2.0


def test_options_and_exit_codes_are_ours(tmp_path):
    listed = optimum("--help")
    assert "pcdvq" in listed.stdout
    assert "--no-calibration" in optimum("pcdvq", "quantize", "--help").stdout
    assert optimum("pcdvq", "quantize", tmp_path).returncode == 2  # no --out
    wrong = optimum("pcdvq", "quantize", tmp_path / "nothing", "--out", tmp_path / "packed")
    assert wrong.returncode == 1 and wrong.stderr.startswith("Error: folder ")


def test_its_start_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load\n"
        "before = set(sys.modules)\n"
        "assert [command.COMMAND.name for command, _ in load()].count('pcdvq') == 1\n"
        "print({'click', 'hf_pcdvq', 'hf_pcdvq_cli', 'torch', 'transformers'} & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
