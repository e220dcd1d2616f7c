"""Second moments of a layer's inputs, and the Hessians that error feedback computes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

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
        cross: sum of `(x0 - x) x^T`, float32 `[K, K]`; None if some `x0` is unknown, and before the first token.
        change: sum of `(x0 - x) (x0 - x)^T`, float32 `[K, K]`, only the upper triangle; None where `cross` is, and unless
            asked for.
        guided: for some layers, sums of `s x x^T` with the sensitivity `s` of a group of their output channels, float32
            `[groups, K, K]`, only the upper triangles.
        tokens: number of tokens seen.

    Args:
        with_change: accumulate `change` too.
    """

    def __init__(self, features: int, device: torch.device, with_change: bool = False):
        self.hessian = torch.zeros(features, features, device=device)
        self.cross: Tensor | None = None
        self.change: Tensor | None = None
        self.guided: dict[str, Tensor] = {}
        self.tokens = 0
        self._with_change, self._compared = with_change, True

    def add(
        self, inputs: Tensor, original: Tensor | None = None, sensitivity: dict[str, Tensor] | None = None
    ) -> None:
        """Accumulate the tokens of one window.

        Args:
            inputs: `[..., K]` of any floating dtype.
            original: the same tokens in the original model, if they are known. Two-dimensional ones are not used:
                they belong to experts that are modules of their own, which may have received other tokens there.
            sensitivity: of the layers that have these inputs, float32 `[tokens, groups]` each.
        """
        x = inputs.flatten(0, -2).float()
        _add_squares(self.hessian, x)
        if original is None or original.ndim < 3 or original.shape != inputs.shape:
            self._forget_original()
        if self._compared:
            self._compare()
            # In bfloat16 if the model is: unlike the Hessian, `cross` is never inverted. Float16 sums would overflow.
            dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
            change = (original.to(inputs.device, dtype) - inputs.to(dtype)).flatten(0, -2)
            self.cross += change.T @ inputs.to(dtype).flatten(0, -2)
            if self.change is not None:
                _add_squares(self.change, change.float())
        for name, squares in (sensitivity or {}).items():
            sums = self.guided.setdefault(name, x.new_zeros(squares.shape[1], *self.hessian.shape))
            for group, weights in zip(sums, squares.to(x.device).sqrt().T):
                _add_squares(group, x * weights[:, None])
        self.tokens += len(x)

    def add_sums(self, other: InputMoments) -> None:
        """Add the sums over other tokens."""
        self.hessian += other.hessian
        if not other._compared:
            self._forget_original()
        if self._compared and other.cross is not None:  # over no tokens, it is zero
            self._compare()
            self.cross += other.cross
            if self.change is not None:
                self.change += other.change
        for name, sums in other.guided.items():
            self.guided[name] = self.guided[name] + sums if name in self.guided else sums
        self.tokens += other.tokens

    @property
    def extent(self) -> tuple[int, bool]:
        """The number of tokens, and whether they are compared with the original's."""
        return self.tokens, self._compared

    def receive(self, extent: tuple[int, bool], spread: Callable[[Tensor], None]) -> None:
        """Become what another process has, of this extent; not `guided`.

        Args:
            spread: fills a tensor with that of the other process.
        """
        self.tokens, compared = extent
        if not compared:
            self._forget_original()
        elif self.tokens:
            self._compare()
        for sums in (self.hessian, self.cross, self.change):
            if sums is not None:
                spread(sums)

    def _compare(self) -> None:
        """Have room for the sums that compare with the original: layers without known inputs there never need it."""
        if self.cross is None:
            self.cross = torch.zeros_like(self.hessian)
            self.change = torch.zeros_like(self.hessian) if self._with_change else None

    def _forget_original(self) -> None:
        self._compared, self.cross, self.change = False, None, None


def _add_squares(sums: Tensor, x: Tensor) -> None:
    """Add `x^T x` of float32 `[T, K]` to the upper triangle of `sums` `[K, K]`."""
    band = -(-x.shape[1] // _BANDS)
    for start in range(0, x.shape[1], band):
        sums[start : start + band, start:].addmm_(x[:, start : start + band].T, x[:, start:])


def symmetric(sums: Tensor) -> Tensor:
    """The whole matrix from its upper triangle, `[K, K]`."""
    upper = sums.triu()
    return upper + upper.triu(1).T


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

    @property
    def energy(self) -> Tensor:
        """Mean square of every input, float32 `[K]`."""
        return self.matrix.diagonal()

    def product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """`rows matrix` for `[N, A]` and a part of the matrix, of its factor or of an inverse, `[A, B]`."""
        return rows @ matrix

    def loss(self, error: Tensor) -> Tensor:
        """`e H e^T` of every row of an error float32 `[N, K]`."""
        return (self.product(error, self.matrix) * error).sum(1)

    def permuted(self, order: Tensor) -> Hessian:
        """With the inputs in the given order, int64 `[K]`."""
        return replace(self, matrix=self.matrix[order][:, order])

    def factor(self) -> Tensor:
        """R, upper triangular, float64 `[K, K]`, with `matrix = R R^T`."""
        return torch.linalg.cholesky(self.matrix.flip(0, 1).double()).flip(0, 1)

    def solve(self, rows: Tensor) -> Tensor:
        """`rows matrix^-1` for float32 `[N, K]`."""
        return torch.cholesky_solve(rows.double().T, self._lower).T.float()

    @cached_property
    def _lower(self) -> Tensor:
        return torch.linalg.cholesky(self.matrix.double())


@dataclass(frozen=True)
class GroupedHessian:
    """Hessians of groups of adjacent output channels, in place of one for all.

    Attributes:
        matrix: float32 `[G, K, K]`.
        sizes: number of channels in each group.
        notes: by layer, how some of its groups' were made usable, if they were not so at first.
    """

    matrix: Tensor
    sizes: list[int]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def energy(self) -> Tensor:
        """Mean square of every input, weighted by sensitivity, float32 `[K]`."""
        return self.matrix.diagonal(dim1=1, dim2=2).mean(0)

    @property
    def importance(self) -> Tensor:
        """What errors in an output channel cost, compared with others, float32 `[N]`."""
        mean = self.matrix.diagonal(dim1=1, dim2=2).mean(1)
        return mean.repeat_interleave(torch.tensor(self.sizes, device=mean.device))

    def product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Every row of `[N, A]` times the matrix of its group, `[G, A, B]`."""
        place, back = self._places
        return torch.bmm(rows[place], matrix).flatten(0, 1)[back]

    def permuted(self, order: Tensor) -> GroupedHessian:
        """With the inputs in the given order, int64 `[K]`."""
        return replace(self, matrix=self.matrix[:, order][:, :, order])

    def factor(self) -> Tensor:
        """R of every group, upper triangular, float64 `[G, K, K]`, with `matrix = R R^T`."""
        return torch.linalg.cholesky(self.matrix.double().flip(1, 2)).flip(1, 2)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The rows of every group, filled up to the largest with row 0, int64 `[G, n]`, and where each row then is, `[N]`."""
        sizes = torch.tensor(self.sizes)
        slot = torch.arange(int(sizes.max()))
        exists = slot < sizes[:, None]
        place = torch.where(exists, slot + (sizes.cumsum(0) - sizes)[:, None], 0)
        return place.to(self.matrix.device), exists.flatten().nonzero()[:, 0].to(self.matrix.device)


def group_sizes(channels: int, groups: int) -> list[int]:
    """How many adjacent output channels belong to each group."""
    return [len(part) for part in torch.arange(channels).tensor_split(min(groups, channels))]


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
    return _usable(moments.hessian, moments.tokens, damp_percent, signs)


def prepare_guided(
    moments: InputMoments, sizes: dict[str, int], damp_percent: float, signs: Tensor | None
) -> GroupedHessian:
    """The Hessians of groups of output channels, made usable in the same way.

    Args:
        sizes: output channels of the layers, all of which are in `moments.guided`, by name.

    Raises:
        UnusableHessian: one of them cannot be used; the message names the layer and the group.
    """
    matrices: list[Tensor] = []
    rows: list[int] = []
    notes: dict[str, str] = {}
    for name, channels in sizes.items():
        groups = moments.guided[name]
        rows += group_sizes(channels, len(groups))
        for number, sums in enumerate(groups):
            where = f"group {number + 1} of {len(groups)} of {name}"
            try:
                found = _usable(sums, moments.tokens, damp_percent, signs)
            except UnusableHessian as reason:
                raise UnusableHessian(f"{where}: {reason}") from None
            matrices.append(found.matrix)
            if found.note:
                notes[name] = "; ".join(filter(None, (notes.get(name), f"{where}: {found.note}")))
    return GroupedHessian(torch.stack(matrices), rows, notes)


def _usable(sums: Tensor, tokens: int, damp_percent: float, signs: Tensor | None) -> Hessian:
    """See `prepare_hessian`; `sums` over the tokens."""
    matrix = symmetric(sums) / tokens
    if not torch.isfinite(matrix).all():
        raise UnusableHessian("its Hessian is not finite")
    features = len(matrix)
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
