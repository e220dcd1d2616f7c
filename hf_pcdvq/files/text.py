"""Strings of strangers on their way into text: to a terminal, into Markdown, and paths into what is published.

Names of tensors, settings and records of a downloaded model may contain anything: terminal escapes, Markdown, HTML.
"""

from __future__ import annotations

import re
from pathlib import PureWindowsPath

# Everything that has a meaning within a line of GitHub's Markdown, and the bar of tables. Underscores within words have none.
_ACTIVE = re.compile(r"[\\`*\[\]<>&|~$#]|(?<!\w)_|_(?!\w)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends
# A bare address becomes a link without any brackets.
_ADDRESS = re.compile(r"(?i)(?<=\w)://|(?<=www)\.(?=\w)|(?<=\w)@(?=\w)")
_PLACE = re.compile(r"(/|~[^/\\]*[/\\]|\.{1,2}[/\\](?=\w)|[A-Za-z]:[/\\]).*", re.DOTALL)


def visible(text: str, keep: str = "") -> str:
    r"""Replace every character that is not printable by its escape, such as `\x1b`: nothing moves the cursor, hides
    text or starts a line.

    Args:
        text: any string.
        keep: characters to leave as they are, such as line ends.
    """
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def without_controls(text: str) -> str:
    r"""Replace what would steer a terminal by its escape. Everything else that people write stays, so that a text in any
    script reads as it should."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def markdown(text: str) -> str:
    """The text in a line of Markdown, or a cell of a table, where it reads as it is: no formatting, link or HTML."""
    escaped = _ACTIVE.sub(lambda match: "&#92;" if match[0] == "\\" else f"\\{match[0]}", visible(text).strip())
    return _ADDRESS.sub(lambda match: "".join(f"&#{ord(character)};" for character in match[0]), escaped)


def code_span(text: str) -> str:
    r"""The text as code within a line or a cell. Backticks and bars, which would end it, become `\x60` and `\x7c`."""
    return f"`{visible(text).replace('`', chr(92) + 'x60').replace('|', chr(92) + 'x7c').strip() or ' '}`"


def code_block(text: str, language: str = "") -> str:
    """The text as a block of code, whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text, keep=chr(10))}\n{fence}"


def without_place(path: str) -> str:
    """The last component of a path that tells where something is on this machine: an absolute one, or one that starts
    at the home, this or the parent folder. Other strings, such as names on the Hub, are returned unchanged."""
    return (PureWindowsPath(path).name or path) if _PLACE.fullmatch(path) else path


def word_without_place(word: str) -> str:
    """`without_place` for a word of a command line, `--option=path` included."""
    option, equals, value = word.partition("=")
    return f"{option}={without_place(value)}" if equals and option.startswith("-") else without_place(word)
