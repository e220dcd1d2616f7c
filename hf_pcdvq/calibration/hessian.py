"""Second moments of a layer's inputs, and the Hessians that error feedback computes from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codecs import hadamard

# H is symmetric: it is accumulated in this many bands of rows, each from the diagonal on, which saves 3/8 of it.
_BANDS = 4
# How many times damping is raised tenfold before a Hessian is given up on.
_DAMPING_STEPS = 4


class InputMoments:
    """Running sums over the tokens `x` that layers with a common input receive; `x0` are those of the original model.

    Attributes:
        hessian: sum of `x x^T`, float32 `[K, K]`; only the upper triangle is complete.
        cross: sum of `(x0 - x) x^T`, float32 `[K, K]`; None if some `x0` is unknown.
        tokens: number of tokens seen.
    """

    def __init__(self, features: int, device: torch.device):
        self.hessian = torch.zeros(features, features, device=device)
        self.cross: Tensor | None = torch.zeros_like(self.hessian)
        self.tokens = 0

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Accumulate the tokens of one window.

        Args:
            inputs: `[..., K]` of any floating dtype.
            original: the same tokens in the original model, if they are known. Two-dimensional ones are not used:
                they belong to experts that are modules of their own, which may have received other tokens there.
        """
        x = inputs.flatten(0, -2).float()
        band = -(-x.shape[1] // _BANDS)
        for start in range(0, x.shape[1], band):
            self.hessian[start : start + band, start:].addmm_(x[:, start : start + band].T, x[:, start:])
        if original is None or original.ndim < 3 or original.shape != inputs.shape:
            self.cross = None
        if self.cross is not None:
            # In bfloat16 if the model is: unlike the Hessian, `cross` is never inverted. Float16 sums would overflow.
            dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
            change = (original.to(inputs.device, dtype) - inputs.to(dtype)).flatten(0, -2)
            self.cross += change.T @ inputs.to(dtype).flatten(0, -2)
        self.tokens += len(x)


class UnusableHessian(Exception):
    """Error feedback cannot use the Hessian, or there is none; the message says why."""


@dataclass(frozen=True)
class Hessian:
    """A Hessian that error feedback can use: symmetric, positive definite, in the basis that the codec quantizes.

    Attributes:
        matrix: float32 `[K, K]`, mean over the tokens, damping included.
        tokens: number of tokens it is the mean of.
        dead: number of inputs that were 0 for every token; only damping gives their weights a cost.
        damp_percent: what was added to the diagonal, as a fraction of its mean.
        note: how it was made usable, if it was not so at first, or None.
    """

    matrix: Tensor
    tokens: int
    dead: int
    damp_percent: float
    note: str | None

    def permuted(self, order: Tensor) -> Hessian:
        """With the inputs in the given order, int64 `[K]`."""
        return replace(self, matrix=self.matrix[order][:, order])

    def factor(self) -> Tensor:
        """R, upper triangular, float64 `[K, K]`, with `matrix = R R^T`."""
        return torch.linalg.cholesky(self.matrix.flip(0, 1).double()).flip(0, 1)

    def solve(self, rows: Tensor) -> Tensor:
        """`rows matrix^-1` for float32 `[N, K]`."""
        lower = torch.linalg.cholesky(self.matrix.double())
        return torch.cholesky_solve(rows.double().T, lower).T.float()


def prepare_hessian(moments: InputMoments | None, damp_percent: float, signs: Tensor | None) -> Hessian:
    """A usable Hessian from accumulated moments.

    Damping is raised in two cases, which `note` then names:

    - fewer tokens than inputs: it is multiplied by inputs / tokens, because errors in directions that no token covers
      would otherwise cost next to nothing;
    - not positive definite in spite of damping: it is raised tenfold, at most four times.

    Args:
        moments: None if no token reached the layer.
        damp_percent: fraction of the diagonal's mean that is added to the diagonal.
        signs: of the codec's rotation, or None if it does not rotate.

    Raises:
        UnusableHessian: no tokens, sums that are not finite, or singular however much it is damped.
    """
    if moments is None or moments.tokens == 0:
        raise UnusableHessian("no token reached it")
    upper = moments.hessian.triu()
    matrix = (upper + upper.triu(1).T) / moments.tokens
    if not torch.isfinite(matrix).all():
        raise UnusableHessian("its Hessian is not finite")
    tokens, features = moments.tokens, len(matrix)
    dead = int((matrix.diagonal() == 0).sum())
    note = None
    if tokens < features:
        damp_percent *= features / tokens
        note = f"only {tokens} tokens for {features} inputs: damping raised to {damp_percent:.3g}"
    if signs is not None:
        matrix = hadamard.rotate(hadamard.rotate(matrix, signs).T.contiguous(), signs)
    mean = matrix.diagonal().mean()
    for _ in range(_DAMPING_STEPS + 1):
        damped = matrix.clone()
        damped.diagonal().add_(damp_percent * mean)
        if mean > 0 and torch.linalg.cholesky_ex(damped.flip(0, 1).double()).info == 0:
            return Hessian(damped, tokens, dead, damp_percent, note)
        damp_percent *= 10
        note = f"its Hessian is singular: damping raised to {damp_percent:.3g}"
    raise UnusableHessian("its Hessian is singular")
