"""Every kind of damage to a packed folder is detected and named."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

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


def test_dense_model_is_not_a_packed_one(tiny_model_dir):
    with pytest.raises(ValueError, match="is not packed"):
        check_folder(tiny_model_dir)
