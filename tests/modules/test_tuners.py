"""Every tuner of PEFT on packed layers: it trains as on the dequantized twin, or is refused before anything is written."""

import copy
import re
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import PackedModule

pytest.importorskip("peft", reason="the extra `train` is not installed")
from peft import LoraConfig, get_peft_model
from peft_tuners import IDS, TUNERS, run, save_adapters, tuner_config, values

OURS = r"QuantLinear: weight is packed, so other code cannot.*dequantize\(\)"
# Raised by PEFT because it knows no layer but nn.Linear, or by PyTorch because it is asked to train packed integers.
THEIRS = r"Target module QuantLinear.* is not a plain torch.nn.Linear|only Tensors of floating point dtype can require gradients"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A packed model, one layer in each of two formats; its dequantized twin; and the folder of two LoRA adapters."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    packing = PcdvqConfig(overrides={r"model\.layers\.1\.": "stream-2.0"})
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=packing, dtype=torch.float32
    ).eval()
    twin = copy.deepcopy(packed).dequantize(torch.float32)
    save_adapters(twin, folder / "adapters")
    return packed, twin, folder / "adapters"


def attached_to_twin(kind, twin, folder):
    """The twin with a tuner that has learned something, and what the tuner targets."""
    for targets in ("all-linear", None):
        # Some tuners are for whole decoder layers or for embeddings: PEFT knows which.
        with suppress(ValueError, AttributeError):
            torch.manual_seed(1)
            model = get_peft_model(copy.deepcopy(twin), tuner_config(kind, targets, folder)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
            run(model)
            return model, targets
    raise AssertionError(f"{kind} has no configuration for a dense model")


@pytest.mark.parametrize("kind", TUNERS, ids=lambda kind: kind.value)
def test_a_tuner_learns_as_on_the_dequantized_twin_or_is_refused(kind, models):
    packed, twin, folder = models
    expected, targets = attached_to_twin(kind, twin, folder)
    model = copy.deepcopy(packed)
    words = [(tensor, tensor.clone()) for tensor in packed_tensors(model)]
    try:
        model = get_peft_model(model, tuner_config(kind, targets, folder)).eval()
        run(model)
    except (ValueError, RuntimeError) as error:
        assert re.search(f"{OURS}|{THEIRS}", str(error), re.DOTALL), error
        assert all(torch.equal(now, before) for now, before in words)
        return
    own = values(model)
    dense = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, PackedModule)}
    with torch.no_grad():
        for name, value in values(expected).items():
            if name not in dense:
                own[name].copy_(value)
    (logits, loss), (expected_logits, expected_loss) = run(model), run(expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, packed(IDS).logits, atol=1e-3)
    loss.backward()
    expected_loss.backward()
    gradients = gradients_of(expected)
    own_gradients = gradients_of(model)
    assert own_gradients.keys() == gradients.keys()
    assert all(own_gradients[name].any() == gradient.any() for name, gradient in gradients.items())
    whole, own_whole = (
        torch.cat([found[name].flatten() for name in gradients]) for found in (gradients, own_gradients)
    )
    assert (own_whole - whole).norm() < 2e-3 * whole.norm()  # activations are rounded to 15 bits on a CPU
    check_merging(model, expected, expected_logits, words)


@pytest.mark.parametrize(
    "variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_a_variant_of_lora_that_computes_with_the_weight_is_refused(variant, models):
    model = copy.deepcopy(models[0])
    expected = model(IDS).logits
    with pytest.raises(RuntimeError, match=OURS):
        get_peft_model(model, LoraConfig(target_modules="all-linear", **variant))
    assert torch.equal(model(IDS).logits, expected)


def check_merging(model, expected, logits, words):
    """Merging is refused, or does not concern packed layers; after dequantizing it gives what it gives on the twin."""
    try:
        merged = expected.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError):
        return  # PEFT cannot merge this kind
    try:
        model.merge_adapter()
    except RuntimeError as error:
        assert re.search(OURS, str(error))
    assert all(torch.equal(now, before) for now, before in words)
    with torch.no_grad():
        torch.testing.assert_close(run(model)[0], logits, rtol=1e-4, atol=1e-4)
        model.get_base_model().dequantize(torch.float32)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


def gradients_of(model):
    return {name: value.grad for name, value in values(model).items() if value.grad is not None}


def packed_tensors(model):
    return [
        tensor for layer in model.modules() if isinstance(layer, PackedModule) for tensor in layer.packed.values()
    ]
