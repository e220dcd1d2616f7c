"""Codecs as a packed file records them: the name of a setting, and what the name does not determine."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from . import SETTINGS, Codec, codec_of_setting
from .base import one_of

_BLOCKS = (0, *(1 << power for power in range(3, 11)))


def description(codec: Codec) -> dict[str, Any]:
    """JSON-serializable fields from which `codec_described` makes the codec again.

    Raises:
        ValueError: no setting has the codec's format.
    """
    names = [setting for setting in SETTINGS if codec_of_setting(setting, *_rotation(codec)).format == codec.format]
    if not names:
        raise ValueError(f"no setting describes {codec}")
    # With the name of a setting without rotation if the codec has none, and there is one.
    setting = min(names, key=lambda name: SETTINGS[name][1].get("hadamard", True) != bool(codec.max_block))
    base = codec_of_setting(setting, *_rotation(codec))
    own = {field.name: getattr(codec, field.name) for field in fields(codec)}
    different = {name: value for name, value in own.items() if value != getattr(base, name)}
    return {"setting": setting, "hadamard_block": codec.max_block, "hadamard_seed": codec.seed, **different}


def _rotation(codec: Codec) -> tuple[int, int]:
    return codec.max_block, codec.seed


def codec_described(described: Any) -> Codec:
    """The codec with a description.

    Raises:
        ValueError: the description is not complete, or holds an unknown field or value.
    """
    if not isinstance(described, dict):
        raise ValueError(f"a codec must be described by an object, got {described!r:.100}")
    own = dict(described)
    setting = one_of("setting", own.pop("setting", None), tuple(SETTINGS))
    block, seed = own.pop("hadamard_block", None), own.pop("hadamard_seed", None)
    if type(block) is not int or block not in _BLOCKS:
        raise ValueError(f"hadamard_block must be 0 or a power of two from 8 to 1024, got {block!r:.100}")
    if type(seed) is not int or not 0 <= seed < 1 << 31:
        raise ValueError(f"hadamard_seed must be an integer from 0 to {(1 << 31) - 1}, got {seed!r:.100}")
    kind, base = SETTINGS[setting]
    unknown = own.keys() - (inspect.signature(kind.of).parameters.keys() - {"max_block", "seed", *base})
    if unknown:
        raise ValueError(f"{setting} has no field {', '.join(map(repr, sorted(unknown)))}")
    return codec_of_setting(setting, block, seed, **own)
