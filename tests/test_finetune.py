"""The recipe in docs/finetune.md, as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import PackedModule

PAGE = Path(__file__).parent.parent / "docs" / "finetune.md"


def recipe():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.fixture
def packed_dir(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig())
    model.save_pretrained("qwen-2bit")
    for file in tiny_model_dir.glob("tokenizer*"):
        (tmp_path / "qwen-2bit" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "qwen-2bit"


def test_the_recipe_trains_adapters_with_checkpointing_and_nothing_else(packed_dir):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    # Counts how often the first layer runs: with checkpointing, a second time for every backward pass.
    counted = recipe().replace(
        "trainer.train()",
        "calls = []\n"
        "model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(lambda *call: calls.append(1))\n"
        "trainer.train()",
    )
    names: dict = {}
    exec(compile(counted, str(PAGE), "exec"), names)
    trainer, model = names["trainer"], names["model"]
    assert trainer.state.global_step == 3 and len(names["calls"]) == 6
    adapters = {name: tensor for name, tensor in model.named_parameters() if "lora_B" in name}
    assert adapters and all(tensor.abs().sum() > 0 for tensor in adapters.values())
    untrained = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=torch.float32)
    trained = dict(model.get_base_model().named_modules())
    for name, layer in untrained.named_modules():
        if isinstance(layer, PackedModule):
            own = trained[name].base_layer if hasattr(trained[name], "base_layer") else trained[name]
            for suffix, tensor in layer.packed.items():
                assert torch.equal(tensor, own.packed[suffix])
    again = peft.PeftModel.from_pretrained(untrained, "my-adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, expected = (candidate.eval()(ids).logits for candidate in (again, model))
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("after", [False, True])
def test_two_calls_switch_checkpointing_on(packed_dir, after):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=torch.float32)
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    ids = torch.arange(3, 40)[None]
    if after:
        model = peft.get_peft_model(model, config)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    if not after:
        model = peft.get_peft_model(model, config)
    calls = []
    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(lambda *call: calls.append(1))
    gradients = []
    for checkpointing in (True, False):
        if not checkpointing:
            model.activation_checkpointing_disable()
        calls.clear()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all(a.abs().sum() > 0 for a in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
