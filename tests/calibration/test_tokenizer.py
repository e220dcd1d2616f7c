"""The tokenizer that calibrates while a model is loaded is the model's own, wherever that comes from."""

import json
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig


def quantize(folder, text, **options):
    settings = Calibration(dataset=str(text), samples=2, length=16, holdout=1)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=PcdvqConfig(calibration=settings), **options
    )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a few small words " * 20)
    return file


def test_tokenizer_is_in_the_subfolder_of_the_model(tiny_model_dir, tmp_path, text):
    shutil.copytree(tiny_model_dir, tmp_path / "repo" / "parts" / "llm")
    model = quantize(tmp_path / "repo", text, subfolder="parts/llm")
    assert model.hf_quantizer.report.windows == 2


def test_missing_tokenizer_is_named_with_its_folder(tiny_model_dir, tmp_path, text):
    folder = shutil.copytree(
        tiny_model_dir, tmp_path / "repo" / "llm", ignore=shutil.ignore_patterns("token*", "*.jinja")
    )
    with pytest.raises(
        ValueError, match=rf"could not be loaded from {folder}: (.|\n)*config.tokenizer = AutoTokenizer"
    ):
        quantize(tmp_path / "repo", text, subfolder="llm")


def test_code_of_the_tokenizer_runs_where_that_of_the_model_may(tiny_model_dir, tmp_path, text, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # importing such code adds to it
    folder = shutil.copytree(tiny_model_dir, tmp_path / "own")
    (folder / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit(
        folder / "config.json",
        model_type="own_llama",
        auto_map={"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own_code.OwnTokenizer"]},
    )
    assert quantize(folder, text, trust_remote_code=True).hf_quantizer.report.windows == 2


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
