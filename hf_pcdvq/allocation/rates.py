"""The settings that an allocation chooses from: their bytes in a module, and their error."""

from __future__ import annotations

import torch
from torch import nn

from ..codecs import SETTINGS, Codec
from ..config import PackedConfig
from ..modules import dense_weights

# Normal weights on which the error of a setting is measured. It is a sum over many independent weights: within 1 %.
_ROWS, _COLUMNS = 256, 512


def own_settings(config: PackedConfig) -> dict[str, Codec]:
    """The settings of the config's own format at all its rates, by increasing bits."""
    names = [name for name, (codec, _) in SETTINGS.items() if codec is type(config.codec)]
    codecs = {name: config.codec_with_setting(name) for name in names}
    return dict(sorted(codecs.items(), key=lambda item: item[1].bits))


def shared_settings(config: PackedConfig) -> dict[str, Codec]:
    """The settings that belong to no method, and may be mixed with those of any: int8."""
    return {name: config.codec_with_setting(name) for name, (codec, _) in SETTINGS.items() if codec.method is None}


def packed_bytes(codec: Codec, module: nn.Module) -> int:
    """Bytes that the weights of a dense module take on disk: codes, companions and padding."""
    total = 0
    for weight in dense_weights(module).values():
        *stack, rows, columns = weight.shape
        one = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in codec.specs(rows, columns).values())
        total += torch.Size(stack).numel() * one
    return total


def fits(codec: Codec, module: nn.Module) -> bool:
    """Whether a codec can hold the weights of a module, and takes less than they do."""
    weights = dense_weights(module).values()
    dense = sum(weight.numel() * weight.element_size() for weight in weights)
    return all(weight.shape[-1] % codec.multiple == 0 for weight in weights) and packed_bytes(codec, module) < dense


def measured_error(codec: Codec) -> float:
    """Squared error per weight on normal weights of unit variance, rounded to the nearest codes."""
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    return codec.relative_error(weight, codec.encode(weight))
