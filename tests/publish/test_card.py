"""The model card: its contents, their sources, and what it omits."""

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import moe_models
import pytest
from click.testing import CliRunner
from hf_pcdvq_kernels.cpu import library
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.evaluation.record import TaskScore, read_record
from hf_pcdvq.evaluation.speed import Speed
from hf_pcdvq.evaluation.tasks import WIKITEXT2
from hf_pcdvq.files.provenance import Provenance
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.publish.card import model_card, unmeasured_figures
from hf_pcdvq_cli import main

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"
EXAMPLES = Path(__file__).resolve().parents[2] / "model_cards/examples"


def written(folder, **options):
    """The card as sent to the Hub, read back."""
    return ModelCard(str(model_card(count_folder(folder), REPO, **options)))


def edit(folder, name, change):
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def test_the_card_of_a_mixture_attaches_adapters_beside_its_packed_experts(tmp_path):
    moe_models.model("mixtral").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    text = written(tmp_path / "packed").text
    assert 'LoraConfig(target_modules=["k_proj", "o_proj", "q_proj", "v_proj"], task_type="CAUSAL_LM")' in text


def test_metadata_are_what_the_hub_reads(packed):
    inherited = {"license": "other", "license_name": "tiny", "language": ["en", "de"]}
    Provenance("org/tiny", "abc123", "hf-pcdvq quantize org/tiny --out packed", {"torch": "2"}, inherited).write(
        packed
    )
    card = written(packed)
    data = card.data.to_dict()
    results = data.pop("model-index")[0]
    assert data == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_pcdvq", "pcdvq", "2-bit", "conversational"],
        **inherited,
    }
    metrics = json.loads((packed / "evaluation.json").read_text())["metrics"]
    assert results["name"] == "tiny-2bit"
    values = {(r["dataset"]["name"], m["type"]): m["value"] for r in results["results"] for m in r["metrics"]}
    assert values == pytest.approx(
        {
            ("river.txt", "perplexity"): metrics["perplexity_packed"],
            ("river.txt", "kl_divergence"): metrics["kl_mean"],
            ("river.txt", "accuracy"): metrics["top1_agreement"],
            ("piqa", "acc"): 0.65432,
        },
        abs=1e-5,
    )
    assert "hf-pcdvq quantize org/tiny --out packed" in card.text and "commit `abc123`" in card.text
    assert written(packed, base_model="org/x", metadata={"license": "mit"}).data.license == "mit"


def test_text_states_what_the_files_hold(packed):
    text = written(packed).text
    count, metrics = count_folder(packed), json.loads((packed / "evaluation.json").read_text())["metrics"]
    assert f"**{count.bits_per_packed_weight:.3f} bits per packed weight**" in text
    assert "| `model.layers.*.mlp.down_proj` | 2 | 128 x 192 | 2.417 | 14.5 KiB |" in text
    perplexities = f"{metrics['perplexity_original']:.3f} | {metrics['perplexity_packed']:.3f}"
    assert f"| perplexity at context 64 | {perplexities} |" in text
    assert f"{metrics['kl_mean']:.4f}" in text and f"{100 * metrics['top1_agreement']:.2f} %" in text
    assert "| piqa | acc | 0.7123 ± 0.0100 | 0.6543 | 200 | 91.9 % |" in text
    assert "noise floor: the original in float32, KL mean | | 0.000000 |" in text
    assert "in the same run, with lm-eval 0.4.99." in text
    assert f"| the same: median, 90 %, 99 % | | {metrics['kl_median']:.4f}, {metrics['kl_p90']:.4f}, " in text
    assert "Calibrated on 4 windows of 32 tokens of data given in Python, seed 0" in text
    assert "| `lm_head.weight` | in modules_to_not_convert |" in text
    assert "hf-pcdvq eval tiny packed --text texts/river.txt" in text


def test_speed_is_stated_once_it_was_measured(packed):
    assert "tokens per second" not in written(packed).text
    result = CliRunner().invoke(main, ["speed", str(packed), "--new-tokens", "4", "--device-map", "cpu"])
    assert result.exit_code == 0, result.output
    record = json.loads((packed / "speed.json").read_text())
    stated = f"{record['tokens_per_second']:.1f} tokens per second on {record['device']}"
    text = written(packed).text
    assert stated in result.stdout and f"{stated}: one sequence, 4 new tokens" in text
    ran = "cpu" if isinstance(library.load(), library.Library) else "reference"
    assert f"bfloat16, backend {ran}." in text  # what ran, not what was requested
    edit(packed, "speed.json", lambda record: record.update(tokens_per_second=0.0))
    with pytest.raises(ValueError, match="has no valid speed"):
        model_card(count_folder(packed), REPO)
    (packed / "speed.json").write_text("{")
    with pytest.raises(ValueError, match="speed.json: Expecting"):
        model_card(count_folder(packed), REPO)


def test_wikitext_and_large_figures_are_named_as_they_are(packed):
    """The name of `hf-pcdvq eval`'s default text is not a path, and a task's perplexity is not a percentage."""
    record = read_record(packed)
    task = TaskScore("lambada", "perplexity", 44.08, 8.4, 311.2, 74.4, 200, "EleutherAI/lambada_openai")
    replace(record, text=WIKITEXT2, tasks=[task]).write(packed)
    card = written(packed)
    assert f"| 8 windows of 64 tokens of {WIKITEXT2} | original | this model |" in card.text
    assert "| lambada | perplexity | 44.08 ± 8.40 | 311.20 ± 74.40 | 200 | 706.0 % |" in card.text
    first, *_, last = card.data.eval_results
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert (last.dataset_name, last.metric_value, last.dataset_args) == ("lambada", 311.2, {"samples": 200})
    assert (
        last.dataset_type == "EleutherAI/lambada_openai"
    )  # the Hub links it, which it does not do for a task's name


def test_what_was_not_measured_is_left_out(packed):
    full = written(packed)
    (packed / "evaluation.json").unlink()
    held_out = written(packed)
    assert "held out of the calibration data" in held_out.text
    assert "Zero-shot" not in held_out.text and "eval_results" not in held_out.data.to_dict()
    for file in packed.glob("quantization_report.*"):
        file.unlink()
    (packed / "chat_template.jinja").unlink()
    bare = written(packed)
    assert "## Quality" in full.text and "## Quality" not in bare.text
    assert "How much it differs has not been measured" in bare.text
    assert "apply_chat_template" not in bare.text and "conversational" not in bare.data.tags
    for text in (full.text, held_out.text, bare.text):
        assert not re.search(r"None|nan\b|undefined|\{\{|TODO|\n\n\n", text)
    assert "base_model" not in bare.data.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["metrics"].update(kl_mean=-1.0), "has metrics that no evaluation can return"),
        (lambda record: record["metrics"].update(predictions=5), "has metrics that no evaluation can return"),
        (
            lambda record: record["metrics"].update(perplexity_packed=float("nan")),
            "metrics that no evaluation can return",
        ),
        (lambda record: record["metrics"].pop("kl_p99"), "evaluation.json: the record is incomplete, .*kl_p99"),
        (lambda record: record.update(bits_per_packed_weight=4.0), "belongs to another model, of 4.000 bits"),
        (lambda record: record["tasks"][0].update(packed=float("nan")), "task 'piqa' has no finite results"),
        (lambda record: record.update(format=2), "evaluation.json: expected a record of format 1, found format 2"),
        (lambda record: record.pop("text"), "evaluation.json: the record is incomplete, it lacks text"),
    ],
)
def test_evaluation_that_cannot_be_of_this_model_is_refused(packed, change, message):
    edit(packed, "evaluation.json", change)
    with pytest.raises(ValueError, match=message):
        model_card(count_folder(packed), REPO)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(bits_per_packed_weight=2.0),
        lambda record: record["config"].update(hadamard_seed=7),
    ],
)
def test_report_that_is_not_of_this_model_is_refused(packed, change):
    edit(packed, "quantization_report.json", change)
    with pytest.raises(ValueError, match="belongs to another model"):
        model_card(count_folder(packed), REPO)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("Perplexity 12.36, or about 12.4, or 12.", []),
        ("Perplexity 12.35", ["12.35"]),
        ("It runs at 40 tok/s in 3 GiB", ["40 tok/s", "3 GiB"]),
        ("99 % of the original, 1,234.5 of them", ["99 %", "1,234.5"]),
        ("`pip install torch==2.13` for Llama-3.1-8B, arXiv:2506.05432, [1](https://x.y/1.2), since 2024", []),
        ("```\nanything 1.5\n```", []),
    ],
)
def test_figures_of_a_card_written_by_hand(text, unknown):
    generated = ModelCard("---\nlicense: mit\n---\nPerplexity 12.361 nats")
    assert unmeasured_figures(ModelCard(f"---\nlicense: mit\n---\n{text}"), generated) == unknown


def test_results_in_the_metadata_are_checked_too(packed):
    generated = model_card(count_folder(packed), REPO)
    own = ModelCard(str(generated))
    assert unmeasured_figures(own, generated) == []
    own.data.eval_results[0].metric_value = 1.01
    assert unmeasured_figures(own, generated) == ["1.01"]


TASK = asdict(TaskScore("piqa", "acc", 0.7, 0.01, 0.6, None, 200))
HOSTILE = "x` | </code><script>alert(1)</script> [a](https://evil.example)\n\n# heading\n```\n\x1b[31m"


def elements(card):
    """How often each element occurs in the HTML of a card."""
    rendered = MarkdownIt().enable("table").render(card.text)
    return Counter(re.findall(r"<(\w+)", rendered)), rendered


def test_strings_of_a_stranger_are_text_in_the_card(packed):
    """Every string that a downloaded folder can hold, against the same card with harmless ones."""

    def fill(text):
        def config(record):
            record["quantization_config"]["left_unpacked"] = {text: text}
            record["quantization_config"]["calibration"]["dataset"] = text

        def report(record):
            record["config"]["left_unpacked"] = {text: text}
            record["config"]["calibration"]["dataset"] = text
            record.update(device=text, versions={text: text})

        def evaluation(record):
            record.update(text=text, device=text, command=text, versions={"lm_eval": text})
            record["noise_floor"]["dtype"] = text
            record["tasks"][0].update(task=text, metric=text)

        edit(packed, "config.json", config)
        edit(packed, "quantization_report.json", report)
        edit(packed, "evaluation.json", evaluation)
        Speed(9.5, 4, 4, text, text, text, None, 1000).write(packed)
        Provenance("org/tiny", "abc", text, {text: text}, {"license": "mit"}).write(packed)
        return written(packed)

    expected, _ = elements(fill("harmless"))
    card = fill(HOSTILE)
    found, rendered = elements(card)
    assert found == expected
    assert "evil.example" in rendered and 'href="https://evil' not in rendered
    assert "\x1b" not in str(card)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("provenance.json", {"original": "](https://evil.example)"}, "original must be a name on the Hub"),
        ("provenance.json", {"revision": "`x`"}, "revision must be a name on the Hub"),
        ("provenance.json", {"command": 5}, "command must be a text of 1 to 10000 characters, got 5"),
        ("provenance.json", {"versions": {"torch": ["2"]}}, "versions.torch must be a text"),
        ("provenance.json", {"inherited": {"model-index": []}}, "inherited must be an object with license"),
        ("evaluation.json", {"device": "x" * 501}, "device must be a text of 1 to 500 characters"),
        ("evaluation.json", {"tasks": 5}, "the record is incomplete"),
        ("evaluation.json", {"tasks": [{**TASK, "dataset": "../x"}]}, "tasks.dataset must be a name on the Hub"),
        ("evaluation.json", {"tasks": [{**TASK, "samples": 2.5}]}, "tasks.samples must be a positive integer"),
        ("evaluation.json", {"bits_per_parameter": "2"}, "bits_per_parameter must be a number, got '2'"),
        ("quantization_report.json", {"windows": "4"}, "windows must be a positive integer, got '4'"),
        ("quantization_report.json", {"seconds": None}, "seconds must be a number"),
        ("quantization_report.json", {"comparison": {"kl_mean": 0.1}}, "the record is incomplete"),
        ("quantization_report.json", {"config": []}, "expected a report with the config"),
        ("speed.json", {"new_tokens": True}, "new_tokens must be a positive integer, got True"),
        ("speed.json", {"backend": ""}, "backend must be a text"),
    ],
)
def test_fields_of_records_are_bounded_and_named(packed, name, change, message):
    Speed(9.5, 4, 4, "a CPU", "float32", "reference", None, None).write(packed)
    Provenance().write(packed)
    edit(packed, name, lambda record: record.update(change))
    with pytest.raises(ValueError, match=rf"{name}: .*{re.escape(message)}"):
        model_card(count_folder(packed), REPO)


def test_figures_of_the_report_are_checked_like_those_of_an_evaluation(packed):
    (packed / "evaluation.json").unlink()
    text = written(packed).text
    assert (
        "These are the publisher's figures, as recorded in `quantization_report.json`; nobody else has verified"
        in text
    )
    edit(packed, "quantization_report.json", lambda record: record["comparison"].update(top1_agreement=1.5))
    with pytest.raises(ValueError, match="quantization_report.json has metrics that no evaluation can return"):
        model_card(count_folder(packed), REPO)


def test_metadata_of_the_user_is_added_to_the_generated(packed):
    card = written(packed, metadata={"tags": ["chat", "hf_pcdvq"], "pipeline_tag": "translation", "license": "mit"})
    assert card.data.tags == ["hf_pcdvq", "pcdvq", "2-bit", "conversational", "chat"]
    assert (card.data.pipeline_tag, card.data.license) == ("translation", "mit")
    for name in ("base_model", "eval_results", "model-index", "model_name"):
        with pytest.raises(ValueError, match=f"metadata: {name} is not free to choose"):
            written(packed, metadata={name: "x"})
    with pytest.raises(ValueError, match="tags must be a list of texts, got 'chat'"):
        written(packed, metadata={"tags": "chat"})


def test_card_command_writes_the_file_whole(packed, tmp_path):
    out = tmp_path / "card.md"
    arguments = ["card", str(packed), REPO, "--license", "mit", "--language", "en", "--out", str(out)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert ModelCard.load(out).data.language == ["en"]
    shutil.copy(out, packed / "README.md")  # a generated card is regenerated
    printed = CliRunner().invoke(main, ["card", str(packed), "me/other"]).stdout
    assert 'from_pretrained("me/other"' in printed and "license: mit" not in printed


def test_quantize_records_what_the_card_needs(tiny_model_dir, tmp_path, monkeypatch):
    dense = shutil.copytree(tiny_model_dir, tmp_path / "dense model")
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# Original, scores 99.9 %\n")
    arguments = ["quantize", str(dense), "--no-calibration", "--out", str(tmp_path / "packed")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    card = written(tmp_path / "packed")
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert "hf-pcdvq quantize 'dense model' --no-calibration --out packed" in card.text
    assert "base_model" not in card.data.to_dict()  # a local folder is not a name on the Hub
    assert "99.9" not in card.text and "Every weight was rounded to the nearest code" in card.text
    # Nor is one that could be such a name, even if the card is written from another folder.
    shutil.copytree(dense, tmp_path / "org" / "dense")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["quantize", "org/dense", "--no-calibration", "--out", "again"]).exit_code == 0
    monkeypatch.chdir(tmp_path / "again")
    assert "base_model" not in written(tmp_path / "again").data.to_dict()


@pytest.mark.parametrize("command", ["push", "check", "card", "speed"])
def test_commands_explain_themselves_with_an_example(command):
    assert f"  hf-pcdvq {command} " in CliRunner().invoke(main, [command, "--help"]).stdout


@pytest.mark.parametrize("name", ["pcdvq-2.25", "ccq-stream-2.0"])
def test_examples_are_valid_cards_of_the_template_as_it_is(name, hub):
    folder = EXAMPLES / f"SmolLM2-135M-Instruct-{name}"
    card = ModelCard.load(folder / "README.md")
    card.validate()
    assert card.data.base_model_relation == "quantized"
    assert {"perplexity", "kl_divergence", "accuracy", "acc"} <= {r.metric_type for r in card.data.eval_results}
    assert "```python\nimport hf_pcdvq" in card.text
    template = (files("hf_pcdvq.publish") / "data/model_card.md").read_text()
    headings = re.findall("^##+ .*", template, re.MULTILINE)
    assert re.findall("^##+ .*", card.text, re.MULTILINE) == headings
    for file in re.findall(r"\]\((quantization_report\.\w+)\)", card.text):
        assert (folder / file).is_file()
