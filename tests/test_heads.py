"""New heads on a packed base stay dense, are reported by Transformers, and are saved as they were trained."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_pcdvq


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
