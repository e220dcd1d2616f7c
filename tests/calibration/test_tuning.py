"""Blocks that are still dense make up for the errors of those that are packed, and everything else stays as it is."""

import copy
from dataclasses import replace

import moe_models
import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM, LlamaModel, OPTConfig, OPTForCausalLM

import hf_pcdvq.calibration.run
import hf_pcdvq.calibration.weights
from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, allocate_bits, quantize_model
from hf_pcdvq.calibration.run import CalibratedRun
from hf_pcdvq.evaluation.divergence import NotFiniteError
from hf_pcdvq.evaluation.metrics import evaluate

TOKENS = torch.randint(2, 250, (40, 32), generator=torch.Generator().manual_seed(0))
SETTINGS = Calibration(samples=32, length=32, holdout=8, tune_steps=32, tune_rate=3e-3)


def quantize(model, settings=SETTINGS, config=PcdvqConfig, tokens=TOKENS, **options):
    return quantize_model(model, None, config(calibration=settings), tokens, progress=False, **options)


def opt():
    """A model with biases, positions of its own, and layers between embeddings, blocks and head."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 2, "num_hidden_layers": 3}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2)).eval()


def mixture():
    return moe_models.model("mixtral").to(torch.bfloat16)


def stream(**fields):
    return CcqConfig(layout="stream", **fields)


@pytest.mark.parametrize(
    ("make", "config"), [(tiny_llama, PcdvqConfig), (tiny_llama, stream), (opt, PcdvqConfig), (mixture, PcdvqConfig)]
)
def test_a_tuned_model_is_closer_to_its_original(make, config):
    found = {}
    for steps in (0, 32):
        model = quantize(make(), replace(SETTINGS, tune_steps=steps), config)
        found[steps] = evaluate(make(), model, TOKENS[:32], progress=False).kl_mean
    assert found[32] < 0.9 * found[0]


def test_what_is_neither_packed_nor_a_norm_or_bias_stays_as_it_is():
    model, before = mixture(), mixture().state_dict()
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    quantize(model)
    dense = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in before and tensor.dtype == torch.bfloat16
    }
    changed = {name for name, tensor in dense.items() if not torch.equal(tensor, before[name])}
    # Those of the first block are packed before anything is tuned.
    assert changed == {f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention")} | {
        "model.norm.weight"
    }
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= dense.keys() - changed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        parameter.requires_grad == required[name] for name, parameter in model.named_parameters() if name in dense
    )


def test_the_report_says_what_the_tuning_reached(tmp_path):
    model = quantize(opt())
    first, second, last = model.hf_quantizer.report.blocks
    assert first.tuning_kl > 0 < second.tuning_kl and last.tuning_kl is None
    model.save_pretrained(tmp_path)
    model.hf_quantizer.report.write(tmp_path)
    text = (tmp_path / "quantization_report.md").read_text()
    assert f"| {first.output_error:.4f} | {first.seconds:.1f} | {first.tuning_kl:.3f} |" in text


def test_errors_of_earlier_blocks_are_not_corrected_once_more():
    """Tuning that moves nothing shows it: a block is compared with itself on what the packed ones before it give it."""
    errors = []
    for steps in (0, 1):
        settings = replace(SETTINGS, tune_steps=steps, tune_rate=0.0)
        errors.append([block.output_error for block in quantize(opt(), settings).hf_quantizer.report.blocks])
    untuned, tuned = errors
    assert tuned[0] == untuned[0]
    assert tuned[1] < 0.5 * untuned[1] and tuned[2] < 0.5 * untuned[2]


def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, monkeypatch):
    expected = quantize(opt()).state_dict()
    run = CalibratedRun._run_block

    def interrupted(self, number, block):
        if number == 2:
            raise KeyboardInterrupt
        run(self, number, block)

    monkeypatch.setattr(CalibratedRun, "_run_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(opt(), work_dir=tmp_path)
    monkeypatch.setattr(CalibratedRun, "_run_block", run)
    found = quantize(opt(), work_dir=tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_float16_and_where_bfloat16_is_emulated_it_is_computed_in_float32(dtype, monkeypatch):
    for module in (hf_pcdvq.calibration.run, hf_pcdvq.calibration.weights):
        monkeypatch.setattr(module, "is_emulated", lambda kind, device: kind == torch.bfloat16)
    model, dtypes = tiny_llama().to(dtype), []
    model.lm_head.register_forward_pre_hook(
        lambda module, args: dtypes.append((args[0].dtype, torch.is_grad_enabled()))
    )
    quantize(model)
    assert {found for found, trained in dtypes if trained} == {torch.float32}
    assert model.dtype == model.model.norm.weight.dtype == dtype
    untuned, dense = quantize(tiny_llama().to(dtype), replace(SETTINGS, tune_steps=0)), tiny_llama().to(dtype)
    tuned, before = (evaluate(dense, packed, TOKENS[:32], progress=False).kl_mean for packed in (model, untuned))
    assert tuned < 0.9 * before


def test_quantizing_on_load_tunes_too(tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Quantized models answer as their originals do, or nearly so. " * 60)
    settings = Calibration(dataset=str(text), samples=16, length=32, holdout=0, tune_steps=2)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=PcdvqConfig(calibration=settings)
    )
    assert model.hf_quantizer.report.blocks[0].tuning_kl > 0
    assert model.config.quantization_config.calibration.tune_steps == 2


def test_bits_are_chosen_for_the_original_which_stays_as_it_is():
    model, dense = tiny_llama(), tiny_llama()
    config = PcdvqConfig(bits="auto", target_bits=2.4, calibration=replace(SETTINGS, holdout=0))
    allocate_bits(model, None, config, TOKENS, progress=False)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_not_finite_is_named():
    model = tiny_llama()
    model.model.norm.register_forward_hook(
        lambda module, args, output: output * torch.nan if torch.is_grad_enabled() else output
    )
    with pytest.raises(NotFiniteError, match="is nan after decoder block 0: take a smaller tune_rate"):
        quantize(model, replace(SETTINGS, holdout=0))


def test_a_model_without_predictions_is_refused_by_name():
    model = LlamaModel(copy.deepcopy(tiny_llama().config)).eval()
    with pytest.raises(
        ValueError, match="tune_steps=32 trains towards the original's predictions, and LlamaModel has no"
    ):
        quantize(model)
