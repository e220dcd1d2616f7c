"""The texts of quality.py and compare_peers.py: files of the user's own, else ../shared/data, else the Hub."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pcdvq.evaluation.tasks import wikitext2

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WIKITEXT2 = "WikiText-2 test"
CALIBRATION = "wikitext2_train"
# Stand-ins for the files in ../shared/data/calibration, which are excerpts of the same texts.
ON_HUB = {CALIBRATION: "Salesforce/wikitext:wikitext-2-raw-v1", "c4": "allenai/c4:en"}


@dataclass(frozen=True)
class Texts:
    """What to evaluate and calibrate on.

    Attributes:
        text: a text file to evaluate on; None for the WikiText-2 test text.
        dataset: what to calibrate on: a text or .jsonl file, or a data set on the Hub; None for the text that a row
            names.
    """

    text: Path | None = None
    dataset: str | None = None

    @property
    def evaluation_name(self) -> str:
        return WIKITEXT2 if self.text is None else self.text.name

    def evaluation_text(self) -> str:
        """The text to evaluate on.

        Raises:
            OSError: it is neither in ../shared/data nor can the Hub be reached.
            ImportError: it would come from the Hub, and the package `datasets` is not installed.
        """
        file = self.text or SHARED / "wikitext2" / "test.txt"
        if self.text is None and not file.is_file():
            return wikitext2()
        return file.read_bytes().decode("utf-8")  # line ends are part of the text

    def calibration_name(self, name: str) -> str:
        """What to call the calibration text of a row that names `name`."""
        if self.dataset is None:
            return name
        return Path(self.dataset).name if Path(self.dataset).is_file() else self.dataset

    def calibration_data(self, name: str) -> str | Path:
        """The same text as `quantize_model` and `read_windows` take it: a path, or a name on the Hub."""
        file = SHARED / "calibration" / f"{name}.txt"
        return self.dataset or (file if file.is_file() else ON_HUB[name])


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add --text and --dataset."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help=f"text file to evaluate on (default: {WIKITEXT2}, from ../shared/data or else the Hub)",
    )
    parser.add_argument(
        "--dataset",
        metavar="DATA",
        help="text or .jsonl file, or data set on the Hub, to calibrate on (default: the text that a row names, from "
        "../shared/data or else the Hub)",
    )


def texts_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Texts:
    """The texts that were asked for; ends the program if a file is missing."""
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text {args.text}: there is no such file")
    looks_like_a_file = args.dataset is not None and Path(args.dataset).suffix in (".txt", ".jsonl")
    if looks_like_a_file and not Path(args.dataset).is_file():
        parser.error(f"--dataset {args.dataset}: there is no such file")
    return Texts(args.text, args.dataset)


def read_results(file: Path, expected: dict[str, str] | None) -> dict[str, Any]:
    """A file of results, or one without rows if the file does not exist.

    Args:
        file: JSON with "rows" and, since texts can be chosen, the name of the evaluation text as "text" and that of the
            calibration text of all rows, if there is one, as "calibration_text".
        expected: what the file must hold under these keys, or the program ends; None accepts any texts.
    """
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    content = {"text": WIKITEXT2, "calibration_text": CALIBRATION, **content}
    if expected is None or not content["rows"]:
        return content
    for key, name in expected.items():
        if content[key] != name:
            sys.exit(
                f"{file}: its {key} is {content[key]!r}, not {name!r}; rows of both do not mix. Give another --out"
            )
    return content
