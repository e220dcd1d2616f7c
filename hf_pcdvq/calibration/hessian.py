"""Second moments of a layer's inputs, and their preparation for error feedback."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codecs import hadamard

# H is symmetric: it is accumulated in this many bands of columns, each down to the diagonal only, which saves 3/8 of it.
_BANDS = 4
# How often damping is raised tenfold before a Hessian is given up.
_DAMPING_STEPS = 4


class InputMoments:
    """Running sums over the tokens `x` that reach layers with a common input; `x0` is what the original model has there.

    Attributes:
        hessian: sum of `x x^T`, float32 `[K, K]`; below the diagonal not all of it is filled.
        cross: sum of `(x0 - x) x^T`, float32 `[K, K]`; None where there was nothing to compare with.
        tokens: number of tokens seen.
    """

    def __init__(self, features: int, device: torch.device):
        self.hessian = torch.zeros(features, features, device=device)
        self.cross: Tensor | None = torch.zeros_like(self.hessian)
        self.tokens = 0

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Count the tokens of one window, `[..., K]` of any floating dtype.

        Args:
            original: the same tokens in the original model. Of experts that are modules of their own, and may get other
                tokens than there, nothing is compared: their inputs are not `[batch, tokens, K]`.
        """
        x = inputs.flatten(0, -2).float()
        band = -(-x.shape[1] // _BANDS)
        for start in range(0, x.shape[1], band):
            self.hessian[start : start + band, start:].addmm_(x[:, start : start + band].T, x[:, start:])
        if original is None or original.ndim < 3 or original.shape != inputs.shape:
            self.cross = None
        if self.cross is not None:
            # In bfloat16 where the model is: unlike the Hessian, `cross` is never inverted. Sums overflow in float16.
            dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
            change = (original.to(inputs.device, dtype) - inputs.to(dtype)).flatten(0, -2)
            self.cross += change.T @ inputs.to(dtype).flatten(0, -2)
        self.tokens += len(x)


class UnusableHessian(Exception):
    """There is no Hessian that error feedback could work with; the message says why."""


@dataclass(frozen=True)
class Hessian:
    """A Hessian that error feedback can work with: symmetric, positive definite, in the basis that the codec quantizes.

    Attributes:
        matrix: float32 `[K, K]`, mean over the tokens, damping included.
        tokens: how many tokens it is the mean of.
        dead: number of inputs that were 0 for every token; damping alone gives their weights a cost.
        damping: what was added to the diagonal, as a fraction of its mean.
        note: what was unusual about it, or None.
    """

    matrix: Tensor
    tokens: int
    dead: int
    damping: float
    note: str | None

    def permuted(self, order: Tensor) -> Hessian:
        """With the inputs in the order int64 `[K]`."""
        return replace(self, matrix=self.matrix[order][:, order])

    def factor(self) -> Tensor:
        """R, upper triangular, float64 `[K, K]`, with `matrix = R R^T`."""
        return torch.linalg.cholesky(self.matrix.double().flip(0, 1)).flip(0, 1)

    def solve(self, rows: Tensor) -> Tensor:
        """`rows matrix^-1` for float32 `[N, K]`."""
        lower = torch.linalg.cholesky(self.matrix.double())
        return torch.cholesky_solve(rows.double().T, lower).T.float()


def prepare_hessian(moments: InputMoments | None, damping: float, signs: Tensor | None) -> Hessian:
    """A usable Hessian from what was accumulated.

    Two rules help where it is not usable as it is, and say so in `note`:

    - fewer tokens than inputs: damping is multiplied by inputs / tokens, because directions that no token has shown
      would otherwise cost next to nothing;
    - not positive definite in spite of damping: damping is raised tenfold, at most four times.

    Args:
        moments: None if no token has reached the layer.
        damping: fraction of the diagonal's mean that is added to the diagonal.
        signs: of the codec's rotation, or None if it does not rotate.

    Raises:
        UnusableHessian: no tokens, sums that are not finite, or singular at any damping.
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
        damping *= features / tokens
        note = f"only {tokens} tokens for {features} inputs: damping raised to {damping:.3g}"
    if signs is not None:
        matrix = hadamard.rotate(hadamard.rotate(matrix, signs).T.contiguous(), signs)
    mean = matrix.diagonal().mean()
    identity = torch.eye(features, device=matrix.device)
    for _ in range(_DAMPING_STEPS + 1):
        damped = matrix + damping * mean * identity
        if mean > 0 and torch.linalg.cholesky_ex(damped.double().flip(0, 1)).info == 0:
            return Hessian(damped, tokens, dead, damping, note)
        damping *= 10
        note = f"its Hessian is singular: damping raised to {damping:.3g}"
    raise UnusableHessian("its Hessian is singular")
