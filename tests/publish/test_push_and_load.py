"""A complete push over HTTP, and loading the result in new processes with empty caches."""

import json
import re
import subprocess
import sys

import pytest
import torch
from fake_hub import FakeHub
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)

import hf_pcdvq
from hf_pcdvq.publish.loader_stub import add_loader_stub
from hf_pcdvq.publish.push import planned, push_folder
from hf_pcdvq.version import INSTALL

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"
PUSH = "from hf_pcdvq_cli import main; main(prog_name='hf-pcdvq')"

# The card's own code comes first: nothing is imported that it does not import itself.
LOAD = """
import re, sys
from huggingface_hub import hf_hub_download
card = open(hf_hub_download(sys.argv[1], "README.md"), encoding="utf-8").read()
blocks = re.findall("```python\\n(.*?)```", card, re.DOTALL)
exec(blocks[0])

import torch
from transformers import pipeline
logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(2, 40)[None]).logits
torch.save(logits, sys.argv[2])
exec("\\n".join(blocks[1:]))
print("pipeline", pipeline("text-generation", sys.argv[1])("abc", max_new_tokens=8, do_sample=False))
"""

STUB = """
import sys, torch
from transformers import AutoModelForCausalLM, pipeline

def load(name):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    return model, model(torch.arange(2, 40)[None]).logits

class Missing:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "hf_pcdvq":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())  # as if it were not installed
try:
    load(sys.argv[1])
except ImportError as error:
    print("missing:", error)
del sys.meta_path[0]
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
import transformers
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print("config:", type(config).__name__, hasattr(config, "auto_map"), "hf_pcdvq" in sys.modules)
# As `transformers serve` does it: the class that the config names.
served = getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1], trust_remote_code=True)
model, logits = load(sys.argv[1])
assert torch.equal(served(torch.arange(2, 40)[None]).logits, logits)
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(base(torch.arange(2, 40)[None]).last_hidden_state @ model.lm_head.weight.T, logits)
print("base:", type(base).__name__)
untrusted = AutoConfig.from_pretrained(sys.argv[1])
assert hasattr(untrusted, "auto_map")
again = AutoModelForCausalLM.from_pretrained(sys.argv[1], config=untrusted, trust_remote_code=True)
assert torch.equal(again(torch.arange(2, 40)[None]).logits, logits)
torch.save(logits, sys.argv[2])
print("class:", type(model).__name__)
model.save_pretrained(sys.argv[3])
assert torch.equal(load(sys.argv[3])[1], logits)
print(pipeline("text-generation", sys.argv[1], trust_remote_code=True)("abc", max_new_tokens=2))
"""


def test_pushed_model_loads_in_a_new_process_bit_identically(evaluated_once, run_with, tmp_path):
    with FakeHub(lfs=True) as hub:
        options = ["--private", "--license", "mit", "--base-model", "org/tiny"]
        printed = run_with(hub, PUSH, "push", evaluated_once, REPO, *options)
        repo = hub.repos[REPO]
        assert printed.strip() == f"{hub.url}/{REPO}/commit/{repo.branches['main']}"
        shown = run_with(hub, LOAD, REPO, tmp_path / "logits.pt")
    assert repo.private
    assert repo.messages == ["initial commit", "Upload tiny-2bit, packed with hf_pcdvq"]
    written = {"README.md", ".gitattributes", "modeling_hf_pcdvq.py", "config.json"}
    files = {name: content for name, content in repo.files().items() if name not in written}
    assert files == {path.name: path.read_bytes() for path in evaluated_once.iterdir() if path.name not in written}
    marked = {"auto_map", "transformers_weights"}
    config = {name: value for name, value in json.loads(repo.files()["config.json"]).items() if name not in marked}
    assert config == json.loads((evaluated_once / "config.json").read_text())
    assert sum(name.endswith(".safetensors") for name in files) > 1
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(evaluated_once)(torch.arange(2, 40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    local = pipeline("text-generation", str(evaluated_once))("abc", max_new_tokens=8, do_sample=False)
    assert f"pipeline {local}" in shown
    assert "generated_text" in shown and "trainable params:" in shown  # what the card's further snippets print


def test_loader_stub_replaces_the_import_and_names_the_missing_package(tiny_model_dir, hub, run_with, tmp_path):
    """With a mixture of experts, whose weights Transformers would not rename for a custom-code class."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=hf_pcdvq.PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "packed")
    push_folder(tmp_path / "packed", REPO)
    shown = run_with(hub, STUB, REPO, tmp_path / "logits.pt", tmp_path / "again")
    assert (
        "missing: this model is packed with hf_pcdvq, which cannot be imported (No module named 'hf_pcdvq')" in shown
    )
    assert INSTALL in shown and "pip install hf_pcdvq" not in shown  # which Transformers would advise
    assert "class: MixtralForCausalLM" in shown
    assert "config: MixtralConfig False True" in shown and "base: MixtralModel" in shown
    assert "trust_remote_code=True" in hub.repos[REPO].files()["README.md"].decode()
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(torch.arange(2, 40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


BARE = """
import sys
from transformers import AutoModel
print("class:", type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


def test_encoder_has_a_card_whose_code_runs_and_a_loader_stub(tiny_model_dir, hub, run_with, tmp_path, caplog):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=258)).save_pretrained(tmp_path / "dense")
    packed = tmp_path / "packed"
    AutoModel.from_pretrained(tmp_path / "dense", quantization_config=hf_pcdvq.PcdvqConfig()).save_pretrained(packed)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(packed)
    card = planned(packed, REPO).card
    assert card.data.pipeline_tag is None
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    shown = run_with(hub, code.replace(REPO, str(packed)))
    assert shown == "torch.Size([1, 25, 64])\n"
    push_folder(packed, REPO, metadata={"license": "mit"})
    assert "class: BertModel" in run_with(hub, BARE, REPO)
    files = hub.repos[REPO].files()
    for name in ("config.json", "modeling_hf_pcdvq.py"):
        (packed / name).write_bytes(files[name])
    push_folder(packed, REPO, metadata={"license": "mit"})  # a folder from the Hub, sent again
    assert hub.repos[REPO].files() == files
    config = json.loads(files["config.json"])
    push_folder(packed, REPO, loader_stub=False)
    without = hub.repos[REPO].files()
    assert "modeling_hf_pcdvq.py" not in without and b"hf_pcdvq" not in without["config.json"]
    (packed / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "mine.Model"}}))
    (packed / "mine.py").touch()
    caplog.clear()
    push_folder(packed, REPO)
    assert "the model has code of its own (AutoModel: mine.Model), which is kept" in caplog.text
    sent = json.loads(hub.repos[REPO].files()["config.json"])
    assert sent["auto_map"] == {"AutoModel": "mine.Model"} and INSTALL in sent["transformers_weights"]


BARE_LOAD = """
import json, sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_without_the_plugin_the_last_line_says_what_is_missing(packed, options):
    """Also where Transformers would otherwise fill the packed layers with random weights."""
    add_loader_stub(packed)
    command = [sys.executable, "-c", BARE_LOAD, packed, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert INSTALL in last and "`import hf_pcdvq`" in last


def test_a_model_loaded_without_trust_is_saved_without_a_reference_to_the_stub(packed, hub, tmp_path):
    push_folder(packed, REPO)
    model = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    model.save_pretrained(tmp_path / "again")
    assert not {"auto_map", "transformers_weights"} & json.loads((tmp_path / "again/config.json").read_text()).keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(loaded(torch.arange(2, 40)[None]).logits, model(torch.arange(2, 40)[None]).logits)
