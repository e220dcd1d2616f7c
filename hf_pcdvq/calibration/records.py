"""What a calibrated run makes of each layer and block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..codecs.base import Packed

PackedLayers = dict[str, dict[str, Packed]]  # by the names of modules and of their dense parameters


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer, or one matrix of fused experts.

    Attributes:
        name: of the module; of an expert's matrix with its number and parameter, `"...experts.3.down_proj"`.
        out_features, in_features: its size.
        kurtosis: of the weights that are quantized (rotated, each row divided by its root mean square); 3 for a
            normal distribution.
        largest: the largest of these weights, in absolute value.
        snr: ratio of the energies of the weights and their error, in decibels; None if either is 0.
        proxy_loss: `tr(E H E^T) / tr(W H W^T)`, the error's share of the layer's output energy; None without a
            Hessian.
        tokens: number of tokens in the Hessian.
        dead_inputs: number of inputs that were 0 for every token.
        damp_percent: damping of the Hessian, as a fraction of its mean diagonal.
        note: the fallback that was used, or None.
        seconds: time spent on quantizing it, without computing its Hessian; shared time is split by size.
    """

    name: str
    out_features: int
    in_features: int
    kurtosis: float
    largest: float
    snr: float | None
    proxy_loss: float | None
    tokens: int
    dead_inputs: int
    damp_percent: float
    note: str | None
    seconds: float


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block.

    Attributes:
        name: name of the module.
        output_error: squared error of the hidden states after it, relative to the squares of the original's, with all
            earlier blocks quantized too; with tuning, the error of this block alone, from what the earlier ones give it.
        seconds: time spent on it, forward passes, Hessians and tuning included.
        tuning_kl: KL(original || model so far) in nats while the blocks after it were tuned; None if they were not.
    """

    name: str
    output_error: float
    seconds: float
    tuning_kl: float | None = None


@dataclass
class QuantizedLayers:
    """What some layers have been quantized to, with a record of every matrix."""

    packed: PackedLayers = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[tuple[str, str, str], Tensor], records: list[LayerRecord]) -> QuantizedLayers:
        """From what `tensors` returns."""
        packed: PackedLayers = {}
        for (name, parameter, suffix), tensor in tensors.items():
            packed.setdefault(name, {}).setdefault(parameter, {})[suffix] = tensor
        return cls(packed, records)

    def tensors(self) -> dict[tuple[str, str, str], Tensor]:
        """The packed tensors, by the names of module and parameter and the suffix of the tensor."""
        return {
            (name, parameter, suffix): tensor
            for name, layer in self.packed.items()
            for parameter, packed in layer.items()
            for suffix, tensor in packed.items()
        }

    def add(self, other: QuantizedLayers) -> None:
        self.packed.update(other.packed)
        self.records += other.records
