"""Calibrated experts: each on the tokens that are routed to it."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.calibration.experts import RoutedTokens, quantize_experts
from hf_pcdvq.modules import QuantExperts

EXPERTS, TOP_K = 8, 2


def tiny_mixtral(seed=0):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    routing = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    config = MixtralConfig(**sizes, **routing, num_key_value_heads=2, vocab_size=258, max_position_embeddings=128)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MixtralForCausalLM(config).eval()


def windows(count=12, length=64, seed=0):
    return torch.randint(0, 258, (count, length), generator=torch.Generator().manual_seed(seed))


def settings(**options):
    return Calibration(**{"samples": 8, "length": 64, "holdout": 4, "expert_tokens": 16, **options})


def calibrated(model, **options):
    quantize_model(model, None, PcdvqConfig(calibration=settings(**options)), windows(), progress=False)
    return model


def experts_and_tokens():
    """Experts whose tokens lie in directions of their own, so that it matters which tokens are taken."""
    experts = tiny_mixtral().model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(EXPERTS).repeat_interleave(200)[:, None]
    scale = torch.rand(EXPERTS, 64, generator=generator) ** 4
    hidden = torch.randn(len(index), 64, generator=generator) * scale[index[:, 0]]
    return experts, RoutedTokens(hidden, hidden, index)


def output_errors(experts, packed, tokens, codec):
    """Relative squared error of what each expert makes of its own tokens."""
    quantized = QuantExperts.from_packed(experts, codec, packed)
    errors = []
    with torch.no_grad():
        for expert in range(EXPERTS):
            x = tokens.of(expert).hidden
            hidden = experts._apply_gate(functional.linear(x, experts.gate_up_proj[expert]))
            wanted = functional.linear(hidden, experts.down_proj[expert])
            errors.append(((quantized.run_expert(expert, x) - wanted).square().sum() / wanted.square().sum()).item())
    return torch.tensor(errors)


def test_each_expert_is_calibrated_on_its_own_tokens():
    experts, tokens = experts_and_tokens()
    codec = PcdvqConfig().codec
    own, records = quantize_experts("experts", experts, tokens, codec, settings())
    everything, _ = quantize_experts("experts", experts, tokens, codec, settings(all_experts=True))
    rounded, _ = quantize_experts("experts", experts, None, codec, settings())
    own, everything, rounded = (
        output_errors(experts, packed, tokens, codec) for packed in (own, everything, rounded)
    )
    assert (own < 0.8 * everything).all() and (own < 0.5 * rounded).all()
    assert [record.name for record in records[:2]] == ["experts.0.gate_up_proj", "experts.0.down_proj"]
    assert all(record.tokens == 200 and record.note is None for record in records)


def test_down_is_calibrated_on_what_the_packed_gate_and_up_give():
    """The second stack makes up for the first one's error: its Hessian and its target are those of the packed model."""
    experts, tokens = experts_and_tokens()
    codec = PcdvqConfig(bits=2.0).codec
    with_correction, _ = quantize_experts("experts", experts, tokens, codec, settings(correction=0.5))
    without, _ = quantize_experts("experts", experts, tokens, codec, settings(correction=0.0))
    assert (
        output_errors(experts, with_correction, tokens, codec).mean()
        < 0.97 * output_errors(experts, without, tokens, codec).mean()
    )
    assert torch.equal(with_correction["gate_up_proj"][""], without["gate_up_proj"][""])


def test_an_expert_with_few_tokens_falls_back_and_is_listed():
    experts, tokens = experts_and_tokens()
    kept = tokens.chosen((tokens.index[:, 0] != 3).nonzero()[:, 0])
    starved = kept.chosen(torch.arange(len(kept.index)))
    _, records = quantize_experts("experts", experts, starved, PcdvqConfig().codec, settings(expert_tokens=50))
    notes = {record.name: record.note for record in records if record.note}
    assert set(notes) == {"experts.3.gate_up_proj", "experts.3.down_proj"}
    assert notes["experts.3.down_proj"] == "only 0 tokens were routed to it: calibrated on all tokens of the layer"
    assert all(record.tokens == len(kept.index) for record in records if record.note)


def test_a_calibrated_mixture_is_nearer_to_the_original_than_a_rounded_one(tmp_path):
    dense = tiny_mixtral()
    model = calibrated(copy.deepcopy(dense))
    report = model.hf_quantizer.report
    assert isinstance(model.model.layers[1].mlp.experts, QuantExperts)
    matrices = [record.name for record in report.layers]
    assert len(matrices) == len(set(matrices)) == 2 * (4 + 2 * EXPERTS)
    dense.save_pretrained(tmp_path / "dense")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    held_out = windows(4, seed=5)
    with torch.no_grad():
        wanted = dense(held_out).logits
        errors = [(packed(held_out).logits - wanted).norm() / wanted.norm() for packed in (model, rounded)]
    assert errors[0] < 0.8 * errors[1]
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(held_out).logits
        assert torch.equal(again, model(held_out).logits)


def test_an_interrupted_run_with_experts_goes_on(tmp_path):
    class Interrupted(Exception):
        pass

    expected = calibrated(tiny_mixtral())
    model = tiny_mixtral()

    def stop(*args):
        raise Interrupted

    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(stop)
    config = PcdvqConfig(calibration=settings())
    with pytest.raises(Interrupted):
        quantize_model(model, None, config, windows(), progress=False, work_dir=tmp_path)
    handle.remove()
    assert [file.name for file in tmp_path.glob("block-*")] == ["block-0000.safetensors"]
    model = tiny_mixtral()
    quantize_model(model, None, config, windows(), progress=False, work_dir=tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_settings_are_recorded():
    fields = settings(all_experts=True).to_dict()
    assert fields["all_experts"] is True and fields["expert_tokens"] == 16
    with pytest.raises(ValueError, match="expert_tokens must be an integer"):
        settings(expert_tokens=0)
