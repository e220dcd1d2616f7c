"""`allocate`: from a dense model and windows of tokens to the bits of every group of layers.

1. The model is calibrated at the smallest setting. What that makes of one group of layers at a time is put into the original,
   and the divergence of its predictions measured: the sensitivity of the group.
2. The sensitivity at the other settings is that at the smallest, in proportion to their squared errors.
3. Settings are chosen for the least sum of sensitivities within the bytes (`choose.py`).
4. The model is calibrated with these settings and with the uniform one, and the better is kept.

The model is dense again after each step, and unchanged in the end.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import HeldActivations
from ..calibration.blocks import find_blocks
from ..calibration.held_out import HeldOut
from ..calibration.identity import Identity, model_identity, run_identity
from ..calibration.shares import Shares
from ..calibration.store import BlockStore
from ..calibration.weights import ModelWeights
from ..config import PackedConfig
from ..files.fields import number
from ..modules import PackedModule
from ..progress import progress_of
from .budget import Budget, Choice
from .choose import Option, choose
from .dense import quantized, with_errors_of
from .groups import Group, find_groups
from .rates import measured_error
from .replay import Replay
from .report import Allocation, GroupBits, Measured
from .store import FOLDER, MIXED, RESULT, SENSITIVITY, SMALLEST, UNIFORM, RecordStore
from .windows import Windows

_GRAIN = 32  # bytes; no header changes by less

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What every step needs."""

    model: nn.Module
    prefix: str
    names: list[str]
    config: PackedConfig
    windows: Windows
    device: torch.device
    folder: Path | None
    identity: Identity | None
    restart: bool
    progress: bool

    def quantized(self, name: str, config: PackedConfig) -> AbstractContextManager[dict[str, PackedModule]]:
        """The model calibrated according to a config; `name` is that of the folder that keeps its blocks."""
        store = None
        if self.folder is not None:
            store = BlockStore(self.folder / name, self._identity_of(config, self.windows.calibration), self.restart)
        return quantized(
            self.model,
            self.prefix,
            self.names,
            config.codec_of,
            config.calibration,
            self.windows.calibration,
            device=self.device,
            store=store,
            progress=self.progress,
        )

    def records(self, name: str, config: PackedConfig) -> RecordStore:
        """Kept figures of a model that is quantized according to a config."""
        if self.folder is None:
            return RecordStore(None, {}, False)
        identity = self._identity_of(config, self.windows.all_tokens())
        return RecordStore(self.folder / f"{name}.json", identity, self.restart)

    def _identity_of(self, config: PackedConfig, tokens: Tensor) -> Identity:
        at_once = Shares.of(self.windows.calibration, self.device).at_once
        return run_identity(self.identity, self.names, config, tokens, self.device, at_once)


def allocate(
    model: nn.Module,
    names: list[str],
    config: PackedConfig,
    windows: Windows,
    *,
    device: torch.device,
    work_dir: Path | None = None,
    identity: Identity | None = None,
    restart: bool = False,
    progress: bool = True,
) -> Allocation:
    """Choose the bits of every group of layers of a dense model for the target of a config.

    Args:
        model: a dense causal language model on one device; unchanged in the end. While sensitivities are measured it is
            moved to `device` as a whole.
        names: the modules to pack, linear layers and fused experts.
        config: with `bits="auto"`, a target, and in `calibration` the options. Modules that its overrides match keep what
            these say.
        windows: what to calibrate, to probe and to compare on.
        device: where blocks are computed.
        work_dir: folder that keeps finished parts, from which an interrupted allocation resumes; None keeps nothing.
        identity: of the model, see `calibration.identity`; computed if needed.
        restart: compute again what `work_dir` holds of another run, instead of refusing it.
        progress: show the progress.

    Returns:
        The allocation, with the better of the mixed and the uniform settings.

    Raises:
        ValueError: the target is outside what the settings can reach, or the model has no output head.
        NotImplementedError: the decoder blocks cannot be run one by one.
        OSError: `work_dir` cannot be written.
    """
    started = time.perf_counter()
    if model.get_output_embeddings() is None:
        raise ValueError(f'bits="auto" compares predictions, and {type(model).__name__} has no output head')
    training = model.training
    model.eval()
    try:
        prefix = find_blocks(model, names)
        free = [name for name in names if not config.overridden(name)]
        groups = find_groups(model, prefix, free, windows.probe[0])
        budget = Budget(model, prefix, names, groups, config)
        folder = None if work_dir is None else work_dir / FOLDER
        identity = model_identity(model) if folder is not None and identity is None else identity
        work = _Work(model, prefix, names, config, windows, device, folder, identity, restart, progress)
        kept = work.records(RESULT, config)
        if kept.value("allocation", Allocation.from_dict) is None:
            kept.add("allocation", _allocate(work, groups, budget, started).to_dict())
        return Allocation.from_dict(kept.values["allocation"])
    finally:
        model.train(training)


def _allocate(work: _Work, groups: list[Group], budget: Budget, started: float) -> Allocation:
    sensitivities = _sensitivities(work, groups, budget)
    errors = {name: measured_error(codec) for name, codec in budget.settings.items()}
    proposed = _choose(groups, budget, sensitivities, errors)
    uniform, mixed = budget.uniform(budget.base), budget.chosen(budget.base, proposed)
    measured_uniform, measured_mixed = _compare(work, budget, uniform, mixed)
    better, reason = _verdict(measured_uniform, measured_mixed)
    final = proposed if better else {group.name: budget.uniform_setting(group, budget.base) for group in groups}
    return Allocation(
        target=str(work.config.target),
        limit=budget.ceiling,
        base=budget.base,
        overrides=[list(pair) for pair in (mixed if better else uniform).overrides.items()],
        groups=[
            GroupBits(
                group.block,
                group.kind,
                list(group.modules),
                group.weights,
                sensitivities[group.name],
                proposed[group.name],
                final[group.name],
                budget.nbytes(group, final[group.name]),
            )
            for group in groups
        ],
        errors=errors,
        uniform=measured_uniform,
        mixed=measured_mixed,
        kept="mixed" if better else "uniform",
        reason=reason,
        seconds=time.perf_counter() - started,
    )


def _sensitivities(work: _Work, groups: list[Group], budget: Budget) -> dict[str, float]:
    """Divergence of the original with the error of the smallest setting in one group, by the group's name."""
    smallest = budget.uniform(budget.smallest)
    # The error of the codes alone: a correction is for changed inputs, which the original does not have.
    smallest.calibration = replace(smallest.calibration, correction=0.0)
    store = work.records(SENSITIVITY, smallest)
    missing = [group for group in groups if store.value(group.name, _nats) is None]
    if not missing:
        return store.values
    home = next(work.model.parameters()).device
    with work.quantized(SMALLEST, smallest) as packed:
        pass
    try:
        work.model.to(work.device)
        replay = Replay(work.model, work.prefix, work.windows.probe, work.device)
        bar = progress_of(missing, desc="Sensitivities", unit="group", shown=work.progress)
        with replay.running():
            for group in bar:
                for name in group.modules:
                    packed[name].to(work.device)
                with with_errors_of(work.model, group, packed):
                    store.add(group.name, _probed(work, group, replay))
                bar.set_postfix_str(f"{group.name} {store.values[group.name]:.5f}", refresh=False)
    finally:
        work.model.to(home)
    return store.values


def _probed(work: _Work, group: Group, replay: Replay) -> float:
    """The divergence of the model as it is, with the error of one group."""
    found = replay.divergence(group.block)
    if not math.isfinite(found):
        raise ValueError(
            f"with {', '.join(group.modules)} as quantized, the predictions of {type(work.model).__name__} are not "
            f"comparable: mean KL {found}. Leave these layers out (--skip, modules_to_not_convert), or give them a setting "
            "with an override"
        )
    return found


def _nats(value: Any) -> float:
    """A divergence that was kept."""
    if math.isnan(found := number("a divergence", value)):
        raise ValueError("a divergence is NaN")
    return found


def _choose(groups: list[Group], budget: Budget, sensitivities: dict[str, float], errors: dict[str, float]) -> Choice:
    """The setting of every group."""
    allowed = [budget.allowed(group) for group in groups]
    options = [
        [
            Option(budget.nbytes(group, name), sensitivities[group.name] * errors[name] / errors[budget.smallest])
            for name in names
        ]
        for group, names in zip(groups, allowed)
    ]

    def chosen(room: int) -> Choice:
        indices = choose(options, room)
        return {group.name: names[index] for group, names, index in zip(groups, allowed, indices)}

    def fits(choice: Choice) -> bool:
        return budget.total(budget.chosen(budget.base, choice)) <= budget.ceiling

    best = {group.name: budget.uniform_setting(group, budget.base) for group in groups}
    room = budget.ceiling - budget.total(budget.uniform(budget.base))
    room += sum(budget.nbytes(group, best[group.name]) for group in groups)
    if fits(choice := chosen(room)):
        return choice
    # The header of a file, which counts towards its size, depends on the choice.
    least = sum(min(option.nbytes for option in group) for group in options)
    while room - least > _GRAIN:
        middle = (least + room) // 2
        if fits(choice := chosen(middle)):
            best, least = choice, middle
        else:
            room = middle
    return best


def _compare(work: _Work, budget: Budget, uniform: PackedConfig, mixed: PackedConfig) -> tuple[Measured, Measured]:
    """The bytes and the divergence of two models; the latter only if they differ."""
    if uniform.overrides == mixed.overrides:
        same = _measured(budget, uniform, None)
        return same, same
    weights = ModelWeights(work.model)
    held_out = HeldOut(weights, work.prefix, work.windows.check, work.device, HeldActivations, work.progress)
    found = []
    for name, config in ((UNIFORM, uniform), (MIXED, mixed)):
        store = work.records(name, config)
        if store.value("kl", _nats) is None:
            with work.quantized(name, config):
                store.add("kl", held_out.compare(weights).kl_mean)
        found.append(_measured(budget, config, store.values["kl"]))
    return found[0], found[1]


def _measured(budget: Budget, config: PackedConfig, kl: float | None) -> Measured:
    nbytes = budget.packed(config)
    return Measured(nbytes, 8 * nbytes / budget.weights, kl)


def _verdict(uniform: Measured, mixed: Measured) -> tuple[bool, str]:
    """Whether the mixed model is kept, and why it is or is not."""
    if mixed.kl is None or uniform.kl is None:
        return False, "the best allocation within the target is the uniform setting"
    figures = f"its KL is {mixed.kl:.4f} where that of the uniform setting is {uniform.kl:.4f}"
    if mixed.kl < uniform.kl:
        return True, figures
    logger.warning('bits="auto": the uniform setting is kept, because the mixed one is not better: %s', figures)
    return False, f"the mixed one is not better: {figures}"
