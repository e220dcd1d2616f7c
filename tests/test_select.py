"""Which layers are packed: lists to skip and to pack, layers that do not fit, and the reasons reported for them."""

import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.modules import QuantLinear


def packed_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.fixture(scope="module")
def odd_model_dir(tmp_path_factory):
    """down_proj has 72 inputs, which fits 2.0-bit PCDVQ, but neither groups of 64 nor 2.25-bit PCDVQ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("odd")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_user_skips_add_to_the_defaults(tiny_model_dir):
    model = load(tiny_model_dir, PcdvqConfig(modules_to_not_convert=["down_proj", "model.layers.1"]))
    names = packed_names(model)
    assert "model.layers.0.mlp.up_proj" in names
    assert not any("down_proj" in name or "layers.1." in name or "lm_head" in name for name in names)


def test_skips_survive_saving_and_the_missing_prefix_of_auto_model(tiny_model_dir, tmp_path):
    model = load(tiny_model_dir, PcdvqConfig(modules_to_not_convert=[r"model\.layers\.1\.mlp"]))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert [f"model.{name}" for name in packed_names(base)] == packed_names(model)
    assert "layers.1.mlp.up_proj" not in packed_names(base)


def test_only_the_asked_layers(tiny_model_dir, tmp_path):
    model = load(tiny_model_dir, PcdvqConfig(modules_to_convert=["q_proj", "lm_head"]))
    assert packed_names(model) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)] + ["lm_head"]
    model.save_pretrained(tmp_path)
    assert packed_names(AutoModelForCausalLM.from_pretrained(tmp_path)) == packed_names(model)


@pytest.mark.parametrize("config", [CcqConfig(), PcdvqConfig(bits=2.25)])
def test_layers_that_do_not_fit_are_left_and_listed_once(odd_model_dir, config, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "hf_pcdvq"):
        model = load(odd_model_dir, config)
    summaries = [record.getMessage() for record in caplog.records if "left unpacked" in record.getMessage()]
    assert len(summaries) == 1
    assert "Packed 12 layers" in summaries[0]
    why = f"72 input features are not a multiple of {config.codec.multiple} (x2)"
    assert f"model.layers.*.mlp.down_proj.weight: {why}" in summaries[0]
    model.save_pretrained(tmp_path)
    caplog.clear()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.left_unpacked["model.layers.*.mlp.down_proj.weight"] == why
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert not caplog.records


def test_a_finer_setting_packs_what_a_coarser_one_cannot(odd_model_dir):
    assert "model.layers.0.mlp.down_proj" in packed_names(load(odd_model_dir, PcdvqConfig(bits=2.0)))


ASKED = [
    ("model.layers.0.mlp.down_proj", r"'model.layers.0.mlp.down_proj', which cannot be packed: 72 input features"),
    ("down_proj", r"'down_proj' matches no layer that can be packed"),
    ("model.embed_tokens", r"'model.embed_tokens', which cannot be packed: embedding"),
    ("o_porj", r"'o_porj' matches no layer that can be packed"),
]


@pytest.mark.parametrize("name, message", ASKED)
def test_asking_for_what_cannot_be_packed_raises(odd_model_dir, name, message):
    with pytest.raises(ValueError, match=message):
        load(odd_model_dir, CcqConfig(modules_to_convert=[name]))


def test_asking_for_a_tied_head_raises(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'lm_head', which cannot be packed: tied to another weight"):
        load(tmp_path, PcdvqConfig(modules_to_convert=["lm_head"]))


def test_other_layer_types_are_named(tmp_path):
    """GPT-2 keeps its weights in Conv1D modules: nothing can be packed, and the error says why."""
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no layer that .* can pack.*Conv1D .* is not nn.Linear"):
        load(tmp_path, PcdvqConfig())
