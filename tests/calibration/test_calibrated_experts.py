"""Experts are each calibrated on the tokens routed to them."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.calibration.experts import RoutedTokens, quantize_experts
from hf_pcdvq.calibration.report import _curves
from hf_pcdvq.calibration.run import MAX_STAGES
from hf_pcdvq.modules import QuantExperts
from hf_pcdvq_cli import main

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
    """Experts whose tokens have distinct directions, so that it matters which tokens are used."""
    experts = tiny_mixtral().model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(EXPERTS).repeat_interleave(200)[:, None]
    scale = torch.rand(EXPERTS, 64, generator=generator) ** 4
    hidden = torch.randn(len(index), 64, generator=generator) * scale[index[:, 0]]
    return experts, RoutedTokens(index, {"hidden": hidden, "original": hidden})


def output_errors(experts, packed, tokens, codec):
    """Relative squared error of each expert's output for its own tokens."""
    quantized = QuantExperts.from_packed(experts, codec, packed)
    errors = []
    with torch.no_grad():
        for expert in range(EXPERTS):
            x = tokens.of(expert).kept["hidden"]
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
    """The second stack compensates for the first one's error: its Hessian and target come from the packed model."""
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
        if any(tmp_path.glob("block-*")):
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


def test_experts_no_token_reaches_are_rounded():
    """Experts that never run, and experts outside the decoder blocks."""
    model = tiny_mixtral()
    model.model.layers[0].idle, model.model.outside = (copy.deepcopy(model.model.layers[0].mlp) for _ in range(2))
    report = calibrated(model).hf_quantizer.report
    for name in ("layers.0.idle", "outside"):
        assert isinstance(model.model.get_submodule(f"{name}.experts"), QuantExperts)
        notes = [record.note for record in report.layers if record.name.startswith(f"model.{name}.experts")]
        assert notes == ["no token reached it: rounded to the nearest codes"] * 2 * EXPERTS


class Deeper(nn.Module):
    """A mixture of experts after more layers than are quantized sequentially."""

    def __init__(self, mixture):
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(MAX_STAGES)))
        self.mixture = mixture

    def forward(self, hidden):
        return self.mixture(hidden + self.chain(hidden))


def test_experts_beside_many_other_layers_are_a_stage_of_their_own():
    model = tiny_mixtral()
    for layer in model.model.layers:
        layer.mlp = Deeper(layer.mlp)
    report = calibrated(model).hf_quantizer.report
    records = [record for record in report.layers if record.name.startswith("model.layers.1.")]
    assert len(records) == 4 + MAX_STAGES + 2 * EXPERTS
    assert all(record.proxy_loss is not None and record.tokens for record in records)
    assert isinstance(model.model.layers[1].mlp.mixture.experts, QuantExperts)


def test_the_report_lists_experts_that_fell_back(tmp_path):
    model = calibrated(tiny_mixtral(), expert_tokens=100)
    model.save_pretrained(tmp_path)
    model.hf_quantizer.report.write(tmp_path)
    text = (tmp_path / "quantization_report.md").read_text()
    fallen = [record for record in model.hf_quantizer.report.layers if "routed to it" in (record.note or "")]
    assert 0 < len(fallen) < 2 * 2 * EXPERTS
    noted = sum(record.note is not None for record in model.hf_quantizer.report.layers)
    assert f"{noted} of {2 * (4 + 2 * EXPERTS)} used a fallback" in text
    for record in fallen:
        (row,) = (line for line in text.splitlines() if f"| {record.name} |" in line)
        assert "calibrated on all tokens of the layer" in row


def test_the_plot_has_one_curve_for_all_experts():
    curves = _curves(calibrated(tiny_mixtral()).hf_quantizer.report)
    experts = {f"mlp.experts.*.{stack}" for stack in ("gate_up_proj", "down_proj")}
    assert set(curves) == experts | {f"self_attn.{name}_proj" for name in "qkvo"}
    assert {block: len(losses) for block, losses in curves["mlp.experts.*.down_proj"].items()} == {0: 8, 1: 8}


@pytest.mark.parametrize("option", ((), ("--all-experts",)))
def test_all_experts_can_be_asked_for_on_the_command_line(option, tiny_model_dir, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"{number} of many small words" for number in range(60)))
    arguments = ["quantize", tmp_path / "dense", "--out", tmp_path / "packed", "--samples", 8, "--length", 32]
    done = CliRunner().invoke(main, [*map(str, arguments), "--dataset", str(tmp_path / "text.txt"), *option])
    assert done.exit_code == 0, done.output
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["calibration"]
    assert fields["all_experts"] is bool(option)
    layers = json.loads((tmp_path / "packed" / "quantization_report.json").read_text())["layers"]
    notes = [record["note"] or "" for record in layers if ".experts." in record["name"]]
    # Each of 256 tokens goes to two of eight experts: most experts get fewer than 128.
    assert any("routed to it" in note for note in notes) is not bool(option)


def test_settings_are_recorded():
    fields = settings(all_experts=True).to_dict()
    assert fields["all_experts"] is True and fields["expert_tokens"] == 16
    with pytest.raises(ValueError, match="expert_tokens must be an integer"):
        settings(expert_tokens=0)
