"""The processes that share a recovery: one per GPU, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Processes:
    """What a training needs to know of the others. A program that was started alone is one process.

    Attributes:
        count: number of processes.
        rank: number of this one.
        device: of this one; None if it is alone.
    """

    def __init__(self) -> None:
        self.count, self.rank, self.device = 1, 0, None
        if not torch.distributed.is_available():
            return
        if torch.distributed.is_initialized() or torch.distributed.is_torchelastic_launched():
            from accelerate import PartialState

            state = PartialState()
            self.count, self.rank, self.device = state.num_processes, state.process_index, state.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in each of them."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, "sum")

    def from_first(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """What `make` returns in the first process, in each of them: int64 of this shape, on the CPU."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast

        made = make() if self.rank == 0 else torch.zeros(shape, dtype=torch.int64)
        return broadcast(made.to(self.device)).cpu()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()
