"""Strings of strangers in text: what they cannot do there, and what stays readable."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from hf_pcdvq.files.text import (
    code_block,
    code_span,
    markdown,
    visible,
    without_controls,
    without_place,
    word_without_place,
)

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![](https://evil.example/x.png)",
    "a | b | c",
    "`code` **bold** _lean_ ~~gone~~ $x$",
    "line\n# heading\n- list",
    "x\n```\n# out of the block\n````",
    "https://evil.example and www.evil.example",
    "back\\slash \\` \\| end\\",
    "&lt;script&gt;",
    "\x1b]0;title\x07\x1b[2J\u202edesrever",
    "<!-- hidden",
]


class Read(HTMLParser):
    """The elements and the text of what Markdown makes of a source."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text = set(), ""
        self.feed(MarkdownIt().enable(["table", "strikethrough"]).render(source))

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)

    def handle_data(self, data):
        self.text += data


CELL = {"table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_a_cell_is_read_as_it_is(text):
    read = Read(f"| head |\n|---|\n| {markdown(text)} |")
    assert read.elements == CELL
    assert "".join(read.text.split()) == "head" + "".join(visible(text).split())
    assert "://" not in markdown(text) and "www." not in markdown(text)  # which GitHub makes a link of


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_a_cell_ends_where_it_should(text):
    read = Read(f"| head |\n|---|\n| {code_span(text)} |")
    assert read.elements == CELL | {"code"}
    shown = visible(text).replace("`", r"\x60").replace("|", r"\x7c")
    assert "".join(read.text.split()) == "head" + "".join(shown.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_block_of_code_holds_everything(text):
    read = Read(f"{code_block(text, 'bash')}\n")
    assert read.elements == {"pre", "code"}
    assert read.text.strip() == visible(text, keep="\n")


def test_names_as_they_should_be_are_not_changed():
    for name in (
        "model.layers.0.mlp",
        "Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads",
        "acc_norm",
        "0.71 ± 0.01",
        "Größe",
    ):
        assert markdown(name) == visible(name) == without_controls(name) == name
    assert code_span("model.layers.*.mlp.down_proj") == "`model.layers.*.mlp.down_proj`"


def test_controls_become_visible_and_scripts_stay():
    assert visible("a\x1b[31m\u202eb\nc") == r"a\x1b[31m\u202eb\nc"
    assert without_controls("a\x1b[31m\x9b\r\n\tनमस्ते \u200d") == "a\\x1b[31m\\x9b\\r\n\tनमस्ते \u200d"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/me/secret/wiki.txt", "wiki.txt"),
        ("/home/me/model/", "model"),
        ("~/data/x.jsonl", "x.jsonl"),
        ("../me/x.txt", "x.txt"),
        ("./x.txt", "x.txt"),
        (r"C:\Users\me\x.txt", "x.txt"),
        ("--text=/home/me/x.txt", "--text=x.txt"),
        ("data/wiki.txt", "data/wiki.txt"),
        ("Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext:wikitext-2-raw-v1"),
        (r"\.self_attn\.=int8", r"\.self_attn\.=int8"),
        ("--no-calibration", "--no-calibration"),
    ],
)
def test_only_places_on_this_machine_are_shortened(word, shown):
    assert word_without_place(word) == shown
    if not word.startswith("--"):
        assert without_place(word) == shown
