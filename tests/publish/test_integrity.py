"""Every kind of damage to a packed folder is detected and named."""

import builtins
import json
import os
import sys
from pathlib import Path

import hf_pcdvq_kernels
import pytest
import torch
import transformers
from click.testing import CliRunner
from foreign_files import without_record
from hf_pcdvq_kernels.constants import codebook_digest
from safetensors import safe_open
from safetensors.torch import load_file

from hf_pcdvq.files.headers import read_header
from hf_pcdvq.files.packing import save_file
from hf_pcdvq.publish.integrity import check_folder
from hf_pcdvq_cli import main

pytest_plugins = ["hub_fixtures"]

LAYER = "model.layers.0.mlp.up_proj"


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder, name, edit):
    """Apply `edit` to the dictionary of tensors in the shard that holds a tensor, and save it with fitting hashes."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    edit(tensors)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file(tensors, file, metadata)


def drop(name):
    return lambda folder: change(folder, name, lambda tensors: tensors.pop(name))


def add(folder):
    change(folder, "lm_head.weight", lambda tensors: tensors.update({"model.layers.7.extra": torch.zeros(2)}))


def reshape(folder):
    change(folder, "model.norm.weight", lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))


def infinite(folder):
    name = f"{LAYER}.weight_scale"

    def spoil(tensors):
        tensors[name][5] = torch.inf

    change(folder, name, spoil)


def spoil(name, value):
    """Write a value into a tensor, with fitting hashes."""

    def edit(folder):
        def fill(tensors):
            tensors[name][1] = value

        change(folder, name, fill)

    return edit


def edit_json(name, **fields):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    return edit


def flip(folder):
    """One bit of a packed word."""
    file = shard_of(folder, f"{LAYER}.weight")
    tensor = read_header(file).tensors[f"{LAYER}.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.start] ^= 1
    file.write_bytes(content)


def move(folder):
    """An entry of the index that points to another shard."""
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    weight_map = content["weight_map"]
    weight_map["model.norm.weight"] = next(
        name for name in weight_map.values() if name != weight_map["model.norm.weight"]
    )
    file.write_text(json.dumps(content))


def truncate(folder):
    file = shard_of(folder, "lm_head.weight")
    file.write_bytes(file.read_bytes()[:-1])


def other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))


def other_vocabulary(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["word"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(f"{LAYER}.weight_scale"), f"packed layer '{LAYER}' lacks {LAYER}.weight_scale"),
        (drop("model.norm.weight"), "lacks model.norm.weight, which its config.json requires"),
        (add, "contains model.layers.7.extra, which its config.json does not account for"),
        (reshape, "model.norm.weight has the shape [3], but config.json requires [128]"),
        (infinite, f"{LAYER}.weight_scale contains infinite or NaN values"),
        (spoil(f"{LAYER}.weight_scale", -1.0), "model.layers.0.mlp.up_proj.weight_scale contains negative scales"),
        (spoil("model.norm.weight", torch.nan), "model.norm.weight contains infinite or NaN values"),
        (flip, "content of model.layers.0.mlp.up_proj.weight is not what was saved"),
        (move, "model.norm.weight is not in model-"),
        (edit_json("config.json", rope_theta=7.0), "config.json: rope_theta changed after the weights were saved"),
        (edit_json("config.json", architectures={"x": 1}), "config.json: architectures must be a list of names"),
        (
            lambda folder: (folder / "generation_config.json").write_text("[1]"),
            "generation_config.json is damaged",
        ),
        (truncate, "is truncated: tensor"),
        (other_config, "config.json: intermediate_size changed after the weights were saved"),
        (other_vocabulary, "has the token id 300, but the model has 258 tokens"),
        (lambda folder: shard_of(folder, "lm_head.weight").unlink(), "is missing; expected a model saved with"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (
            lambda folder: (folder / "old.safetensors").write_bytes(b""),
            "old.safetensors does not belong to the model",
        ),
    ],
    ids=[
        "scale",
        "norm",
        "extra",
        "shape",
        "infinite",
        "negative",
        "nan",
        "bit",
        "index",
        "theta",
        "architecture",
        "generation",
        "truncated",
        "config",
        "vocabulary",
        "shard",
        "tokenizer",
        "stray",
    ],
)
def test_damage_is_named(packed, damage, message):
    damage(packed)
    with pytest.raises((ValueError, OSError)) as caught:
        check_folder(packed)
    assert message in str(caught.value)


def test_whole_folder_passes(packed):
    result = CliRunner().invoke(main, ["check", str(packed)])
    assert result.exit_code == 0, result.output
    assert "is complete: 14 packed layers" in result.stdout


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    quantization = fields.pop("quantization_config", {})
    config.update(fields)
    config["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["set_seed"], "config.json: architectures names set_seed, which is not a model of Transformers"),
        (["AutoModelForCausalLM"], "architectures names AutoModelForCausalLM, which is not a model of Transformers"),
        (["LlamaConfig"], "architectures names LlamaConfig, which is not a model of Transformers"),
        (["PreTrainedModel"], "architectures names PreTrainedModel, which is not a model of Transformers"),
        (["MixtralForCausalLM"], "architectures names MixtralForCausalLM, which takes a MixtralConfig, but"),
        (["__init__.x"], "config.json: architectures must be a list of names"),
        ("LlamaForCausalLM", "config.json: architectures must be a list of names"),
        ([5], "config.json: architectures must be a list of names"),
    ],
)
@pytest.mark.parametrize("command", ["check", "card"])
def test_only_models_are_made_of_the_class_that_a_config_names(packed, monkeypatch, architectures, message, command):
    called = []
    monkeypatch.setattr(transformers, "set_seed", called.append)
    set_config(packed, architectures=architectures)
    result = CliRunner().invoke(main, [command, str(packed), *(["me/tiny"] if command == "card" else [])])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert called == []


def test_codebook_is_one_of_the_shipped_whatever_lies_elsewhere(packed, tmp_path):
    """A path in its place would have any file read, and any values decoded with."""
    shipped = Path(hf_pcdvq_kernels.__file__).parent / "codebooks"
    tables = load_file(shipped / "pcdvq-a16-v1.safetensors")
    tables["patterns"] = tables["patterns"].float()
    save_file(tables, tmp_path / "mine.safetensors")
    path = os.path.relpath(tmp_path / "mine", shipped)
    set_config(packed, quantization_config={"codebook": path, "codebook_sha256": codebook_digest(tables)})
    result = CliRunner().invoke(main, ["check", str(packed)])
    assert result.exit_code == 1 and "codebook" in result.stderr and "mine'" in result.stderr


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(r"{witness}").write_text("code ran")
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.parametrize("command", [["check"], ["card", "me/tiny"], ["push", "me/tiny", "--dry-run"]])
def test_code_of_a_model_runs_only_if_it_is_trusted(packed, tmp_path, monkeypatch, command):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setattr(builtins, "input", lambda prompt: "n")
    witness = tmp_path / "witness"
    (packed / "modeling_mine.py").write_text(CODE.format(witness=witness))
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    set_config(packed, auto_map=auto_map, model_type="mine", architectures=["MineForCausalLM"])
    without_record(packed)
    name, *rest = command
    result = CliRunner().invoke(main, [name, str(packed), *rest])
    assert result.exit_code == 1 and "trust_remote_code" in result.stderr and not witness.exists()
    result = CliRunner().invoke(main, [name, str(packed), *rest, "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert witness.exists()


def test_dense_model_is_not_a_packed_one(tiny_model_dir):
    with pytest.raises(ValueError, match="is not packed"):
        check_folder(tiny_model_dir)
