"""The training loop of a recovery."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.divergence import NotFiniteError, divergence
from ..evaluation.metrics import Evaluation, compare_logits
from ..processes import Processes
from .settings import Recovery
from .state import Progress, RunFolder
from .teacher import Teacher
from .trained import TrainedVector

_BETAS = (0.9, 0.99)  # runs are short: the default of 0.999 would still average the first steps in the last
_INTERVAL = 10.0  # seconds between lines of progress
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SAVE = 60.0  # seconds between states on disk


class Training:
    """Trains the vector of a student towards the teacher's predictions.

    Args:
        model: the student's model, with dense modules standing in for packed ones.
        trained: its trained parameters.
        teacher: its logits on `windows`.
        windows: int64 `[n, L]` to train on.
        judge: the teacher's logits on `held_out`.
        held_out: int64 `[m, L]` to judge on.
        settings: the options.
        micro_batch: windows that pass through the models at once.
        processes: those that share the work.
        folder: where the state is kept; None keeps none.
        progress: write lines of progress to standard error.

    Attributes:
        progress: where the run is.
        step_seconds: duration of every step that this process has done.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: TrainedVector,
        teacher: Teacher,
        windows: Tensor,
        judge: Teacher,
        held_out: Tensor,
        settings: Recovery,
        *,
        micro_batch: int,
        processes: Processes,
        folder: RunFolder | None,
        progress: bool,
    ):
        self._model, self._trained, self._settings = model, trained, settings
        self._teacher, self._windows, self._judge, self._held_out = teacher, windows, judge, held_out
        self._micro_batch, self._processes, self._folder = micro_batch, processes, folder
        self._show = progress and processes.rank == 0
        self._device = trained.values.device
        self._optimizer = torch.optim.AdamW([trained.values], lr=0.0, betas=_BETAS, weight_decay=0.0, foreach=False)
        self._order = _order(len(windows), settings)
        self.progress = Progress()
        self.step_seconds: list[float] = []
        self._resumed, self._begun, self._started, self._shown, self._saved = 0, 0.0, 0.0, -math.inf, 0.0

    def run(self) -> None:
        """Train to the end, or until held-out text no longer improves, and leave the best vector in the student.

        Raises:
            NotFiniteError: the loss is infinite or NaN.
            OSError: the state cannot be written.
        """
        settings, progress = self._settings, self._resume()
        self._resumed, self._started = progress.step, time.monotonic() - progress.seconds
        self._teacher.prepare()
        self._judge.prepare()
        self._begun = self._saved = time.monotonic()  # of the steps, from whose pace the time left is estimated
        if not progress.evaluations:
            self._evaluate()
        while progress.step < settings.steps and not self._exhausted():
            self._step()
            if _is_judged(progress.step, settings):
                self._evaluate()
            if progress.step == settings.steps or time.monotonic() - self._saved > _SAVE:
                self._save()
            self._line()
        self._trained.write(progress.tensors["best"])
        progress.seconds = time.monotonic() - self._started

    # ---------------------------------------------------------------------------------------------- one step

    def _step(self) -> None:
        started = time.perf_counter()
        settings, progress = self._settings, self.progress
        numbers = self._order[progress.step * settings.batch : (progress.step + 1) * settings.batch]
        mine = numbers[self._processes.rank :: self._processes.count]
        gradient, loss = torch.zeros_like(self._trained.values), torch.zeros((), device=self._device)
        for start in range(0, len(mine), self._micro_batch):
            part = mine[start : start + self._micro_batch]
            loss += self._backward(part)
            gradient += self._trained.take_gradient()
        predictions = len(numbers) * self._windows.shape[1]
        gradient, loss = (self._processes.sum(total) / predictions for total in (gradient, loss))
        # One look at the device per step: NaN in the gradient makes its sum NaN.
        value, total = torch.stack([loss, gradient.sum()]).tolist()
        if not math.isfinite(value) or not math.isfinite(total):
            raise NotFiniteError(
                f"recovery: the {'gradient' if math.isfinite(value) else 'loss'} is not finite at step "
                f"{progress.step + 1}, with the learning rate {settings.learning_rate:g}. The model is as it was before. "
                "Lower the learning rate; in float16 activations may overflow: load both models in bfloat16 or float32"
            )
        self._trained.values.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, settings)
        self._optimizer.step()
        self._trained.limit()
        self._trained.write(self._trained.values)
        progress.losses.append(value)
        progress.step += 1
        self.step_seconds.append(time.perf_counter() - started)

    def _backward(self, numbers: list[int]) -> Tensor:
        """Add the gradient of some windows; returns their divergence, summed over the predictions.

        The sum is what is derived, and not the mean: derivatives that are smaller by thousands could vanish in float16.
        """
        teacher = self._teacher.logits(numbers).to(self._device)
        logits = self._model(input_ids=self._windows[numbers].to(self._device), use_cache=False).logits
        if logits.shape != teacher.shape:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.shape[-1]} tokens, the packed model one of {logits.shape[-1]}"
            )
        loss = divergence(logits, teacher)
        loss.backward()
        return loss.detach()

    # ----------------------------------------------------------------------------------------- held-out text

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Judge the student, and keep its vector if it is the best so far."""
        progress = self.progress
        pairs = (
            (self._judge.logits([number])[0, :-1].to(self._device), self._held_out_logits(number))
            for number in range(len(self._held_out))
        )
        result = compare_logits(pairs, self._held_out, progress=False)
        least = min((figures["kl_mean"] for _, figures in progress.evaluations), default=math.inf)
        if result.kl_mean < least:
            progress.tensors["best"] = self._trained.values.detach().clone()
        progress.evaluations.append((progress.step, asdict(result)))
        self._line(force=True)

    def _held_out_logits(self, number: int) -> Tensor:
        ids = self._held_out[number][None].to(self._device)
        return self._model(input_ids=ids, use_cache=False).logits[0, :-1]

    def _exhausted(self) -> bool:
        """Whether so many evaluations have brought nothing that the run ends.

        Those of the warm-up do not count: a rate that still rises may do harm first, and good when it falls.
        """
        warmup = self._settings.warmup * self._settings.steps
        since = self.progress.evaluations[self._best()[0] + 1 :]
        return sum(step > warmup for step, _ in since) >= self._settings.patience

    def _best(self) -> tuple[int, tuple[int, dict[str, Any]]]:
        """Number and content of the best evaluation; the earlier of equal ones."""
        return min(enumerate(self.progress.evaluations), key=lambda pair: pair[1][1]["kl_mean"])

    @property
    def before(self) -> Evaluation:
        """On held-out text before the training."""
        return Evaluation(**self.progress.evaluations[0][1])

    @property
    def best(self) -> tuple[int, Evaluation]:
        """The step of the best vector, and how it does on held-out text."""
        step, figures = self._best()[1]
        return step, Evaluation(**figures)

    # ------------------------------------------------------------------------------------ state and progress

    def _resume(self) -> Progress:
        """Go on from the state of an interrupted run, if there is one."""
        stored = self._folder.load() if self._folder else None
        if stored is not None:
            self.progress = stored
            with torch.no_grad():
                self._trained.values.copy_(stored.tensors.pop("values"))
            stored.tensors["best"] = stored.tensors["best"].to(self._device)
            moments = {name: stored.tensors.pop(name) for name in ("exp_avg", "exp_avg_sq", "step")}
            state = self._optimizer.state_dict()
            self._optimizer.load_state_dict({**state, "state": {0: moments}})
            self._trained.write(self._trained.values)
        return self.progress

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        if self._folder is not None and self._processes.rank == 0:
            tensors = {
                **self.progress.tensors,
                "values": self._trained.values,
                **self._optimizer.state[self._trained.values],
            }
            self._folder.save(Progress(**{**vars(self.progress), "tensors": tensors}))
        self._saved = time.monotonic()

    def _line(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._show or not (force or now - self._shown > _INTERVAL):
            return
        self._shown, progress = now, self.progress
        text = f"recovery: step {progress.step}/{self._settings.steps}"
        if progress.losses:
            recent = progress.losses[-8:]
            text += f", loss {sum(recent) / len(recent):.4f}"
        text += f", held out {progress.evaluations[-1][1]['kl_mean']:.4f}"
        done = progress.step - self._resumed
        if done:
            left = (now - self._begun) / done * (self._settings.steps - progress.step)
            text += f", {_duration(left)} left"
        print(text, file=sys.stderr, flush=True)


def learning_rate(step: int, settings: Recovery) -> float:
    """The rate of a step, counted from 0: it rises linearly, then falls along a cosine to a tenth of the largest."""
    done, warmup = (step + 1) / settings.steps, settings.warmup
    if done < warmup:
        return settings.learning_rate * done / warmup
    fall = (done - warmup) / (1 - warmup)
    return settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * fall)) / 2)


def _is_judged(step: int, settings: Recovery) -> bool:
    """Whether the student is judged after a step, counted from 1: `evaluations` times at even distances, the last time
    after the last step; after every step if there are fewer."""
    before, after = ((done * settings.evaluations) // settings.steps for done in (step - 1, step))
    return after > before


def _order(count: int, settings: Recovery) -> list[int]:
    """The windows of all steps: every one once in random order, then again in another."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    while len(order) < settings.steps * settings.batch:
        order += torch.randperm(count, generator=generator).tolist()
    return order[: settings.steps * settings.batch]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@contextmanager
def deterministic() -> Iterator[None]:
    """The same inputs give the same bits, also in the derivatives of attention and of indexing."""
    before, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    workspace = os.environ.get(_WORKSPACE)
    try:
        # PyTorch asks for this before every product, and warns without it. cuBLAS needs it only for several streams.
        os.environ[_WORKSPACE] = workspace or ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a matter of bugs, and of time
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        if workspace is None:
            del os.environ[_WORKSPACE]
