"""What the fields of a record may hold. A record beside a downloaded model was written by a stranger."""

from __future__ import annotations

from typing import Any


def short_text(field: str, value: Any, limit: int = 500) -> str:
    """A string of 1 to `limit` characters.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise ValueError(f"{field} must be a text of 1 to {limit} characters, got {_start(value)}")
    return value


def short_texts(field: str, value: Any, entries: int = 100) -> dict[str, str]:
    """A dictionary of at most `entries` short texts by short names.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    if not isinstance(value, dict) or len(value) > entries:
        raise ValueError(f"{field} must be an object of at most {entries} texts, got {_start(value)}")
    for name, text in value.items():
        short_text(f"a name in {field}", name)
        short_text(f"{field}.{name}", text)
    return value


def number(field: str, value: Any) -> float | int:
    """A number, which may be infinite or NaN.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    if type(value) not in (int, float):  # True is an int, but no number
        raise ValueError(f"{field} must be a number, got {_start(value)}")
    return value


def positive_integer(field: str, value: Any) -> int:
    """An integer from 1 to 2^60.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    if type(value) is not int or not 1 <= value <= 1 << 60:
        raise ValueError(f"{field} must be a positive integer, got {_start(value)}")
    return value


def _start(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
