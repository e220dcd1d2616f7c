"""What a calibrated run knows about each layer and block that it has finished."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer.

    Attributes:
        name: name of the module.
        out_features, in_features: its size.
        kurtosis: fourth moment of the weights that are quantized (rotated, each row divided by its root mean square);
            3 for a normal distribution.
        largest: the largest of them, in absolute value.
        snr: weights against their error, in decibels; None where one of them is 0.
        proxy_loss: `tr(E H E^T) / tr(W H W^T)`, the share of the layer's output energy that the error has; None where
            there was no Hessian.
        tokens: how many the Hessian was made of.
        dead_inputs: inputs that were 0 for every token.
        damping: what the Hessian needed, as a fraction of its mean diagonal.
        note: a rule that the layer fell back to, or None.
        seconds: time for quantizing it, without the time for its Hessian; shared time is split by size.
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
    damping: float
    note: str | None
    seconds: float


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block.

    Attributes:
        name: name of the module.
        output_error: squared error of the hidden states behind it, as a share of their squares, all earlier blocks
            quantized too.
        seconds: time for it, forward passes and Hessians included.
    """

    name: str
    output_error: float
    seconds: float
