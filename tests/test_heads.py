"""New heads on a packed base stay dense, are reported by Transformers, and are saved as they were trained."""

import pytest
import torch
from conftest import byte_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

import hf_pcdvq
from hf_pcdvq.modules import QuantLinear

ENCODER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def packed_encoder(cls, auto, folder):
    torch.manual_seed(0)
    cls(BertConfig(**ENCODER, vocab_size=258, max_position_embeddings=64)).save_pretrained(folder / "dense")
    auto.from_pretrained(folder / "dense", quantization_config=hf_pcdvq.PcdvqConfig()).save_pretrained(
        folder / "packed"
    )
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None  # or texts would become conversations
    tokenizer.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_new_head_on_a_packed_base(auto, tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    base.save_pretrained(tmp_path / "base")
    model, found = auto.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {name.split(".")[0] for name in found["missing_keys"]} == {"score"}  # what Transformers warns of
    assert type(model.score) is torch.nn.Linear
    ids = torch.arange(2, 12)[None]
    model.config.pad_token_id = 0
    optimizer = torch.optim.SGD(model.score.parameters(), lr=1.0)
    before = model.score.weight.detach().clone()
    model(ids).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.score.weight, before)
    model.save_pretrained(tmp_path / "trained")
    loaded = auto.from_pretrained(tmp_path / "trained")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_new_pooler_on_a_packed_base(tmp_path):
    folder = packed_encoder(BertForMaskedLM, BertForMaskedLM, tmp_path)
    model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(found["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert type(model.pooler.dense) is torch.nn.Linear
    assert type(model.encoder.layer[0].output.dense) is QuantLinear
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(2, 12)[None]
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(loaded(ids).pooler_output, model(ids).pooler_output)


def test_sentence_transformers_embed_with_a_packed_encoder(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder = packed_encoder(BertModel, AutoModel, tmp_path)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")  # with a new mean of the tokens
    texts = ["a river", "the river rises in a mountain"]
    found = model.encode(texts, convert_to_tensor=True)
    base, tokenizer = AutoModel.from_pretrained(folder), byte_tokenizer()
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            states = base(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(vector, states[0].mean(0), rtol=1e-3, atol=1e-4)
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode(texts, convert_to_tensor=True), found)
    assert type(again[0].auto_model.encoder.layer[0].output.dense) is QuantLinear
