"""What lies beside the weights of a model that reads images is kept, or named."""

import json

import pytest
import torch
from command_line import run, succeed
from conftest import byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from vision_models import IMAGES, PROCESSOR, VISION, save_tiny_gemma3, save_tiny_qwen3_5

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.publish.push import planned, push_to_hub

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"
ROUND = ("quantize", "--no-calibration")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Shared: do not modify it."""
    folder = tmp_path_factory.mktemp("gemma") / "model"
    save_tiny_gemma3(folder, byte_tokenizer())
    return folder


def read(file):
    return json.loads(file.read_text())


def test_quantize_keeps_processor_template_and_generation_config_and_push_sends_them(gemma, tmp_path):
    packed = tmp_path / "packed"
    result = succeed(*ROUND, gemma, "--out", packed)
    assert "Warning" not in result.stderr
    assert (read(packed / "processor_config.json"), read(packed / "preprocessor_config.json")) == (PROCESSOR, IMAGES)
    kept = {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"}
    kept |= {"tokenizer.json", "tokenizer_config.json"}
    # Its head is tied, and stored under other names than those of its modules.
    assert "is complete" in succeed("check", packed).stdout
    publication = planned(packed, REPO)
    assert kept <= publication.files.keys()
    assert publication.card.data.pipeline_tag == "image-text-to-text"
    assert 'AutoModelForImageTextToText.from_pretrained("me/tiny-2bit"' in publication.card.text


def test_calibrating_leaves_the_tower_alone_says_so_and_keeps_the_processor(gemma, text, tmp_path):
    packed = tmp_path / "packed"
    options = ["--dataset", text, "--samples", 4, "--length", 32]
    result = succeed("quantize", gemma, "--out", packed, *options)
    assert "vision_tower" in result.output
    left = read(packed / "config.json")["quantization_config"]["left_unpacked"]
    assert "does not reach it" in left["model.vision_tower.encoder.layers.*.mlp.fc1.weight"]
    assert (read(packed / "processor_config.json"), read(packed / "preprocessor_config.json")) == (PROCESSOR, IMAGES)
    stored, dense = (load_file(folder / "model.safetensors") for folder in (packed, gemma))
    towers = [name for name in dense if "vision_tower" in name or "projector" in name]
    assert towers and all(torch.equal(stored[name], dense[name]) for name in towers)
    assert "is complete" in succeed("check", packed).stdout


def test_what_is_missing_is_named(gemma, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in gemma.iterdir():
        if "processor" not in file.name:
            (source / file.name).symlink_to(file)
    result = succeed(*ROUND, source, "--out", tmp_path / "packed")
    assert "Warning: the model has no processor, neither processor_config.json nor" in result.stderr
    auto_map = {"AutoProcessor": "processing_mine.Mine"}
    (source / "processor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    result = succeed(*ROUND, source, "--out", tmp_path / "again")
    assert "processor_config.json refers to code in processing_mine.py, which is not copied" in result.stderr
    (source / "processor_config.json").write_text("{")
    result = run(*ROUND, source, "--out", tmp_path / "damaged")
    assert result.exit_code == 1 and "processor_config.json: Expecting" in result.stderr


def test_push_from_python_keeps_the_processor_too(gemma, hub, caplog):
    model = AutoModelForCausalLM.from_pretrained(gemma, quantization_config=PcdvqConfig())
    push_to_hub(model, AutoTokenizer.from_pretrained(gemma), REPO, metadata={"license": "mit"})
    sent = hub.repos[REPO].files()
    assert json.loads(sent["processor_config.json"]) == PROCESSOR
    model.name_or_path = "org/gemma"
    push_to_hub(model, AutoTokenizer.from_pretrained(gemma), "me/other", metadata={"license": "mit"})
    assert "the model has no processor" in caplog.text


def test_model_that_is_no_causal_language_model_by_name_is_quantized_too(tmp_path):
    """Llava is registered for images only, unlike Gemma 3."""
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258, "max_position_embeddings": 64}
    vision = {"model_type": "siglip_vision_model", **VISION}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=257)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    succeed(*ROUND, tmp_path / "dense", "--out", tmp_path / "packed")
    assert "is complete" in succeed("check", tmp_path / "packed").stdout
    options = ["--prompt", "abc", "--max-new-tokens", 4, "--no-chat"]
    assert "4 tokens in" in succeed("generate", tmp_path / "packed", *options).stderr


def test_model_whose_language_model_is_a_class_of_its_own_keeps_what_reads_images(tmp_path):
    save_tiny_qwen3_5(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    succeed(*ROUND, tmp_path / "dense", "--out", tmp_path / "packed")
    for folder in ("dense", "packed"):
        assert read(tmp_path / folder / "config.json")["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert "is complete" in succeed("check", tmp_path / "packed").stdout
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    text.save_pretrained(tmp_path / "text")
    byte_tokenizer().save_pretrained(tmp_path / "text")
    assert "is complete" in succeed("check", tmp_path / "text").stdout
