"""`hf-pcdvq eval` and `hf-pcdvq compare` as a user sees them."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import matplotlib.image
import pytest
import torch
from command_line import fail, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.evaluation import tasks as benchmarks
from hf_pcdvq.evaluation.comparison import Point, plot_quality
from hf_pcdvq.evaluation.metrics import evaluate, token_windows
from hf_pcdvq.evaluation.record import TaskScore, hash_tokens, read_record
from hf_pcdvq.files.size import count_folder

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install lm-eval")
TASKS = Path(__file__).parents[2] / "benchmarks" / "eval_tasks"


@pytest.fixture(scope="module")
def packed_once(tiny_model_dir, tmp_path_factory):
    """Folders of the tiny model at 2.25 and 2.0 bits. Shared: do not modify them."""
    parent = tmp_path_factory.mktemp("packed")
    for bits in (2.25, 2.0):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig(bits=bits))
        model.save_pretrained(parent / f"tiny-{bits}")
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(parent / f"tiny-{bits}")
    return parent


@pytest.fixture
def packed(packed_once, tmp_path):
    """The 2.25-bit folder, which the test may write to."""
    return shutil.copytree(packed_once / "tiny-2.25", tmp_path / "tiny-2.25")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"a line\r\nanother line\r\n" * 20)  # 440 bytes and tokens, if line endings are preserved
    return file


# ----------------------------------------------------------------------------------------------------------------- eval


def test_record_holds_the_figures_of_the_library(tiny_model_dir, packed, text):
    options = ["--text", text, "--context", 40, "--noise-floor", "float32"]
    shown = " ".join(succeed("eval", tiny_model_dir, packed, *options).stdout.split())
    record = json.loads((packed / "evaluation.json").read_text())
    windows = token_windows(AutoTokenizer.from_pretrained(tiny_model_dir), text.read_bytes().decode(), 40)
    original, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model_dir, packed))
    expected = evaluate(original, model, windows, progress=False).to_dict()
    assert record["metrics"] == pytest.approx(expected)
    assert record["metrics"]["kl_mean"] > 0.001
    floor = evaluate(original, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), windows)
    assert record["noise_floor"] == {"dtype": "float32", "metrics": pytest.approx(floor.to_dict())}
    assert 0 < floor.kl_mean < 0.1 * expected["kl_mean"]
    count = count_folder(packed)
    assert record["bits_per_packed_weight"] == count.bits_per_packed_weight
    assert record["bits_per_parameter"] == count.bits_per_parameter
    assert record["format"] == 1
    assert (record["original"], record["packed"], record["text"]) == ("model", "tiny-2.25", "text.txt")
    assert record["tasks"] is None
    assert record["command"].startswith("hf-pcdvq eval model tiny-2.25 --text text.txt ")
    assert f"{expected['kl_mean']:.5f} nats" in shown
    assert "11 windows of 40 tokens, 429 predictions" in shown

    page = (packed / "evaluation.md").read_text()
    row = next(line for line in page.splitlines() if "KL(original" in line)
    assert row == (
        f"| KL(original \\|\\| packed), mean |  | {expected['kl_mean']:.5f} nats | {floor.kl_mean:.5f} nats |"
    )
    assert AutoModelForCausalLM.from_pretrained(packed) is not None  # the records do not interfere


def test_model_against_itself(tiny_model_dir, text, tmp_path):
    out = tmp_path / "deep" / "out"
    options = ["--text", text, "--context", 40, "--windows", 2, "--out", out]
    shown = succeed("eval", tiny_model_dir, tiny_model_dir, *options).stdout
    assert "0.00000 nats" in shown
    assert "100.00 %" in shown
    assert "2 windows" in shown
    record = read_record(out)
    assert record.bits_per_packed_weight is None
    assert not (tiny_model_dir / "evaluation.json").exists()


def test_without_a_text_it_is_wikitext2_from_the_hub(tiny_model_dir, packed, monkeypatch):
    import datasets

    def load(name, configuration, split):
        assert (name, configuration, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return {"text": ["", " = Title = \n", " A sentence . \n" * 30]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    succeed("eval", tiny_model_dir, packed, "--context", 40)
    record = read_record(packed)
    joined = "\n\n = Title = \n\n\n" + " A sentence . \n" * 30
    windows = token_windows(AutoTokenizer.from_pretrained(tiny_model_dir), joined, 40)
    assert record.tokens == hash_tokens(windows)
    assert record.text == benchmarks.WIKITEXT2


def test_hub_out_of_reach_is_said_with_a_way_out(tiny_model_dir, packed, monkeypatch):
    import datasets

    def load(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fail(
        1,
        "could not be downloaded from the Hub (no route to host); pass a text file with --text",
        "eval",
        packed,
        packed,
    )


def test_it_refuses_before_it_has_computed_anything(tiny_model_dir, packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pcdvq.evaluation.metrics.evaluate", None)  # calling it would raise a different error
    models = [tiny_model_dir, packed, "--text", text]
    fail(1, "440 tokens, fewer than the 1024 of one window", "eval", *models)
    fail(1, f"{text} is a file", "eval", *models, "--out", text / "deep")
    fail(2, "does not exist", "eval", tiny_model_dir, packed, "--text", tmp_path / "none.txt")
    fail(2, "--context", "eval", *models, "--context", 1)
    fail(1, "the original is in bfloat16 itself", "eval", *models, "--context", 40, "--noise-floor", "bfloat16")
    fail(2, "--limit need --tasks", "eval", *models, "--limit", 3)
    assert not list(packed.glob("evaluation.*"))


def test_earlier_record_is_not_lost(tiny_model_dir, packed, text):
    options = ["--text", text, "--context", 40, "--windows", 1]
    succeed("eval", tiny_model_dir, packed, *options)
    before = (packed / "evaluation.json").read_bytes()
    fail(1, "has an evaluation.json already", "eval", tiny_model_dir, packed, *options, "--windows", 2)
    assert (packed / "evaluation.json").read_bytes() == before
    succeed("eval", tiny_model_dir, packed, *options, "--windows", 2, "--force")
    assert read_record(packed).metrics.windows == 2


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.fixture
def task_dir(tmp_path, monkeypatch):
    """A task of 24 questions in lm-eval's format, with its data. No others are loaded: that takes 8 seconds."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", partial(lm_eval_tasks.TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"query": f"Question: what follows {letter}?", "choices": [letter.upper(), "Z"], "gold": 0}
        for letter in "abcdefghijklmnopqrstuvwx"
    ]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, questions)))
    shared = (TASKS / "local_piqa.yaml").read_text()
    (folder / "letters.yaml").write_text(shared.replace("piqa", "letters"))
    source = (TASKS / "local_data.py").read_text()
    lines = [f"FOLDER = Path({str(folder)!r})" if line.startswith("FOLDER") else line for line in source.splitlines()]
    (folder / "local_data.py").write_text("\n".join(lines))
    return folder


def accuracy(folder, questions):
    """Computed by hand: the fraction of questions for which the right answer is likelier than the wrong one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(context, answer):
        context, answer = (tokenizer(part, add_special_tokens=False).input_ids for part in (context, " " + answer))
        ids = torch.tensor([[tokenizer.bos_token_id, *context, *answer]])
        with torch.inference_mode():
            log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
        return log_p.gather(1, ids[0, 1:, None])[-len(answer) :].sum()

    right = [
        likelihood(question["query"] + "\nAnswer:", question["choices"][0])
        > likelihood(question["query"] + "\nAnswer:", question["choices"][1])
        for question in questions
    ]
    return sum(map(bool, right)) / len(right)


@needs_lm_eval
def test_tasks_score_both_models_as_by_hand(tiny_model_dir, packed, text, task_dir, exact_products):
    options = ["--text", text, "--context", 40, "--tasks", "local_letters", "--task-dir", task_dir, "--limit", 20]
    shown = succeed("eval", tiny_model_dir, packed, *options).stdout
    record = read_record(packed)
    scores = {score.metric: score for score in record.tasks}
    assert set(scores) == {"acc", "acc_norm"}
    score = scores["acc"]
    questions = [json.loads(line) for line in (task_dir / "letters.jsonl").read_text().splitlines()][:20]
    assert (score.task, score.samples) == ("local_letters", 20)
    assert score.original == pytest.approx(accuracy(tiny_model_dir, questions))
    assert score.packed == pytest.approx(accuracy(packed, questions))
    assert score.original != score.packed  # otherwise a mix-up would go unnoticed
    # standard error of a mean of zeros and ones, with Bessel's correction
    assert score.original_stderr == pytest.approx((score.original * (1 - score.original) / 19) ** 0.5)
    assert f"{score.original:.4f} ± {score.original_stderr:.4f}" in shown
    assert "lm_eval" in record.versions
    assert f"| local_letters | acc | {score.original:.4f} ±" in (packed / "evaluation.md").read_text()


@needs_lm_eval
def test_what_was_measured_is_kept_when_a_task_fails(tiny_model_dir, packed, text, task_dir):
    (task_dir / "letters.jsonl").unlink()
    options = ["--text", text, "--context", 40, "--tasks", "local_letters", "--task-dir", task_dir]
    done = fail(1, "letters.jsonl", "eval", tiny_model_dir, packed, *options)
    record = read_record(packed)
    assert record.metrics.kl_mean > 0.001 and record.tasks is None
    assert f"{record.metrics.kl_mean:.5f} nats" in done.stdout
    assert "Saved evaluation.json" in done.stderr


@needs_lm_eval
def test_unknown_task_is_named_before_anything_is_computed(tiny_model_dir, packed, text):
    options = ["--text", text, "--context", 40, "--tasks", "arc_easy,no_such_task"]
    fail(1, "lm-eval knows no task no_such_task;", "eval", tiny_model_dir, packed, *options)


@needs_lm_eval
def test_lm_evals_own_command_scores_packed_models(packed, task_dir, tmp_path, exact_products, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # put back afterwards
    options = ["--model", "hf", "--model_args", f"pretrained={packed}", "--device", "cpu", "--limit", 20]
    options += ["--tasks", "local_letters", "--include_path", task_dir, "--output_path", tmp_path / "scores"]
    succeed("lm-eval", "run", *options)
    (report,) = (tmp_path / "scores").rglob("results*.json")
    questions = [json.loads(line) for line in (task_dir / "letters.jsonl").read_text().splitlines()][:20]
    found = json.loads(report.read_text())["results"]["local_letters"]["acc,none"]
    assert found == pytest.approx(accuracy(packed, questions))


# -------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def records(tiny_model_dir, packed_once, tmp_path_factory):
    """Records of both packed folders, with made-up scores for a task."""
    parent = tmp_path_factory.mktemp("records")
    file = parent / "text.txt"
    file.write_bytes(b"a line\r\nanother line\r\n" * 20)
    for bits in (2.25, 2.0):
        out = parent / f"record-{bits}"
        model = packed_once / f"tiny-{bits}"
        succeed("eval", tiny_model_dir, model, "--text", file, "--context", 40, "--out", out)
        record = read_record(out)
        score = TaskScore("some_task", "acc", 0.75, 0.125, bits / 4, 0.125, 12)
        replace(record, tasks=[score]).write(out)
    return parent


def test_one_table_and_one_plot(records, tmp_path):
    folders = [records / "record-2.25", records / "record-2.0" / "evaluation.json"]
    shown = " ".join(succeed("compare", *folders, "--out", tmp_path / "out").stdout.split())
    page = (tmp_path / "out" / "comparison.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| tiny-")]
    assert [row.split(" | ")[0] for row in rows] == ["| tiny-2.0", "| tiny-2.25"]  # by bits
    for row, bits in zip(rows, (2.0, 2.25)):
        record = read_record(records / f"record-{bits}")
        assert f"| {record.bits_per_packed_weight:.3f} | {record.metrics.perplexity_packed:,.2f} |" in row
        assert f"{record.metrics.kl_mean:.3f}" in shown
    assert f"| {record.metrics.perplexity_original:,.2f} |" in page.split("| original: ")[1]
    assert "| some_task | acc | 0.7500 | 0.5625 | 0.5000 |" in page
    image = matplotlib.image.imread(tmp_path / "out" / "comparison.png")
    assert image.shape[0] > 500
    assert "](comparison.png)" in page


def test_models_of_one_folder_name_are_told_apart(records, tmp_path):
    again = shutil.copytree(records / "record-2.0", tmp_path / "again")
    succeed("compare", records / "record-2.0", again, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert f"| {records / 'record-2.0'} |" in page
    assert f"| {again} |" in page


def test_model_without_counted_bits_is_in_the_table_and_not_in_the_plot(records, tmp_path):
    replace(read_record(records / "record-2.0"), bits_per_packed_weight=None, packed="other").write(tmp_path)
    result = succeed("compare", records / "record-2.25", tmp_path, "--out", tmp_path / "out")
    assert "not in the plot, because their bits were not counted: other" in result.stderr
    assert "| other | not counted |" in (tmp_path / "out" / "comparison.md").read_text()
    succeed("compare", tmp_path, "--out", tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["comparison.md"]


def test_records_of_different_windows_are_not_compared(tiny_model_dir, packed, records, text, tmp_path):
    succeed("eval", tiny_model_dir, packed, "--text", text, "--context", 50)
    out = tmp_path / "out"
    fail(1, "were measured on different tokens", "compare", records / "record-2.0", packed, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected a record of format 1, found format 2"),
        ({"metrics": {"kl_mean": 1}}, "the record is incomplete"),
        (None, "Expecting value"),
    ],
)
def test_files_that_are_no_records_are_named(records, tmp_path, change, message):
    content = json.loads((records / "record-2.0" / "evaluation.json").read_text())
    (tmp_path / "broken.json").write_text("not JSON" if change is None else json.dumps({**content, **change}))
    fail(1, f"broken.json: {message}", "compare", tmp_path / "broken.json", "--out", tmp_path / "out")
    fail(1, "`hf-pcdvq eval` writes it", "compare", tmp_path, "--out", tmp_path / "out")


def plotted(points, tmp_path, monkeypatch):
    """The figure that `plot_quality` would save."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_quality(points, {"original": 25.0}, "title", tmp_path / "plot.png")
    figures[0].canvas.draw()
    return figures[0]


def test_a_useless_model_leaves_the_others_the_room_of_the_plot(tmp_path, monkeypatch):
    good, bad = Point("good", 2.0, 30, 0.5, 1, 0.6), Point("bad", 2.1, 3_745_297.7, 12, 20, 0.0)
    divergence, perplexity = plotted([good, bad], tmp_path, monkeypatch).axes
    assert perplexity.get_ylim()[1] < 500 and divergence.get_ylim()[1] > 12
    assert [text.get_text() for text in perplexity.texts] == ["good", "bad: 3,745,298"]
    assert [text.get_text() for text in divergence.texts] == ["good", "bad"]


def test_colours_of_the_plot_are_those_of_series_and_markers_those_of_groups(tmp_path, monkeypatch):
    points = [
        Point(f"{series} {group}", 2.0 + 0.1 * number, 30 + number, 0.5, 1, 0.6, series, group)
        for number, (series, group) in enumerate([("calibrated", "a"), ("data-free", "a"), ("calibrated", "b")])
    ]
    axes = plotted(points, tmp_path, monkeypatch).axes[1]
    lines = {line.get_label(): line for line in axes.lines}
    first, second, third = (lines[label] for label in ("a: calibrated", "a: data-free", "b: calibrated"))
    assert first.get_color() == third.get_color() != second.get_color()
    assert first.get_marker() == second.get_marker() != third.get_marker()


def test_labels_of_the_plot_lie_neither_on_one_another_nor_on_points(tmp_path, monkeypatch):
    from matplotlib.text import Text

    points = [Point(f"a model with a name {number}", 2.0 + 0.01 * number, 30, 0.5, 1, 0.6) for number in range(6)]
    figure = plotted(points, tmp_path, monkeypatch)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        # extent of the text alone; that of an annotation includes the line to its point
        boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
        dots = axes.transData.transform(axes.lines[0].get_xydata())
        assert len(boxes) == len(points) == len(dots)
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])
            assert not any(box.contains(*dot) for dot in dots)
            assert axes.bbox.x1 >= box.x1 and axes.bbox.y1 >= box.y1
