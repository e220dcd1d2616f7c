"""The model card of a packed model. Every number in it is read from a file in the model's folder.

A section is left out if the file of its measurement is missing. The text is in `data/model_card.md`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..calibration.report import NAME as REPORT
from ..config import PackedConfig
from ..evaluation.record import NAME as EVALUATION
from ..evaluation.tables import TASK_HEADINGS, markdown_table, task_rows
from ..evaluation.tasks import WIKITEXT2, WIKITEXT2_ON_HUB
from ..files.provenance import Provenance, Recovered
from ..files.size import FolderCount, layer_groups, readable_size
from ..files.text import code_block, code_span, markdown
from ..version import INSTALL
from .architecture import architecture_name
from .measurements import Measurements

# Metadata that a card takes from the model or from measurements only.
_NOT_GIVEN = {"base_model", "base_model_relation", "eval_results", "model-index", "model_name"}


def model_card(
    count: FolderCount,
    repo_id: str,
    *,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
    loader_stub: bool = False,
) -> ModelCard:
    """Make the card of a packed model.

    Args:
        count: the count of a saved model. Its folder may contain measurements: `quantization_report.json`,
            `evaluation.json`, `speed.json`.
        repo_id: where it is published; the code in the card loads it from there.
        base_model: name of the original on the Hub; None takes the one in `provenance.json`.
        metadata: further YAML metadata: `license`, `language`, ...; overrides that of the original's card. Its `tags`
            are added to the generated ones.
        loader_stub: say that the model also loads with `trust_remote_code=True`.

    Raises:
        ValueError: the model is not packed, its folder holds a measurement of another model, or `metadata` names a field
            that is not free to choose.
    """
    folder = count.folder
    if count.config is None:
        raise ValueError(f"{folder} is not packed; cards are made for packed models only")
    measured, provenance = Measurements.read(count), Provenance.read(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base_model = base_model or provenance.original
    chat = (folder / "chat_template.jinja").is_file()
    auto_class, task = _usage(settings, folder / "config.json")
    generated = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": [
            "hf_pcdvq",
            count.config.method,
            f"{int(count.config.codec.bits)}-bit",
            *(["conversational"] if chat else []),
        ],
    }
    data = _card_data({**generated, **provenance.inherited}, metadata or {}, repo_id.split("/")[-1], measured)
    facts = {
        **_size_facts(count),
        **_origin_facts(count.config, measured, provenance),
        **_measured_facts(measured),
        "base_model": base_model,
        "title": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "chat": chat,
        "auto_class": auto_class,
        "writes": task is not None,
        "text_generation": task == "text-generation",
        "adapter_targets": _adapter_targets(count),
        "method": f"[{count.config.describe()}]({count.config.paper})",
        "loader_stub": loader_stub,
        "install": INSTALL,
        "has_report": (folder / "quantization_report.md").is_file(),
        "has_plot": (folder / "quantization_report.png").is_file(),
        "left_unpacked": {code_span(name): markdown(reason) for name, reason in count.left_unpacked.items()},
    }
    with as_file(files(__package__) / "data" / "model_card.md") as template:
        card = ModelCard.from_template(data, template_path=str(template), **facts)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def _card_data(generated: dict[str, Any], given: dict[str, Any], title: str, measured: Measurements) -> ModelCardData:
    """The YAML metadata: what is generated, under what the user gives; tags are added to the generated ones."""
    refused = sorted(given.keys() & _NOT_GIVEN)
    if refused:
        raise ValueError(
            f"metadata: {refused[0]} is not free to choose: pass base_model=, and measure results with hf-pcdvq eval"
        )
    tags = given.get("tags") or []
    if not isinstance(tags, (list, tuple)) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"metadata: tags must be a list of texts, got {tags!r}")
    fields = {**generated, **given, "tags": list(dict.fromkeys([*generated["tags"], *tags]))}
    results = _eval_results(measured)
    if results:
        fields.update(eval_results=results, model_name=title)  # the name belongs to the results
    return ModelCardData(**fields)


def _usage(settings: dict[str, Any], file: Path) -> tuple[str, str | None]:
    """The auto class that loads the model as its config names it, and the task that it has on the Hub."""
    name = architecture_name(settings, file)
    if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "AutoModelForImageTextToText", "image-text-to-text"
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM", "text-generation"
    return "AutoModel", None


def _adapter_targets(count: FolderCount) -> str | None:
    """The layers to which adapters attach, in Python: packed experts take none, nor do embeddings and heads, which are in no
    list of blocks. None if nothing else is packed."""
    linear = [layer for layer in count.layers if layer.experts == 1]
    if len(linear) == len(count.layers):
        return '"all-linear"'
    linear = [layer for layer in linear if re.search(r"\.\d+\.", layer.name)]
    return json.dumps(sorted({layer.name.rpartition(".")[2] for layer in linear})) if linear else None


def _size_facts(count: FolderCount) -> dict[str, Any]:
    """Facts from the headers of the files."""
    packed_parts = [
        {
            "name": code_span(name),
            "count": sum(layer.experts for layer in layers),
            "outputs": outputs,
            "inputs": inputs,
            "bits": 8 * sum(layer.nbytes for layer in layers) / sum(layer.weights for layer in layers),
            "size": readable_size(sum(layer.nbytes for layer in layers)),
        }
        for (name, outputs, inputs, _), layers in layer_groups(count).items()
    ]
    others = {
        "embeddings": count.embedding_bytes,
        "output head": count.head_bytes,
        "everything else": count.other_bytes,
        "headers": count.header_bytes,
    }
    return {
        "packed_parts": packed_parts,
        "other_parts": [(name, readable_size(size)) for name, size in others.items() if size],
        "file_size": readable_size(count.file_bytes),
        "weight_size": readable_size(count.file_bytes - count.header_bytes),
        "dense_size": readable_size(2 * count.parameters),
        "parameters": f"{count.parameters:,}",
        "bits_per_packed_weight": count.bits_per_packed_weight,
        "bits_per_parameter": count.bits_per_parameter,
    }


def _origin_facts(config: PackedConfig, measured: Measurements, provenance: Provenance) -> dict[str, Any]:
    """Command, versions and calibration."""
    settings = {name: value for name, value in config.to_dict().items() if name != "left_unpacked"}
    calibration = None
    if config.calibration is not None:
        report = measured.report or {}
        calibration = {
            "windows": report.get("windows", config.calibration.samples),
            "length": report.get("length", config.calibration.length),
            "data": _data_name(config.calibration.dataset),
            "seed": config.calibration.seed,
            "seconds": f"{report['seconds']:.0f}" if report else None,
            "device": markdown(report["device"]) if report else None,
        }
    versions = provenance.versions or (measured.report or {}).get("versions") or {}
    return {
        "command": code_block(provenance.command, "bash") if provenance.command else None,
        "revision": code_span(provenance.revision) if provenance.revision else None,
        "versions": [markdown(f"{name} {version}") for name, version in versions.items()],
        "settings": code_block(json.dumps(settings, indent=2), "json"),
        "calibration": calibration,
        "recovery": None if provenance.recovery is None else _recovery_facts(provenance.recovery),
    }


def _recovery_facts(recovery: Recovered) -> dict[str, Any]:
    """How the model was trained after it was quantized."""
    texts = {name: markdown(getattr(recovery, name)) for name in ("text", "held_out", "device")}
    return {
        **asdict(recovery),
        **texts,
        "teacher": code_span(recovery.teacher) if recovery.teacher else None,
        "command": code_block(recovery.command, "bash") if recovery.command else None,
        "learning_rate": f"{recovery.learning_rate:g}",
        "seconds": f"{recovery.seconds:.0f}",
        "over_adapted": recovery.over_adapted,
    }


def _measured_facts(measured: Measurements) -> dict[str, Any]:
    """Quality and speed. Without an evaluation, quality is the comparison made by the calibrated run."""
    evaluation, noise, tasks, speed = None, None, None, None
    record, report = measured.evaluation, measured.report
    if record is not None:
        text = record.text if record.text == WIKITEXT2 else code_span(Path(record.text).name)
        command = code_block(record.command, "bash")
        scope = {
            "text": text,
            "device": markdown(record.device),
            "command": command,
            "held_out": False,
            "record": f"{EVALUATION}.json",
        }
        evaluation = {**record.metrics.to_dict(), **scope}
        if record.noise_floor:
            noise = {"dtype": markdown(record.noise_floor.dtype), **record.noise_floor.metrics.to_dict()}
        if record.tasks:
            kept = [f"{100 * task.packed / task.original:.1f} %" if task.original else "" for task in record.tasks]
            rows = [[*row, share] for row, share in zip(task_rows(record.tasks), kept)]
            lines = markdown_table([*TASK_HEADINGS, "% of the original"], rows)
            tasks = {"table": "\n".join(lines), "lm_eval": markdown(record.versions.get("lm_eval", ""))}
    elif report is not None and report["comparison"] is not None:
        device = markdown(report["device"])
        scope = {
            "text": "the calibration data",
            "device": device,
            "command": None,
            "held_out": True,
            "record": f"{REPORT}.json",
        }
        evaluation = {**report["comparison"].to_dict(), **scope}
    if measured.speed is not None:
        peak = measured.speed.peak_memory_bytes
        texts = {name: markdown(getattr(measured.speed, name)) for name in ("device", "dtype", "backend")}
        speed = {**asdict(measured.speed), **texts, "peak_memory": readable_size(peak) if peak else None}
    return {"evaluation": evaluation, "noise": noise, "tasks": tasks, "speed": speed}


def _data_name(data: str | None) -> str:
    if data is None:
        return "text that the model wrote itself"
    return "data given in Python" if data == "given" else code_span(data)


def _eval_results(measured: Measurements) -> list[EvalResult]:
    """The `model-index` of the card, with results of the packed model only."""
    record = measured.evaluation
    if record is None:
        return []
    metrics = record.metrics
    arguments = {"context_length": metrics.context_length, "windows": metrics.windows}
    results = [
        _eval_result(metric, value, metric_name=title, dataset_args=arguments, **_dataset(record.text))
        for metric, title, value in (
            ("perplexity", "Perplexity", metrics.perplexity_packed),
            ("kl_divergence", "KL divergence to the original, mean, nats", metrics.kl_mean),
            ("accuracy", "Same likeliest next token as the original", metrics.top1_agreement),
        )
    ]
    for task in record.tasks or []:
        dataset = task.dataset or task.task
        names = {"dataset_type": dataset, "dataset_name": task.task, "dataset_args": {"samples": task.samples}}
        results.append(_eval_result(task.metric, task.packed, **names))
    return results


def _eval_result(metric: str, value: float, **names: Any) -> EvalResult:
    return EvalResult(task_type="text-generation", metric_type=metric, metric_value=round(value, 5), **names)


def _dataset(text: str) -> dict[str, str]:
    """The text as a dataset of the Hub: WikiText-2 by its name there, a file by its name without the folder."""
    if text == WIKITEXT2:
        return WIKITEXT2_ON_HUB
    file = Path(text)
    return {"dataset_type": file.stem, "dataset_name": file.name}


# ---------------------------------------------------------------------------------------------- cards written by hand

# Not prose: code, addresses, comments, arXiv numbers.
_NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|https?://\S+|arXiv:?\s*\d+\.\d+", re.DOTALL | re.IGNORECASE
)
_UNITS = r"%|bits?\b|nats?\b|tok(?:ens?)?(?:/s| per second)|[KMGT]i?B\b|ms\b|s\b|x\b|×"
_FIGURE = re.compile(rf"(?<![\w./-])(\d[\d,]*(?:\.\d+)?)(?![\w-]*\d)\s*({_UNITS})?")


def unmeasured_figures(card: ModelCard, generated: ModelCard) -> list[str]:
    """Figures in a card that are not, exact or rounded, in the card generated from the measurements.

    A figure is a number with a decimal point or a unit, or a value in the `model-index`.
    """
    known = {number for number, _ in _figures(generated.text)}
    known_values = _metric_values(generated)
    unknown = [value for value in _metric_values(card) if value not in known_values]
    for number, shown in _figures(card.text):
        decimals = len(number.partition(".")[2])
        if not any(round(float(other), decimals) == float(number) for other in known):
            unknown.append(shown)
    return list(dict.fromkeys(unknown))


def _metric_values(card: ModelCard) -> list[str]:
    return [str(result.metric_value) for result in card.data.get("eval_results") or []]


def _figures(text: str) -> list[tuple[str, str]]:
    """Each figure as a number without separators, and as written in the text."""
    found = _FIGURE.finditer(_NOT_PROSE.sub(" ", text))
    return [(m[1].replace(",", ""), m[0].strip()) for m in found if "." in m[1] or m[2]]
