"""A model that is quantized for a while and is dense again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.activations import HeldActivations
from ..calibration.run import CalibratedRun
from ..calibration.settings import Calibration
from ..calibration.shares import Shares
from ..calibration.store import BlockStore
from ..calibration.weights import ModelWeights
from ..codecs import Codec
from ..modules import PackedModule, dense_weights
from ..modules.tied import tied_to, uninstall
from .groups import Group


@contextmanager
def quantized(
    model: nn.Module,
    prefix: str,
    names: list[str],
    codec_of: Callable[[str], Codec],
    settings: Calibration,
    windows: Tensor,
    *,
    device: torch.device,
    store: BlockStore | None,
    progress: bool,
) -> Iterator[dict[str, PackedModule]]:
    """The model with its layers replaced by packed ones, see `CalibratedRun`; on exit the dense ones are put back.

    Yields the packed modules by name.
    """
    modules = {name: model.get_submodule(name) for name in names}
    tied = {other: (model.get_submodule(other), modules[name]) for name in names for other in tied_to(model, name)}
    # The tensors, not the parameters: while a block is calibrated its parameters are moved and converted in place.
    tensors = {
        name: {key: (tensor.data, tensor.requires_grad) for key, tensor in module.named_parameters(recurse=False)}
        for name, module in modules.items()
    }
    try:
        run = CalibratedRun(
            ModelWeights(model),
            prefix,
            names,
            codec_of,
            replace(settings, tune_steps=0),  # it would change the weights that are put back
            Shares.of(windows, device),
            activations=HeldActivations,
            device=device,
            store=store,
            progress=progress,
        )
        run.run()
        yield {name: model.get_submodule(name) for name in names}
    finally:
        for name, module in modules.items():
            if isinstance(model.get_submodule(name), PackedModule):
                uninstall(model, name)
            for key, (tensor, requires_grad) in tensors[name].items():
                setattr(module, key, nn.Parameter(tensor, requires_grad=requires_grad))
            model.set_submodule(name, module)
        for name, (module, owner) in tied.items():
            model.set_submodule(name, module)
            module.weight = owner.weight


@contextmanager
def with_errors_of(model: nn.Module, group: Group, packed: dict[str, PackedModule]) -> Iterator[None]:
    """The dense model with the weights of one group as their packed modules decode to, in float32."""
    modules = {name: model.get_submodule(name) for name in group.modules}
    dense = {name: dict(dense_weights(module)) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            for key, weight in dense[name].items():
                decoded = packed[name].decoded(key, torch.float32).to(weight.device)
                setattr(module, key, nn.Parameter(decoded, requires_grad=False))
        yield
    finally:
        for name, module in modules.items():
            for key, weight in dense[name].items():
                setattr(module, key, weight)
