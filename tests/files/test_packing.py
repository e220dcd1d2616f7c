"""The record in the files of a packed model: it decides what is packed and how, finds every change, and never varies."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from vision_models import save_tiny_qwen3_5

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.codecs import SETTINGS, codec_of_setting
from hf_pcdvq.codecs.description import codec_described, description
from hf_pcdvq.files.headers import read_header
from hf_pcdvq.files.names import matched_names
from hf_pcdvq.files.packing import KEY, save_file
from hf_pcdvq.modules import PackedModule

IDS = torch.arange(3, 40)[None]
RECIPE = {r"model\.layers\.0\.": "ccq-2.5-published", r"layers\.1\.mlp\.up": None, r"layers\.1\.mlp": "stream-2.0"}
LAYER = "model.layers.0.mlp.up_proj"


def hidden(model):
    with torch.inference_mode():
        return model(IDS).last_hidden_state


def packed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


@pytest.fixture(scope="module")
def mixed(tiny_model_dir, tmp_path_factory):
    """A folder packed with a head and with several settings, one without, and the hidden states of the model."""
    head, base = (tmp_path_factory.mktemp(name) for name in ("head", "base"))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=PcdvqConfig(overrides=RECIPE), dtype=torch.float32
    )
    model.save_pretrained(head)
    AutoModel.from_pretrained(head).save_pretrained(base)
    return {"head": head, "base": base}, hidden(model.model)


@pytest.fixture
def folder(mixed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(mixed[0]["head"], tmp_path / "packed")


# ------------------------------------------------------------------------------------------------ what the file decides


@pytest.mark.parametrize("saved", ["head", "base"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_every_class_decodes_the_same_weights(mixed, saved, dequantize):
    """Patterns name `model.layers...`, which `AutoModel` calls `layers...`: the recorded settings apply in both."""
    folders, expected = mixed
    options = {"quantization_config": PcdvqConfig(dequantize=True)} if dequantize else {}
    base = AutoModel.from_pretrained(folders[saved], **options)
    full = AutoModelForCausalLM.from_pretrained(folders[saved], **options)
    assert bool(packed_names(base)) != dequantize
    for model in (base, full.model):
        # decoded weights are multiplied in another order
        assert (hidden(model) - expected).norm() <= (1e-5 if dequantize else 0) * expected.norm()


def test_a_packed_model_opens_with_a_new_head(mixed, tmp_path):
    folders, expected = mixed
    for folder in folders.values():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert type(model.score) is torch.nn.Linear and model.score.weight.std() > 0
        assert torch.equal(hidden(model.model), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)


BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
}
WAV2VEC2 = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [64],
    "conv_kernel": [4], "conv_stride": [2], "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16,
    "vocab_size": 64,
}  # fmt: skip
HEADS = [
    (BertForSequenceClassification, BertConfig(**BERT, num_labels=64), "classifier"),
    (BertForTokenClassification, BertConfig(**BERT, num_labels=64), "classifier"),
    (BertForQuestionAnswering, BertConfig(**BERT, num_labels=64), "qa_outputs"),
    (Wav2Vec2ForCTC, Wav2Vec2Config(**WAV2VEC2), "lm_head"),
]


@pytest.mark.parametrize("kind, config, head", HEADS, ids=[kind.__name__ for kind, *_ in HEADS])
def test_what_a_class_adds_to_its_base_model_is_left_alone(kind, config, head, tmp_path):
    dense = kind(config)
    dense.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, quantization_config=PcdvqConfig())
    assert torch.equal(model.get_submodule(head).weight, dense.get_submodule(head).weight)
    assert packed_names(model) and not any(name.startswith(head) for name in packed_names(model))
    assert "adds it to its base model" in model.config.quantization_config.left_unpacked[f"{head}.weight"]
    asked = kind.from_pretrained(tmp_path, quantization_config=PcdvqConfig(modules_to_convert=[head]))
    assert packed_names(asked) == {head}


def test_every_codec_can_be_recorded():
    codecs = [codec_of_setting(setting, 128, 3) for setting in SETTINGS]
    codecs += [PcdvqConfig(magnitude="projection", hadamard_block=32).codec]
    codecs += [CcqConfig("stream", bits=2.5, window_bits=14, hadamard=False).codec]
    for codec in codecs:
        assert codec_described(json.loads(json.dumps(description(codec)))) == codec


def test_without_a_record_the_setting_of_the_config_applies_to_what_has_scales(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig())
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_without_a_record_several_settings_are_refused(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not say which of its settings a layer has"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_class_that_saves_under_other_names_opens_its_own_files(tmp_path):
    """The language model of one that reads images, which Transformers saves under the names of the whole."""
    save_tiny_qwen3_5(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=PcdvqConfig(overrides=RECIPE)
    )
    model.save_pretrained(tmp_path / "packed")
    assert "model.language_model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "packed/model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(again).__name__ == "Qwen3_5ForCausalLM"
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(hidden(base), hidden(model.model))
    assert {f"model.{name}" for name in packed_names(base)} == packed_names(model)


def test_names_match_at_dots_and_ambiguity_is_refused():
    known = ["model.layers.1.up", "model.layers.11.up", "text.layers.2.up", "vision.layers.2.up"]
    assert matched_names(["layers.1.up", "x.model.layers.11.up"], known) == {
        "model.layers.1.up": "layers.1.up",
        "model.layers.11.up": "x.model.layers.11.up",
    }
    assert matched_names(["layers.2.up"], known, "text") == {"text.layers.2.up": "layers.2.up"}
    assert matched_names(["ayers.1.up", "head"], known) == {}
    renamed = matched_names(["model.text.layers.1.up"], known, rename=lambda name: name.replace("text.", ""))
    assert renamed == {"model.layers.1.up": "model.text.layers.1.up"}
    with pytest.raises(ValueError, match=r"layers.2.up may be text.layers.2.up or vision.layers.2.up of this model"):
        matched_names(["layers.2.up"], known)
    with pytest.raises(ValueError, match=r"may both be model.layers.1.up"):
        matched_names(["layers.1.up", "model.layers.1.up"], known)


# --------------------------------------------------------------------------------------------------- what it can detect


def test_one_changed_bit_anywhere_is_found(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for tensor in read_header(file).tensors.values():
        position = tensor.start + tensor.nbytes // 2
        content[position] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"content of {tensor.name} is not what was saved"):
            AutoModelForCausalLM.from_pretrained(folder)
        content[position] ^= 1


def test_swapped_layers_are_found(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    places = [
        slice(tensor.start, tensor.start + tensor.nbytes)
        for tensor in (
            read_header(file).tensors[f"model.layers.{number}.input_layernorm.weight"] for number in (0, 1)
        )
    ]
    content[places[0].start] ^= 1  # so that they differ; all are ones
    content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"content of model.layers.1.input_layernorm.weight is not what was saved"):
        AutoModelForCausalLM.from_pretrained(folder)


def edit_config(folder, edit):
    content = json.loads((folder / "config.json").read_text())
    edit(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


SETTING_CHANGES = {"magnitude": "projection", "hadamard_seed": 1, "hadamard_block": 64, "overrides": []}


@pytest.mark.parametrize("field", SETTING_CHANGES)
def test_a_new_config_over_old_weights_is_refused(folder, field):
    edit_config(folder, lambda fields: fields.update({field: SETTING_CHANGES[field]}))
    with pytest.raises(ValueError, match=f"was saved with {field} .*, but config.json says"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("intermediate_size", 0, "cannot be packed in this model: it is empty"),
        ("intermediate_size", 256, "config asks for"),
    ],
)
def test_a_config_of_another_size_is_refused(folder, field, value, message):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_files_of_different_models_are_refused(mixed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixed[0]["head"])
    model.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    first, second = (sorted((tmp_path / name).glob("*.safetensors"))[0] for name in "ab")
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="were not saved together: they belong to different models"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def change_record(folder, edit):
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    record = json.loads(metadata[KEY])
    edit(record)
    save_file(load_file(file), file, {**metadata, KEY: json.dumps(record)})


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda record: record.pop("codecs"), "codecs is missing or damaged"),
        (lambda record: record.update(codecs=[["ccq-2.5", "all"]]), "codecs is missing or damaged"),
        (lambda record: record.update(format_version=9), "format_version must be an integer up to 1, got 9"),
        (lambda record: record["codecs"][0][0].update(setting="q4"), "setting must be one of .* got 'q4'"),
        (
            lambda record: record["codecs"][0][0].update(hadamard_block=100),
            "hadamard_block must be 0 or a power of two",
        ),
        (lambda record: record["codecs"][0][0].update(max_block=8), "has no field 'max_block'"),
        (
            lambda record: record["codecs"][0][1].append("model.layers.9.x"),
            "model.layers.9.x' is packed, but no file",
        ),
        (
            lambda record: record["codecs"][0][1].append("model.norm"),
            "model.norm, which cannot be packed in this model",
        ),
    ],
)
def test_a_damaged_record_is_named(folder, edit, message):
    change_record(folder, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_catastrophic_patterns_of_a_config_are_never_run(folder):
    """A file's patterns are a record. Searching for this one in a name of thirty letters takes hours."""
    evil = "^(([a-z._0-9])+.)+!$"

    def edit(fields):
        fields.update(modules_to_convert=[evil], modules_to_not_convert=[evil], overrides=[[evil, "int8"]])

    edit_config(folder, edit)
    change_record(folder, lambda record: record["settings"].update(overrides=[[evil, "int8"]]))
    AutoModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_the_same_model_always_gives_the_same_bytes(mixed, tmp_path, size):
    """However often, and by whatever class it is saved. Six files in a random order would agree once in 32 times."""
    folders, _ = mixed
    found = []
    for number in range(6):
        model = AutoModelForCausalLM.from_pretrained(folders["head"])
        model.save_pretrained(tmp_path / str(number), max_shard_size=size)
        files = sorted((tmp_path / str(number)).iterdir())
        found.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert sum(name.endswith(".safetensors") for name in found[0]) == (1 if size == "5GB" else 5)
    assert all(files == found[0] for files in found)


def test_other_programs_can_read_the_file(mixed):
    file = mixed[0]["head"] / "model.safetensors"
    with safe_open(file, "pt") as content:
        assert content.metadata()["format"] == "pt"
        assert set(content.keys()) == set(json.loads(content.metadata()[KEY])["hashes"])


def test_adapters_are_saved_without_a_record(mixed, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(mixed[0]["head"])
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path)
    assert KEY not in read_header(tmp_path / "adapter_model.safetensors").metadata


def test_an_offloaded_model_is_saved_with_hashes(mixed, tmp_path):
    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
    model = AutoModelForCausalLM.from_pretrained(
        mixed[0]["head"],
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "saved")), mixed[1])
