"""What the documents quote and link to is there."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_pcdvq_cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "tools" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model_cards").rglob("README.md")),
]


def source_text():
    """All string literals of the packages, in a row, with what is filled in written as `…`."""
    folders = (ROOT / "hf_pcdvq", ROOT / "hf_pcdvq_cli", ROOT / "autoload", ROOT / "kernels" / "torch-ext")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    text = "".join(file.read_text() for file in files)
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # literals that go on in the next line
    return re.sub(r"…[^\w]*…", "…", re.sub(r"\{[^{}]*\}|%[ds]", "…", text))


def quoted_messages():
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    cells = [row.split(" | ")[0] for row in rows if row.startswith("| ") and "from Transformers" not in row]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_error_messages_are_those_of_the_code(message):
    source = source_text()
    parts = [part.strip(" '") for part in message.split("…")]
    for part in parts:
        assert part in source, part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page):
    for line in re.findall(r"^hf-pcdvq .*$", page.read_text(), re.MULTILINE):
        words = line.split("#")[0].split()
        shown = CliRunner().invoke(main, [words[1], "--help"])
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, line


# Where the documents count paths from.
BASES = [ROOT, *(ROOT / folder for folder in ("hf_pcdvq", "kernels/torch-ext", "kernels/torch-ext/hf_pcdvq_kernels"))]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "kernels" / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_paths_exist(page):
    """Paths in code spans and in commands."""
    found = re.findall(r"(?<![\w./<-])((?:\w+/)+[\w.]+\.(?:py|sh|md|yaml|safetensors))", page.read_text())
    for path in found:
        if not path.startswith(("smollm2", "quickstart/", "my", "other/")):  # a user's own
            assert any((base / path).exists() for base in (page.parent, *BASES)), path


def test_the_tree_in_contributing_is_the_tree():
    """Every folder and file that it lists is there, and every folder of the packages is listed."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    folder = inner = ROOT
    listed = set()
    for line in block.strip().splitlines():
        entry = re.match(r"( {0,2})([\w./-]+(?:/|\.py))(?: |$)", line)
        if entry is not None:
            inner = (folder if entry[1] else ROOT) / entry[2]
            assert inner.exists(), line
            listed.add(inner)
            folder = folder if entry[1] else inner
        if inner.is_dir():  # files in it, and those that stand beside files
            for name in re.findall(r"(?<![\w/])(\w+\.py)\b", line):
                assert (inner / name).exists() or (folder / name).exists(), line
    packages = [file.parent for base in BASES[1:2] + BASES[3:] for file in base.glob("*/__init__.py")]
    assert listed.issuperset(packages), sorted(set(packages) - listed)


def test_nothing_sends_readers_to_pypi_for_what_is_not_there():
    """Anybody could register the names of these distributions."""
    text = source_text() + "".join(file.read_text() for file in PAGES)
    text += (ROOT / "hf_pcdvq" / "publish" / "data" / "model_card.md").read_text()
    assert not re.findall(r"pip install [^`\n]*hf_pcdvq\b(?!\S*/)[^`\n]*", text)


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_every_script_is_in_the_readme_of_its_folder(folder):
    text = (ROOT / folder / "README.md").read_text()
    assert all(f"`{script.name}`" in text for script in (ROOT / folder).glob("*.py"))
    for script in re.findall(rf"python ({folder}/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_nothing_published_names_a_place_on_the_machine_that_made_it():
    published = [*PAGES, *(ROOT / "model_cards").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.json")]
    for file in published:
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", file.read_text()), file
