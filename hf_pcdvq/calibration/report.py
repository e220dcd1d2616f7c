"""The report of a calibrated run: `quantization_report.json`, the same as Markdown, and a plot of the errors."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import Evaluation
from ..files.records import device_name, package_versions, write_text
from ..files.size import count_folder
from ..files.text import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from ..allocation.report import Allocation
    from ..config import PackedConfig
    from .records import BlockRecord, LayerRecord
    from .run import CalibratedRun

logger = logging.getLogger(__name__)

NAME = "quantization_report"


@dataclass(frozen=True)
class QuantizationReport:
    """The settings of a calibrated run, and its effect on the model.

    Attributes:
        config: the quantization config, JSON-clean, with the calibration settings.
        windows, length: number of windows that were calibrated on, and tokens per window.
        seconds: duration of the whole run.
        device: name of the device that blocks were computed on.
        layers, blocks: a record of each.
        comparison: of the packed model with the original, on held-out windows of the same dataset; None if there were
            none, the model has no output head, or the comparison failed.
        comparison_failure: why it failed.
        bits_per_packed_weight: counted on the files; None before the model is saved.
        allocation: how the bits of the layers were chosen; None unless `bits="auto"`. It has files of its own.
    """

    config: dict[str, Any]
    windows: int
    length: int
    seconds: float
    device: str
    layers: list[LayerRecord]
    blocks: list[BlockRecord]
    comparison: Evaluation | None = None
    comparison_failure: str | None = None
    bits_per_packed_weight: float | None = None
    allocation: Allocation | None = None

    @classmethod
    def of(
        cls,
        config: PackedConfig,
        run: CalibratedRun,
        windows: Tensor,
        seconds: float,
        allocation: Allocation | None = None,
    ) -> QuantizationReport:
        """The report of a finished run over `windows` `[n, L]`."""
        count, length = windows.shape
        fields = config.to_dict()
        device = device_name(run.device)
        return cls(fields, count, length, seconds, device, run.layers, run.blocks, allocation=allocation)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean, with the versions that made them."""
        fields = {**asdict(self), "versions": package_versions()}
        del fields["allocation"]
        return fields

    def write(self, folder: str | Path) -> None:
        """Write `quantization_report.json`, `.md` and, with matplotlib, `.png` into the folder of the saved model, and
        likewise the allocation of bits, if there is one.

        Raises:
            FileNotFoundError: `folder` holds no saved model; the bits are counted on its files.
        """
        folder = Path(folder)
        counted = replace(self, bits_per_packed_weight=count_folder(folder).bits_per_packed_weight)
        text = json.dumps(counted.to_dict(), indent=2) + "\n"
        write_text(folder / f"{NAME}.json", text)
        write_text(folder / f"{NAME}.md", counted.markdown())
        if find_spec("matplotlib") is None:
            logger.warning("no plot in %s: it needs matplotlib, pip install matplotlib", folder)
        else:
            plot_damage(self, folder / f"{NAME}.png")
        if self.allocation is not None:
            self.allocation.write(folder)

    def markdown(self) -> str:
        """The report as text and tables."""
        calibration = self.config["calibration"]
        source = calibration["dataset"] or "text that the model wrote itself"
        lines = [
            "# Quantization report",
            "",
            f"Calibrated on {self.windows} windows of {self.length} tokens of {markdown(source)}, seed {calibration['seed']}; "
            f"{self.seconds:.0f} s on {markdown(self.device)}.",
            "",
            "| | original | quantized |",
            "|---|---|---|",
        ]
        bits = self.bits_per_packed_weight
        lines += [f"| bits per packed weight, counted on the file | | {bits:.3f} |"] if bits is not None else []
        lines += self._comparison_rows() if self.comparison else []
        if self.comparison_failure is not None:
            lines += ["", f"The comparison with the original failed: {self.comparison_failure}"]
        lines += ["", "## Layers", ""]
        if noted := sum(layer.note is not None for layer in self.layers):
            lines += [f"{noted} of {len(self.layers)} used a fallback, see their notes.", ""]
        lines += ["| layer | size | kurtosis | max | SNR, dB | proxy loss | seconds | note |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_layer_row(layer) for layer in self.layers]
        lines += [
            "",
            "Kurtosis and max are those of the rotated weights, each row divided by its root mean square; a",
        ]
        lines += ["normal distribution has kurtosis 3. Proxy loss is tr(E H E^T) / tr(W H W^T).", ""]
        return "\n".join([*lines, *self._block_rows()]) + "\n"

    def _block_rows(self) -> list[str]:
        heading, rule = "| block | squared error of the output, relative | seconds |", "|---|---|---|"
        rows = [
            f"| {markdown(block.name)} | {block.output_error:.4f} | {block.seconds:.1f} |" for block in self.blocks
        ]
        if any(block.tuning_kl is not None for block in self.blocks):
            heading, rule = f"{heading} KL while the rest was tuned, nats |", f"{rule}---|"
            figures = ["" if block.tuning_kl is None else f"{block.tuning_kl:.3f}" for block in self.blocks]
            rows = [f"{row} {figure} |" for row, figure in zip(rows, figures)]
        return ["## Blocks", "", heading, rule, *rows]

    def _comparison_rows(self) -> list[str]:
        result = self.comparison
        scope = f"{result.windows} windows held out of the same data, context {result.context_length}"
        return [
            f"| perplexity ({scope}) | {result.perplexity_original:.2f} | {result.perplexity_packed:.2f} |",
            f"| KL(original \\|\\| quantized), mean / 90 % | | {result.kl_mean:.3f} / {result.kl_p90:.3f} nats |",
            f"| same likeliest token | | {100 * result.top1_agreement:.1f} % |",
        ]


def _layer_row(layer: LayerRecord) -> str:
    snr = "" if layer.snr is None else f"{layer.snr:.1f}"
    loss = "" if layer.proxy_loss is None else f"{layer.proxy_loss:.5f}"
    notes = [layer.note] if layer.note else []
    notes += [f"{layer.dead_inputs} dead inputs"] if layer.dead_inputs else []
    size = f"{layer.out_features} x {layer.in_features}"
    figures = f"{layer.kurtosis:.2f} | {layer.largest:.2f} | {snr} | {loss} | {layer.seconds:.1f}"
    return f"| {markdown(layer.name)} | {size} | {figures} | {markdown('; '.join(notes))} |"


def _curves(report: QuantizationReport) -> dict[str, dict[int, list[float]]]:
    """Proxy losses by the name of a layer in its block and by block. The experts of a block share one name."""
    curves: dict[str, dict[int, list[float]]] = {}
    for layer in report.layers:
        match = re.search(r"\.(\d+)\.(.+)", layer.name)
        if match and layer.proxy_loss is not None:
            name = re.sub(r"\.\d+\.", ".*.", match[2])
            curves.setdefault(name, {}).setdefault(int(match[1]), []).append(layer.proxy_loss)
    return curves


def plot_damage(report: QuantizationReport, file: Path) -> None:
    """A PNG: proxy loss of the layers (the mean over experts) and error after each block, by depth in the model.

    Both are squared errors relative to what they are errors of, on logarithmic axes of their own: layers by themselves, and
    everything so far together.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, whose backend and list of figures are global.
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    for name, losses in _curves(report).items():
        upper.plot(list(losses), [sum(some) / len(some) for some in losses.values()], marker=".", label=name)
    upper.set(ylabel="squared error / squared output", xlabel="decoder block", yscale="log")
    upper.set_title("Each layer by itself, tr(EHE$^T$) / tr(WHW$^T$): the error in its outputs, had its inputs none")
    upper.legend(fontsize="small", ncols=4)
    lower.plot([block.output_error for block in report.blocks], marker=".", color="black")
    lower.set(ylabel="squared error / squared hidden states", xlabel="decoder block", yscale="log")
    lower.set_title("All blocks so far together: the error in the hidden states that leave the block")
    figure.supxlabel(
        "Logarithmic, each on a scale of its own: 1 would be an error as large as the values, 0.01 a hundredth",
        fontsize="small",
    )
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
