"""The loader stub of models that open as several classes, and beside other code that a config.json refers to."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from vision_models import save_tiny_qwen3_5

import hf_pcdvq
from hf_pcdvq.publish.loader_stub import add_loader_stub, remove_loader_stub
from hf_pcdvq.version import INSTALL

pytest_plugins = ["hub_fixtures"]

IDS = torch.arange(2, 30)[None]

# First as if neither trusted nor installed, then with trust.
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
folder, ids = sys.argv[1], torch.arange(2, 30)[None]
for options in ({}, {"ignore_mismatched_sizes": True}):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError as error:
        print("missing:", str(error).splitlines()[-1])
assert "hf_pcdvq" not in sys.modules
found = {}
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    found[type(model).__name__] = model(ids).logits
torch.save(found, sys.argv[2])
"""


def test_a_vision_language_model_opens_as_the_classes_of_its_original(tmp_path):
    """Its language model has a class, a config and names of its own, which Transformers takes from the whole."""
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_tiny_qwen3_5(dense)
    whole = AutoModelForImageTextToText.from_pretrained(dense, quantization_config=hf_pcdvq.PcdvqConfig())
    whole.save_pretrained(packed)
    assert add_loader_stub(packed) is None
    done = subprocess.run(
        [sys.executable, "-c", LOAD, packed, tmp_path / "logits.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("missing:") == 2 and done.stdout.count(INSTALL) == 2, done.stdout
    found = torch.load(tmp_path / "logits.pt")
    kinds = [auto.from_pretrained(dense) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)]
    assert list(found) == [type(model).__name__ for model in kinds]
    assert "Qwen3_5ForCausalLM" in found
    with torch.inference_mode():
        expected = whole(IDS).logits
    assert all(torch.equal(logits, expected) for logits in found.values())
    text = AutoModelForCausalLM.from_pretrained(packed)
    text.save_pretrained(tmp_path / "text")  # no mark of the folder it came from is left in it
    assert "hf_pcdvq" not in (tmp_path / "text/config.json").read_text()
    again = AutoModelForImageTextToText.from_pretrained(packed)
    again.save_pretrained(tmp_path / "again")
    assert "hf_pcdvq" not in (tmp_path / "again/config.json").read_text()


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def auto_map(folder):
    return json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM", "AutoModel"])
def test_other_code_for_the_model_is_kept_and_named(packed, name):
    """Of a native model whose original came with code: with trust, that code loads it."""
    others = {name: "org/original--modeling_mine.Mine"}
    edit(packed, auto_map=others)
    problem = add_loader_stub(packed)
    assert f"{name}: org/original--modeling_mine.Mine" in problem and "LlamaForCausalLM" in problem
    assert auto_map(packed) == others and not (packed / "modeling_hf_pcdvq.py").exists()
    remove_loader_stub(packed)
    assert auto_map(packed) == others


def test_code_for_a_tokenizer_stays_beside_the_stub(packed):
    others = {"AutoTokenizer": [None, "tokenization_mine.Mine"]}
    edit(packed, auto_map=others)
    assert add_loader_stub(packed) is None
    assert auto_map(packed).items() > others.items() and len(auto_map(packed)) == 3
    model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    assert model.config.auto_map == others
    model.save_pretrained(packed.parent / "saved")
    assert auto_map(packed.parent / "saved") == others
    remove_loader_stub(packed)
    assert auto_map(packed) == others and not (packed / "modeling_hf_pcdvq.py").exists()


def test_other_code_that_was_added_later_outlives_the_stub(packed):
    add_loader_stub(packed)
    own, others = auto_map(packed), {"AutoModelForSequenceClassification": "modeling_mine.Mine"}
    edit(packed, auto_map={**own, **others})
    assert "modeling_mine.Mine" in add_loader_stub(packed)
    assert auto_map(packed) == {**own, **others} and (packed / "modeling_hf_pcdvq.py").exists()
    remove_loader_stub(packed)
    assert auto_map(packed) == others and not (packed / "modeling_hf_pcdvq.py").exists()


def test_an_auto_map_that_is_none_is_refused(packed):
    edit(packed, auto_map=["modeling_mine.Mine"])
    with pytest.raises(ValueError, match=r"config\.json: auto_map must be an object"):
        add_loader_stub(packed)
