"""The calibrated path as a user sees it: quality, saving, resuming, rejections, and the report."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_pcdvq.calibration.run
from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq.calibration.shortcuts import Shortcuts
from hf_pcdvq.evaluation.metrics import evaluate, token_windows
from hf_pcdvq.modules import QuantLinear

CONFIGS = [
    (PcdvqConfig, {"bits": 2.25}),
    (PcdvqConfig, {"bits": 2.0}),
    (CcqConfig, {"layout": "2.75"}),
    (CcqConfig, {"layout": "2.5"}),
    (CcqConfig, {"layout": "2.5", "hadamard": False}),
    (CcqConfig, {"layout": "2.0625"}),
    (CcqConfig, {"layout": "stream", "bits": 2.0}),
    (CcqConfig, {"layout": "stream", "bits": 2.5}),
]
SMALL = Calibration(samples=24, length=64, holdout=4)


def sentences(count, seed=0):
    """Text with learnable statistics: a few words, some far more frequent than others."""
    words = ["the", "river", "rises", "in", "a", "mountain", "and", "falls", "slowly", "down", "to", "sea"]
    weights = torch.arange(len(words), 0, -1).float()
    chosen = torch.multinomial(weights, count, True, generator=torch.Generator().manual_seed(seed))
    return " ".join(words[index] for index in chosen)


@pytest.fixture
def load(tiny_model_dir):
    """Loads the tiny model, with options for from_pretrained."""
    return lambda **options: AutoModelForCausalLM.from_pretrained(tiny_model_dir, **options)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("config", "options"), CONFIGS)
def test_calibrated_is_closer_to_the_original_than_rounded_and_reloads_identically(
    load, tokenizer, tmp_path, config, options
):
    model = quantize_model(load(), tokenizer, config(**options, calibration=SMALL), [sentences(3000)], progress=False)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    windows = token_windows(tokenizer, sentences(600, seed=1), 64)
    rounded = load(quantization_config=config(**options))
    kl = [evaluate(load(), packed, windows, progress=False).kl_mean for packed in (model, rounded)]
    assert kl[0] < 0.9 * kl[1]

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(windows).logits, model(windows).logits)
    recorded = again.config.quantization_config.calibration
    assert recorded == Calibration(dataset="given", samples=24, length=64, holdout=4)


def test_from_pretrained_calibrates_where_the_config_names_data(load, tokenizer, tiny_model_dir, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(sentences(3000))
    settings = {"dataset": str(file), "samples": 8, "length": 64, "holdout": 0}
    expected = quantize_model(load(), tokenizer, PcdvqConfig(calibration=settings), progress=False)
    assert_same_state(load(quantization_config=PcdvqConfig(calibration=settings)), expected)
    named = PcdvqConfig(calibration=settings, tokenizer=str(tiny_model_dir))
    assert_same_state(load(quantization_config=named), expected)
    model = load(quantization_config=PcdvqConfig(calibration=settings, tokenizer=tokenizer))
    assert_same_state(model, expected)
    model.save_pretrained(tmp_path / "packed")  # the tokenizer in the config must not interfere
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert "tokenizer" not in fields
    assert fields["calibration"]["dataset"] == "text.txt"  # where it is on this machine is nobody else's business


def test_without_data_the_model_writes_it(load):
    settings = Calibration(samples=4, length=16, holdout=2)
    model = quantize_model(load(), None, PcdvqConfig(calibration=settings), progress=False)
    assert model.config.quantization_config.calibration == settings
    assert model.hf_quantizer.report.windows == 4
    assert model.hf_quantizer.report.comparison.windows == 2


def test_layers_are_quantized_with_the_errors_of_those_before_them(load, tokenizer, monkeypatch):
    """If the inputs were those of the original model, there would be nothing to correct after the first layers."""
    moments = {}
    quantize = hf_pcdvq.calibration.run.quantize_layers

    def spy(layers, found, codec, settings, processes):
        moments[next(iter(layers))] = found
        return quantize(layers, found, codec, settings, processes)

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", spy)
    quantize_model(load(), tokenizer, PcdvqConfig(calibration=SMALL), [sentences(3000)], progress=False)
    assert list(moments) == [
        f"model.layers.{block}.{layer}"
        for block in (0, 1)
        for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    changes = {name: (found.cross.norm() / found.hessian.norm()).item() for name, found in moments.items()}
    first = changes.pop("model.layers.0.self_attn.q_proj")
    assert first == 0
    assert min(changes.values()) > 0.01


def test_shortcuts_change_nothing(load, tokenizer, monkeypatch):
    text = [sentences(3000)]
    kept = []
    keep = Shortcuts.keep
    monkeypatch.setattr(Shortcuts, "keep", lambda self, *args: kept.append(args[0]) or keep(self, *args))
    short = quantize_model(load(), tokenizer, PcdvqConfig(calibration=SMALL), text, progress=False)
    assert "model.layers.1.self_attn.o_proj" in kept
    monkeypatch.setattr(Shortcuts, "keep", lambda self, *args: None)
    assert_same_state(quantize_model(load(), tokenizer, PcdvqConfig(calibration=SMALL), text, progress=False), short)


def test_interrupted_run_goes_on_where_it_stopped(load, tokenizer, tmp_path, monkeypatch):
    text = [sentences(3000)]

    def run():
        config = PcdvqConfig(calibration=SMALL)
        return quantize_model(load(), tokenizer, config, text, work_dir=tmp_path / "work", progress=False)

    expected = quantize_model(load(), tokenizer, PcdvqConfig(calibration=SMALL), text, progress=False)
    quantize = hf_pcdvq.calibration.run.quantize_layers
    names = []

    def interrupted(layers, *args):
        if "model.layers.1.mlp.gate_proj" in layers:
            raise KeyboardInterrupt
        return quantize(layers, *args)

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["block-0000.safetensors"]

    monkeypatch.setattr(
        hf_pcdvq.calibration.run,
        "quantize_layers",
        lambda layers, *args: names.extend(layers) or quantize(layers, *args),
    )
    model = run()
    assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)
    assert_same_state(model, expected)
    losses = [[layer.proxy_loss for layer in packed.hf_quantizer.report.layers] for packed in (model, expected)]
    assert losses[0] == losses[1]


def test_work_folder_of_another_run_is_refused(load, tokenizer, tmp_path):
    text = [sentences(3000)]
    settings = Calibration(samples=4, length=32, holdout=0)
    options = {"work_dir": tmp_path, "progress": False}
    quantize_model(load(), tokenizer, PcdvqConfig(calibration=settings), text, **options)
    changed = load()
    changed.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    for model, config, dataset in [
        (load(), PcdvqConfig(bits=2.0, calibration=settings), text),
        (load(), PcdvqConfig(calibration=settings), [sentences(3000, seed=1)]),
        (changed, PcdvqConfig(calibration=settings), text),
    ]:
        with pytest.raises(ValueError, match="belongs to another run"):
            quantize_model(model, tokenizer, config, dataset, **options)


def test_report_has_every_layer_and_adds_up(load, tokenizer, tmp_path):
    model = quantize_model(load(), tokenizer, PcdvqConfig(calibration=SMALL), [sentences(3000)], progress=False)
    report = model.hf_quantizer.report
    model.save_pretrained(tmp_path)
    report.write(tmp_path)
    saved = json.loads((tmp_path / "quantization_report.json").read_text())
    assert [layer["name"] for layer in saved["layers"]] == [
        name for name, module in model.named_modules() if isinstance(module, QuantLinear)
    ]
    for layer in saved["layers"]:
        assert layer["tokens"] == 24 * 64
        assert 2.5 < layer["kurtosis"] < 3.5  # random weights are normal, and remain so when rotated
        assert 0 < layer["proxy_loss"] < 0.5
    assert saved["bits_per_packed_weight"] == pytest.approx(2.5, abs=0.1)  # 32 bits of scale for 128 or 192 weights
    assert saved["comparison"]["windows"] == 4
    text = (tmp_path / "quantization_report.md").read_text()
    assert "| model.layers.1.mlp.down_proj | 128 x 192 |" in text
    assert f"{saved['bits_per_packed_weight']:.3f}" in text


def test_plot_is_a_picture_with_a_curve_for_each_kind_of_layer(load, tokenizer, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    settings = Calibration(samples=4, length=32, holdout=0)
    model = quantize_model(load(), tokenizer, PcdvqConfig(calibration=settings), [sentences(999)], progress=False)
    model.save_pretrained(tmp_path)
    model.hf_quantizer.report.write(tmp_path)
    content = (tmp_path / "quantization_report.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_comparison_is_that_of_the_models_on_the_windows_held_out(load):
    tokens = torch.randint(2, 250, (10, 32), generator=torch.Generator().manual_seed(0))
    settings = Calibration(samples=6, holdout=4)
    dense, model = load(dtype=torch.float32), load(dtype=torch.float32)  # which no CPU emulates
    quantize_model(model, None, PcdvqConfig(calibration=settings), tokens, progress=False)
    assert model.hf_quantizer.report.comparison == evaluate(dense, model, tokens[6:], progress=False)


def test_layer_that_sees_no_token_is_rounded_and_reported(load, tokenizer):
    class Idle(nn.Module):
        """An MLP with a branch that is never taken."""

        def __init__(self, mlp):
            super().__init__()
            self.mlp, self.idle = mlp, nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)

        def forward(self, x):
            return self.mlp(x)

    model = load()
    model.model.layers[1].mlp = Idle(model.model.layers[1].mlp)
    expected = QuantLinear.from_linear(model.model.layers[1].mlp.idle, PcdvqConfig().codec)
    quantize_model(model, tokenizer, PcdvqConfig(calibration=SMALL), [sentences(3000)], progress=False)
    notes = {layer.name: layer.note for layer in model.hf_quantizer.report.layers if layer.note}
    assert notes == {"model.layers.1.mlp.idle": "no token reached it: rounded to the nearest codes"}
    assert torch.equal(model.model.layers[1].mlp.idle.packed[""], expected.packed[""])


SIZES = {"vocab_size": 258, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 192, "head_dim": 32}
ARCHITECTURES = {
    # Blocks that return a tuple, are called with ALiBi biases, and have biases themselves.
    "bloom": (transformers.BloomConfig, {**SIZES, "n_layer": 2, "n_head": 4}),
    # Two kinds of blocks, which receive different masks and rotary embeddings.
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**LAYERS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": (transformers.Qwen3Config, LAYERS),
    # Fused experts, which are not packed.
    "mixtral": (transformers.MixtralConfig, {**LAYERS, "num_local_experts": 4}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tokenizer):
    config, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config(**sizes, initializer_range=0.2)).eval()
    windows = token_windows(tokenizer, sentences(600, seed=1), 64)
    results = []
    for settings in (
        SMALL,
        Calibration(samples=24, length=64, holdout=0, damp_percent=10.0, correction=0.0, sweeps=0),
    ):
        model = copy.deepcopy(original)
        quantize_model(model, tokenizer, PcdvqConfig(calibration=settings), [sentences(3000)], progress=False)
        results.append(evaluate(original, model, windows, progress=False).kl_mean)
    assert results[0] < results[1]


def test_what_cannot_be_calibrated_is_refused_by_name(load, tokenizer):
    config = PcdvqConfig(calibration=SMALL)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(load(quantization_config=PcdvqConfig()), tokenizer, config)
    broken = load()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="mlp.up_proj: the weight holds infinite or NaN"):
        quantize_model(broken, tokenizer, config, [sentences(3000)], progress=False)
    for tokens, message in [
        (torch.full((4, 16), 300), "token ids from 300 to 300, but LlamaForCausalLM has 258 tokens"),
        (torch.zeros(4, 600, dtype=torch.int64), "windows of 600 tokens are longer than the 512 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_model(load(), None, config, tokens, progress=False)
    long = Calibration(samples=1, length=600)
    with pytest.raises(ValueError, match="windows of 600 tokens are longer than the 512 positions"):
        quantize_model(load(), None, PcdvqConfig(calibration=long), progress=False)
    with pytest.raises(ValueError, match="on one device, it is on meta"):
        quantize_model(load().to("meta"), tokenizer, config, [sentences(3000)], progress=False)
