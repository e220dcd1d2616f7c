"""Packed token embeddings and output heads, tied and not: files, computing, and what is refused."""

import copy
import pickle

import pytest
import torch
from conftest import byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTDoubleHeadsModel,
    T5Config,
    T5ForConditionalGeneration,
)
from vision_models import save_tiny_gemma3

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.codecs import codec_of_setting
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.modules import QuantEmbedding, QuantLinear
from hf_pcdvq.recovery.student import as_student
from hf_pcdvq.vocabulary import check_vocabulary

SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
IDS = torch.arange(2, 14)[None]
BITS = {"bits": 2.25}


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).bfloat16()


def gemma():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=32)).bfloat16()


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    )


MODELS = {
    "tied": (lambda: llama(True), AutoModelForCausalLM),
    "not tied": (lambda: llama(False), AutoModelForCausalLM),
    "with a factor": (gemma, AutoModelForCausalLM),
    "in three places": (t5, AutoModelForSeq2SeqLM),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense models by name."""
    found = {}
    for name, (build, _) in MODELS.items():
        found[name] = tmp_path_factory.mktemp("dense")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build().save_pretrained(found[name])
    found["with images"] = tmp_path_factory.mktemp("images")
    save_tiny_gemma3(found["with images"], byte_tokenizer())
    return found


def auto(name):
    return MODELS[name][1] if name in MODELS else AutoModelForImageTextToText


def rounded(folders, name, **options):
    config = PcdvqConfig(**{**BITS, "embeddings": "int8", "head": "int8", **options})
    return auto(name).from_pretrained(folders[name], quantization_config=config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})).logits


def words(module):
    return module._parameters["weight"]


@pytest.mark.parametrize("name", [*MODELS, "with images"])
def test_saved_loaded_copied_and_decoded_it_computes_the_same(name, folders, tmp_path):
    dense = auto(name).from_pretrained(folders[name]).eval()
    packed = rounded(folders, name)
    embeddings, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(embeddings, QuantEmbedding) and isinstance(head, QuantLinear)
    assert (words(embeddings) is words(head)) == (name != "not tied")
    rows, expected = embeddings(IDS), dense.get_input_embeddings()(IDS)
    assert rows.dtype == expected.dtype == packed.dtype
    assert (rows - expected).float().norm() < 0.02 * expected.float().norm()  # any factor is still there
    found = logits(packed)
    packed.save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for same in (loaded.eval(), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits(same), found) and same.dtype == dense.dtype
        one, other = (words(part()) for part in (same.get_input_embeddings, same.get_output_embeddings))
        assert (one is other) == (name != "not tied")
        for options in ({}, {"exclude_embeddings": True}):
            assert same.num_parameters(**options) == dense.num_parameters(**options)
    loaded.tie_weights()  # as adapters and resizing do
    assert torch.equal(logits(loaded), found)
    twin = loaded.dequantize(torch.float32).float()
    exact = logits(auto(name).from_pretrained(tmp_path, dtype=torch.float32).eval())
    torch.testing.assert_close(logits(twin), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    assert type(twin.get_input_embeddings()) is type(dense.get_input_embeddings())
    assert (twin.get_input_embeddings().weight is twin.get_output_embeddings().weight) == (name != "not tied")
    twin.resize_token_embeddings(300)
    twin.save_pretrained(tmp_path / "dense")


def test_tied_embeddings_of_a_model_that_is_loaded_already(folders, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(folders["tied"]).eval()
    tokens = torch.randint(2, 258, (4, 16), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(samples=4, length=16, holdout=0)
    config = PcdvqConfig(**BITS, head="int8", calibration=calibration)
    packed = quantize_model(dense, None, config, tokens, progress=False)
    assert words(packed.get_input_embeddings()) is words(packed.get_output_embeddings())
    found = logits(packed)
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), found)


def test_the_file_holds_tied_tensors_once_and_is_counted(folders, tmp_path):
    packed = rounded(folders, "tied", embeddings=None)  # the head alone is asked for
    packed.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {key for key in file.keys() if "embed" in key or "head" in key}  # noqa: SIM118
    assert names == {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"}
    count = count_folder(tmp_path)
    (layer,) = [layer for layer in count.layers if "embed" in layer.name]
    assert (layer.codec.format, layer.nbytes) == ("int8", 258 * (64 + 4))
    assert count.embedding_bytes == count.head_bytes == 0 and "head in int8" in count.config.describe()
    assert count.parameters == AutoModelForCausalLM.from_pretrained(folders["tied"]).num_parameters()


@pytest.mark.parametrize(("packed", "sizes"), [("embeddings", (0, 258 * 128)), ("head", (258 * 128, 0))])
def test_the_one_that_is_not_packed_is_counted_as_what_it_is(packed, sizes, folders, tmp_path):
    options = {"embeddings": None, "head": None, packed: "int8"}
    rounded(folders, "not tied", **options).save_pretrained(tmp_path)
    count = count_folder(tmp_path)
    assert (count.embedding_bytes, count.head_bytes) == sizes


def test_classes_without_the_head(folders, tmp_path):
    packed = rounded(folders, "tied")
    packed.save_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed").eval()
    assert base.dtype == torch.bfloat16 and isinstance(base.embed_tokens, QuantEmbedding)
    expected = packed.model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, expected)
    scoring = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    scoring.save_pretrained(tmp_path / "scoring")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "scoring")(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("change", ["both", "the head only", "two that differ"])
def test_checkpoints_that_name_the_tied_weight_otherwise(change, folders, tmp_path):
    tensors = load_file(folders["tied"] / "model.safetensors")
    weight = tensors["model.embed_tokens.weight"]
    if change == "the head only":
        del tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = weight.flip(0).clone() if change == "two that differ" else weight.clone()
    LlamaConfig.from_pretrained(folders["tied"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    packed = rounded({"tied": tmp_path}, "tied")
    expected = logits(rounded(folders, "tied"))
    assert torch.equal(logits(packed), expected.flip(-1) if change == "two that differ" else expected)
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(packed))


def test_tied_embeddings_that_differ_are_packed_and_loaded_as_they_are(folders, tmp_path):
    tensors = load_file(folders["in three places"] / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].flip(0).clone()
    T5Config.from_pretrained(folders["in three places"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    packed = rounded({"in three places": tmp_path}, "in three places")
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(packed))
    assert torch.equal(loaded.encoder.embed_tokens(IDS), loaded.shared(95 - IDS))


def test_a_head_that_differs_from_the_embeddings_keeps_the_dtype_of_dense_weights(folders, tmp_path):
    tensors = load_file(folders["tied"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    LlamaConfig.from_pretrained(folders["tied"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rounded({"tied": tmp_path}, "tied").save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.lm_head.weight.dtype == loaded.lm_head(torch.ones(1, 64).bfloat16()).dtype == torch.bfloat16


def test_a_head_that_the_embeddings_are_tied_to(tmp_path):
    config = OpenAIGPTConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    OpenAIGPTDoubleHeadsModel(config).save_pretrained(tmp_path / "dense")
    packed = OpenAIGPTDoubleHeadsModel.from_pretrained(
        tmp_path / "dense", quantization_config=PcdvqConfig(**BITS, head="int8")
    )
    packed.save_pretrained(tmp_path / "packed")
    loaded = OpenAIGPTDoubleHeadsModel.from_pretrained(tmp_path / "packed").eval()
    assert isinstance(loaded.transformer.tokens_embed, QuantEmbedding)
    assert words(loaded.transformer.tokens_embed) is words(loaded.lm_head)
    assert torch.equal(logits(loaded), logits(packed.eval()))


def test_a_tied_head_that_differs_in_its_scales_alone_decodes_to_its_own_weight(folders, tmp_path):
    tensors = load_file(folders["tied"] / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    LlamaConfig.from_pretrained(folders["tied"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    packed = rounded({"tied": tmp_path}, "tied")
    expected = 2 * logits(rounded(folders, "tied"))
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(loaded), expected)
    with as_student(loaded, torch.float32) as student:
        head, embeddings = (student.frozen[name][1].weight for name in ("lm_head", "model.embed_tokens"))
        assert torch.equal(head, 2 * embeddings)
    loaded.dequantize(torch.float32)
    loaded.save_pretrained(tmp_path / "dense")
    for dense in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        torch.testing.assert_close(dense.lm_head.weight, 2 * dense.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["tied", "with a factor"])
def test_generation_and_compilation(name, folders):
    packed = rounded(folders, name)
    written = packed.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(written[0, len(IDS[0])], logits(packed)[0, -1].argmax())
    compiled = torch.compile(packed.get_input_embeddings(), backend="eager", fullgraph=True)
    for ids in (IDS, IDS[:, :5]):
        assert torch.equal(compiled(ids), packed.get_input_embeddings()(ids))


@pytest.mark.parametrize("setting", ["int8", "pcdvq-2.25", "ccq-2.0625"])
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.empty(2, 0, dtype=torch.int64), IDS.int(), IDS.view(2, 3, 2)])
def test_rows_are_those_of_the_decoded_weight(setting, ids):
    codec, dense = codec_of_setting(setting, 128, 0), nn.Embedding(20, 128)
    packed = QuantEmbedding.from_packed(dense, codec, {"weight": codec.encode(dense.weight)})
    twin = packed.dequantize(torch.float32)
    torch.testing.assert_close(packed(ids), twin(ids))
    with pytest.raises((IndexError, RuntimeError)):
        packed(torch.tensor([20]))


def test_only_the_rows_that_are_looked_up_are_decoded(folders):
    embeddings = rounded(folders, "tied").get_input_embeddings()
    embeddings._parameters["weight_scale"].data[20:] = float("nan")
    assert embeddings(IDS).isfinite().all() and embeddings(torch.tensor([20])).isnan().all()


@pytest.mark.parametrize("where", [("model.embed_tokens", "lm_head"), ("model.layers",)])
def test_offloaded(where, folders, tmp_path):
    packed = rounded(folders, "tied")
    packed.save_pretrained(tmp_path / "packed")
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {part: "disk" if part in where else "cpu" for part in parts}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(offloaded), logits(packed))
    dense = AutoModelForCausalLM.from_pretrained(
        folders["tied"], device_map=device_map, offload_folder=tmp_path / "dense"
    )
    assert (offloaded.device, offloaded.dtype) == (dense.device, dense.dtype)
    if "model.embed_tokens" not in where:
        written = offloaded.generate(IDS.to(offloaded.device), max_new_tokens=4, do_sample=False)
        assert torch.equal(written, packed.generate(IDS, max_new_tokens=4, do_sample=False))
    assert {id(one) for one in packed.parameters()} == {id(one) for _, one in packed.named_parameters()}
    offloaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(packed))


@pytest.mark.parametrize("name", ["tied", "not tied"])
def test_resizing_is_refused_before_anything_changes(name, folders):
    packed = rounded(folders, name, embeddings=None)
    before = logits(packed)
    for part in (packed, packed.model) if name == "tied" else (packed,):
        with pytest.raises(RuntimeError, match="packed and cannot be resized: resize those of the original"):
            part.resize_token_embeddings(300)
    assert torch.equal(logits(packed), before)
    with pytest.raises(RuntimeError, match="cannot be resized"):
        packed.resize_token_embeddings(pad_to_multiple_of=64)
    for same in ({}, {"new_num_tokens": 258}, {"new_num_tokens": 257, "pad_to_multiple_of": 43}):
        assert packed.resize_token_embeddings(**same) is packed.get_input_embeddings()


def test_adapters_with_a_tokenizer_beside_them_are_loaded_onto_packed_embeddings(folders, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `train` is not installed")
    rounded(folders, "tied").save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, adapted(IDS).logits)
    weight = loaded.get_input_embeddings().weight
    assert (weight.shape, weight.size(), weight.size(0), weight.size(dim=-1)) == ((258, 64), (258, 64), 258, 64)
    with pytest.raises(RuntimeError, match="is packed"):
        loaded.base_model.model.model.layers[0].mlp.up_proj.weight.shape  # noqa: B018


def test_a_head_of_its_own_may_have_any_setting_of_layers(folders, tmp_path):
    packed = rounded(folders, "not tied", head="ccq-2.75")
    assert packed.lm_head.codec.format == "ccq-2.75" and packed.model.embed_tokens.codec.format == "int8"
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(packed))


REFUSED = [
    ("tied", {"head": "stream-4.0"}, "model.embed_tokens cannot be packed as stream-4.0: .* one by one"),
    ("not tied", {"embeddings": "stream-4.0"}, "model.embed_tokens cannot be packed as stream-4.0"),
    ("tied", {"head": "int8", "embeddings": "pcdvq-2.25"}, "embeddings is 'pcdvq-2.25' and head is 'int8'"),
    ("tied", {"head": "int9"}, "head must be one of"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_settings_that_do_not_fit(name, fields, message, folders):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folders[name], quantization_config=PcdvqConfig(**fields))


def test_a_class_without_a_head(folders):
    with pytest.raises(ValueError, match="head='int8': LlamaModel has no output head"):
        AutoModel.from_pretrained(folders["tied"], quantization_config=PcdvqConfig(head="int8"))


class ReadsItsWeight(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight * 2)


class HasAParameter(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.shift = nn.Parameter(torch.zeros(sizes[1]))


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (ReadsItsWeight(258, 64), "ReadsItsWeight computes with its weight itself"),
        (HasAParameter(258, 64), "HasAParameter has parameters besides its weight: shift"),
        (nn.Embedding(258, 64, max_norm=1.0), "max_norm=1.0 changes its rows"),
        (nn.Embedding(258, 60), "60 input features are not a multiple of 8"),
    ],
)
def test_embeddings_that_are_not_understood_are_refused_by_name(embeddings, message):
    model = llama(False)
    model.model.embed_tokens = embeddings
    with pytest.raises(ValueError, match=f"model.embed_tokens cannot be packed as int8: .*{message}"):
        check_vocabulary(model, "model.embed_tokens", codec_of_setting("int8", 128, 0))


def test_a_tied_head_with_a_bias_is_refused_by_name():
    model = llama(True)
    model.lm_head.bias = nn.Parameter(torch.zeros(258))
    with pytest.raises(ValueError, match="model.embed_tokens, to which lm_head is tied, .* lm_head: it has a bias"):
        check_vocabulary(model, "model.embed_tokens", codec_of_setting("int8", 128, 0))
