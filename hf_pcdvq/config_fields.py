"""The fields of a config, each validated: what is returned is the value, what is wrong raises a ValueError that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .codecs import SETTINGS
from .codecs.base import one_of

_PATTERN_LIMIT = 1000  # characters


@contextmanager
def named(owner: str) -> Iterator[None]:
    """Prefix errors about a field with the name of the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


def names(field: str, value: Any) -> list[str] | None:
    """A list of names of modules, or patterns."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{field} must be a list of module names or patterns, got {value!r}")
    return list(value)


def reasons(value: Any) -> dict[str, str]:
    """Reasons by names of parameters."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ValueError(f"left_unpacked must map names of parameters to reasons, got {value!r:.100}")
    return dict(value)


def integer(field: str, value: Any, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{field} must be an integer from {low} to {high}, got {value!r}")
    return value


def overrides_of(value: Any) -> dict[str, str | None]:
    """Names of settings, or None, by regular expressions."""
    try:
        overrides = {} if value is None else dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"overrides must map patterns to settings, got {value!r}") from error
    for pattern, setting in overrides.items():
        if not isinstance(pattern, str) or len(pattern) > _PATTERN_LIMIT:
            raise ValueError(f"overrides: {pattern!r:.100} is not a text of up to {_PATTERN_LIMIT} characters")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"overrides: {pattern!r} is not a regular expression: {error}") from error
        if setting is not None:
            one_of(f"overrides[{pattern!r}]", setting, tuple(SETTINGS))
    return overrides


def setting_or_none(field: str, value: Any) -> str | None:
    """The name of a setting, or None."""
    return None if value is None else one_of(field, value, tuple(SETTINGS))
