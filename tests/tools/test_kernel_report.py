"""The report on compiled kernels, for two small ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = Path(__file__).resolve().parents[2] / "tools/kernel_report.py"


def run(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_table_and_file_hold_the_same_figures(tmp_path):
    file = tmp_path / "report.json"
    done = run("--kernel", "rotation", "--kernel", "ccq-2.5, 1 t", "--target", "sm_90", "--json", file, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    names = ["ccq-2.5, 1 tokens", "ccq-2.5, 1 tokens of experts", "rotation"]
    assert [(row["kernel"], row["target"]) for row in rows] == [(name, "sm_90") for name in names]
    product, _, rotation = rows
    # test_compiled.py limits the product to 3.5; if the loop were not found, the count would be near zero.
    assert 2 < product["instructions"] < 3.5 and rotation["instructions"] is None
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 for row in rows)
    assert f"{product['instructions']:.2f}" in done.stdout and "sm_90" in done.stdout
    # 67 million weights of 2.5 bits and some are read in 6 us, and three instructions for each are issued in as many.
    assert 5 < product["least_microseconds"] < 8 and product["bound"] in ("instructions", "memory")
    assert product["most_times_bf16"] == pytest.approx(40.1 / product["least_microseconds"], rel=0.01)
    assert "bound" not in rotation
    assert [file] == list(tmp_path.iterdir())


def test_wrong_names_are_refused_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kernel_report

    monkeypatch.setattr(kernel_report.compiled, "measure_all", None)  # calling it would raise a different error
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--kernel", "qtip"])
    with pytest.raises(SystemExit, match=r"no kernel has a name like \['qtip'\]; there are: pcdvq-2.0, 1 tokens;"):
        kernel_report.main()
    options = ["--kernel", "rotation", "--json", str(tmp_path / "none/report.json")]
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", *options])
    with pytest.raises(SystemExit) as refused:
        kernel_report.main()
    assert refused.value.code == 2 and "there is no folder" in capsys.readouterr().err
