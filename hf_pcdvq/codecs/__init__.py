"""Codecs between weights and packed tensors: one file per method, and one table of all of them."""

from __future__ import annotations

from typing import Any

from .base import Codec, one_of
from .convolutional import ConvolutionalCodec
from .polar import PolarCodec
from .scalar import ScalarCodec
from .stream import StreamCodec

CODECS: tuple[type[Codec], ...] = (PolarCodec, ConvolutionalCodec, StreamCodec, ScalarCodec)
# Codecs by setting name, with the config fields that describe them.
SETTINGS: dict[str, tuple[type[Codec], dict[str, Any]]] = {
    name: (codec, fields) for codec in CODECS for name, fields in codec.settings().items()
}


def codec_of_setting(setting: str, max_block: int, seed: int, **own: Any) -> Codec:
    """The codec of a named setting.

    Args:
        max_block, seed: of the rotation; ignored by settings without one.
        own: fields of the codec that differ from the setting's.

    Raises:
        ValueError: unknown setting, or a field has a value that is not allowed.
    """
    codec, fields = SETTINGS[one_of("setting", setting, tuple(SETTINGS))]
    rotated = fields.get("hadamard", True)
    own = {**{name: value for name, value in fields.items() if name != "hadamard"}, **own}
    return codec.of(max_block if rotated else 0, seed, **own)


__all__ = ["CODECS", "SETTINGS", "Codec", "codec_of_setting"]
