"""benchmarks/bench_kernels.py on tiny layers and the CPU: checks the contents of its file, not the speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
FORMATS = ["pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "stream-2.0"]


def rows_of(file):
    rows = json.loads(file.read_text())["rows"]
    return {(row["layer"], row["tokens"], row["weight"]): row for row in rows}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The file and the output of a complete run."""
    file = tmp_path_factory.mktemp("bench") / "cpu.json"
    command = [sys.executable, SCRIPTS / "bench_kernels.py", "--smoke", "--peers", "--out", file.parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


@pytest.fixture
def copied(smoke, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(smoke[0].read_text())
    return file


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules, with all timing stubbed out."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_kernels
    import bench_results

    monkeypatch.setattr(
        bench_kernels.timing, "seconds_per_call", lambda calls, device: calls[0]() is not None and 1.0
    )
    return bench_kernels, bench_results


@pytest.fixture
def main(modules, monkeypatch):
    """Runs the script with arguments, in this process."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *map(str, options)])
        modules[0].main()

    return call


def test_ratios_and_rates_are_quotients_of_the_times(smoke):
    file, output = smoke
    rows, copy_rate = rows_of(file), json.loads(file.read_text())["copy_rate"]
    wanted = {(name, tokens, w) for name in ("up", "down") for tokens in (1, 4) for w in ["bf16", *FORMATS]}
    assert set(rows) == wanted
    for (layer, tokens, _), row in rows.items():
        assert row["ratio"] == rows[layer, tokens, "bf16"]["seconds"] / row["seconds"] > 0
        assert row["bytes_per_second"] == row["nbytes"] / row["seconds"]
        assert row["copy_share"] == row["bytes_per_second"] / copy_rate
    assert rows["up", 1, "bf16"]["nbytes"] == 2 * 256 * 128
    assert (
        rows["up", 1, "pcdvq-2.0"]["nbytes"] == 256 * 128 // 4 + 4 * 256 + 128 * 8 + 4 * 4
    )  # codes, scales, codebook
    assert rows["down", 4, "stream-2.0"]["nbytes"] == 128 * 256 // 4 + 4 * 128

    def block(weight):
        return 2 * rows["up", 4, weight]["seconds"] + rows["down", 4, weight]["seconds"]

    (line,) = (line for line in output.splitlines() if line.startswith("ccq-2.5 "))
    assert line.split()[2] == f"{block('bf16') / block('ccq-2.5'):.2f}"


def test_nothing_is_measured_twice(copied, main, capsys):
    before = copied.read_text()
    main("--smoke", "--peers", "--out", copied)
    assert "0 layers and numbers of tokens to measure" in capsys.readouterr().out
    assert copied.read_text() == before


def test_a_group_that_lacks_a_row_is_measured_again_with_all_its_rows(copied, main, capsys):
    content = json.loads(copied.read_text())
    gone = ("down", 4, "ccq-2.5")
    content["rows"] = [row for row in content["rows"] if (row["layer"], row["tokens"], row["weight"]) != gone]
    copied.write_text(json.dumps(content))
    before = rows_of(copied)
    main("--smoke", "--peers", "--formats", "ccq-2.5", "--jobs", "1", "--out", copied)
    output = capsys.readouterr().out
    assert "1 layers and numbers of tokens to measure" in output and "compiled 1 of 1 products" in output
    after = rows_of(copied)
    assert set(after) == set(before) | {gone}
    changed = {key for key in after if before.get(key) != after[key]}
    assert changed == {("down", 4, weight) for weight in ["bf16", *FORMATS]}


def test_results_of_another_device_are_refused(copied, main):
    content = json.loads(copied.read_text())
    content["setup"]["device"] = "NVIDIA H200"
    copied.write_text(json.dumps(content))
    before = copied.read_text()
    with pytest.raises(
        SystemExit,
        match="results.json was measured with device NVIDIA H200, here cpu, and rows of both do not mix. Give another --out",
    ):
        main("--smoke", "--out", copied)
    assert copied.read_text() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"rows": []}', '{"format": 2}', '{"format": 1, "rows": [{"a": 1}]}']
)
def test_files_with_something_else_are_refused(content, modules, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="other.json does not hold results of bench_kernels.py"):
        modules[1].Results.read(file)


def test_plot_only_draws_and_measures_nothing(copied, smoke, main, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    before = copied.read_text()
    main("--plot-only", "--out", copied)
    output, picture = capsys.readouterr().out, copied.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG") and f"plot: {picture}" in output
    assert copied.read_text() == before
    assert output.split("\nplot: ")[0] in smoke[1]  # the same table


def test_a_missing_matplotlib_is_said(modules, copied, monkeypatch, capsys):
    bench_kernels, bench_results = modules
    monkeypatch.setattr(bench_kernels.importlib.util, "find_spec", lambda name: None)
    bench_kernels.show(bench_results.Results.read(copied), copied)
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not copied.with_suffix(".png").exists()


def test_needs_neither_transformers_nor_the_plugin():
    code = "import sys, bench_kernels; print({'transformers', 'hf_pcdvq', 'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_targets(modules):
    _, bench_results = modules
    results = bench_results.Results({"device": "test"}, 1.0)
    for layer in bench_results.LAYERS:
        if layer.model == "Llama-3-70B":
            slow = layer.name == "k/v"
            for weight, seconds in (("bf16", 4.0), ("ccq-2.5", 1.0), ("pcdvq-2.0", 5.0 if slow else 1.0)):
                results.rows.append(bench_results.Row(*layer, 1, weight, 1, seconds, 4.0 / seconds, 1.0, 1.0))
    # A block has 7 layers, 2 of them k/v: 28 seconds versus 7, and versus 5 + 10.
    lines = bench_results.target_lines(results).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["MISSED", "not", "met", "not", "MISSED", "not"]
    assert (
        "block of Llama-3-70B: 1.87, target 3.0" in lines[0] and "block of Llama-3-70B: 4.00, target 3.5" in lines[2]
    )
    assert "slowest is pcdvq-2.0, Llama-3-70B k/v, 1 tokens: 0.80, target 1.0" in lines[4]
    # If a layer is missing, the block is not reported.
    results.rows = [row for row in results.rows if row.layer != "down"]
    assert bench_results.target_lines(results).splitlines()[3].startswith("  not measured  ccq-2.5")


def test_an_interrupted_run_keeps_what_was_measured(modules, main, monkeypatch, tmp_path):
    bench_kernels, bench_results = modules
    measured = []

    def seconds_per_call(calls, device):
        measured.append(calls)
        if len(measured) > 4:  # the copy, a group of two products, and one of the next
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(bench_kernels.timing, "seconds_per_call", seconds_per_call)
    with pytest.raises(SystemExit, match="results.json keeps what was measured"):
        main("--smoke", "--peers", "--formats", "ccq-2.5", "--out", tmp_path / "results.json")
    rows = bench_results.Results.read(tmp_path / "results.json").rows
    assert [(row.tokens, row.weight) for row in rows] == [(1, "bf16"), (1, "ccq-2.5")]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_what_fails_is_noted_and_the_rest_is_measured(modules, main, monkeypatch, tmp_path):
    bench_kernels, bench_results = modules

    def absent(outputs, inputs, seed, device):
        raise ImportError("no module absent")

    def small(outputs, inputs, seed, device):
        if outputs > 128:
            raise RuntimeError("too large")
        return bench_kernels.dense(outputs, inputs, seed, device)

    monkeypatch.setattr(bench_kernels, "PEERS", {"absent": absent, "small": small})
    monkeypatch.setattr(bench_kernels, "random_packed", lambda *_: [torch.zeros(2)])
    with pytest.raises(SystemExit, match="4 products of ours failed"):
        main("--smoke", "--formats", "ccq-2.5", "--out", tmp_path / "results.json")
    results = bench_results.Results.read(tmp_path / "results.json")
    assert results.unavailable == {"absent": "ImportError: no module absent"}
    errors = {(row.layer, row.weight): row.error for row in results.rows if row.error}
    assert set(errors) == {("up", "ccq-2.5"), ("down", "ccq-2.5"), ("up", "small")}
    assert errors["up", "small"] == "RuntimeError: too large" and "ccq_matmul" in errors["up", "ccq-2.5"]
    assert {row.weight for row in results.rows if row.ratio == 1} == {"bf16", "small"}
    text = bench_results.table(results)
    assert "not measured: absent: ImportError: no module absent" in text
    assert "FAILED: small, ('smoke', 'up', 1): RuntimeError: too large" in text
