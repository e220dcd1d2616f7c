"""The comparison in the report is that of the two models; when it fails, the result stays."""

import copy

import pytest
import torch
from conftest import tiny_llama
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForImageTextToText,
    BltConfig,
    BltForCausalLM,
    GitConfig,
    GitForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.calibration import held_out
from hf_pcdvq.calibration.blocks import find_blocks, streamed
from hf_pcdvq.evaluation.metrics import evaluate, window_logits
from hf_pcdvq.modules import QuantLinear
from hf_pcdvq.quantizer import PackedHfQuantizer

TOKENS = torch.randint(2, 90, (10, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2}


def quantize(model, **options):
    settings = Calibration(samples=7, length=16, holdout=3)
    return quantize_model(model, None, PcdvqConfig(calibration=settings, **options), TOKENS, progress=False)


def opt():
    """A model with packed layers between the embeddings and the blocks, and between the blocks and the head."""
    config = OPTConfig(
        **SIZES, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32, init_std=0.2
    )
    torch.manual_seed(0)
    return OPTForCausalLM(config).eval()


def test_figures_are_those_of_the_two_models_where_layers_outside_the_blocks_are_packed():
    model = opt()
    dense = copy.deepcopy(model)
    report = quantize(model).hf_quantizer.report
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= {layer.name for layer in report.layers}
    assert report.comparison == evaluate(dense, model, TOKENS[7:], progress=False)
    assert report.comparison.kl_mean > 0.1


def test_block_that_runs_again_is_refused_by_name():
    config = AlbertConfig(**SIZES, num_hidden_layers=3, embedding_size=32, intermediate_size=64)
    with pytest.raises(NotImplementedError, match="AlbertForMaskedLM runs its decoder block 0 again"):
        quantize(AlbertForMaskedLM(config).eval())


def test_layer_that_runs_twice_in_its_block_is_refused_by_name():
    class Twice(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(self.mlp(x))

    model = tiny_llama()
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    with pytest.raises(
        NotImplementedError, match=r"layers.1.mlp.mlp.gate_proj runs more than once in its decoder block"
    ):
        quantize(model)


def test_layer_that_two_blocks_share_is_refused_by_name():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.up_proj is also model.layers.1.mlp.up_proj"):
        quantize(model)


def paligemma():
    """A model with more layers for images than for text."""
    text = {**SIZES, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32}
    config = PaliGemmaConfig(
        text_config={**text, "num_hidden_layers": 1, "intermediate_size": 64},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=95,
        projection_dim=64,
    )
    torch.manual_seed(0)
    return PaliGemmaForConditionalGeneration(config).eval()


def test_blocks_are_those_of_the_language_model_however_many_layers_another_tower_has():
    report = quantize(paligemma()).hf_quantizer.report
    assert [block.name for block in report.blocks] == ["model.language_model.layers.0"]
    assert all(layer.tokens and layer.name.startswith("model.language_model.") for layer in report.layers)


def git():
    """A model that keeps what reads images beside its decoder blocks."""
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = GitConfig(**SIZES, vision_config=vision, num_hidden_layers=2, intermediate_size=64)
    torch.manual_seed(0)
    return GitForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "towers"),
    [
        (paligemma, ("model.vision_tower", "model.multi_modal_projector")),
        (git, ("git.image_encoder",)),
    ],
)
def test_what_the_text_never_runs_through_stays_as_it_is_and_is_named(make, towers):
    model = make()
    dense = {name: module.weight for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    quantize(model)
    left = model.config.quantization_config.left_unpacked
    inside = [name for name in dense if name.startswith(towers)]
    assert inside and all(model.get_submodule(name).weight is dense[name] for name in inside)
    for tower in towers:
        reasons = [reason for name, reason in left.items() if name.startswith(f"{tower}.")]
        assert any("calibration runs text, which does not reach it" in reason for reason in reasons)
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_without_calibration_or_when_it_is_asked_for_a_tower_is_packed(tmp_path):
    model = quantize(paligemma(), modules_to_convert=["vision_tower", "language_model"])
    assert isinstance(model.model.vision_tower.encoder.layers[0].mlp.fc1, QuantLinear)
    paligemma().save_pretrained(tmp_path)
    rounded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=PcdvqConfig())
    assert isinstance(rounded.model.vision_tower.encoder.layers[0].mlp.fc1, QuantLinear)


def test_layers_of_a_tower_that_overrides_ask_for_are_packed_and_the_others_are_not():
    model = quantize(paligemma(), overrides={r"vision_tower.*fc1": "int8"})
    mlp = model.model.vision_tower.encoder.layers[0].mlp
    assert isinstance(mlp.fc1, QuantLinear) and mlp.fc1.codec.format == "int8"
    assert not isinstance(mlp.fc2, QuantLinear)
    skipped = model.config.quantization_config.modules_to_not_convert
    assert not any("model.vision_tower.encoder.layers.0.mlp.fc1".startswith(name) for name in skipped)


def test_parts_for_text_beside_the_decoder_blocks_are_packed():
    """A model of bytes has several stacks for text, of which only one is the list of blocks."""
    part = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    parts = ("encoder_config", "decoder_config", "global_config", "patcher_config")
    with torch.device("meta"):
        model = BltForCausalLM(BltConfig(vocab_size=96, **dict.fromkeys(parts, part)))
    rounded, calibrated = (
        PackedHfQuantizer(PcdvqConfig(hadamard_block=16, calibration=calibration), pre_quantized=False).select(model)
        for calibration in (None, Calibration())
    )
    assert calibrated == rounded and any(".global_transformer." in name for name in calibrated)


def test_blocks_computed_one_at_a_time_give_the_same_logits_and_go_back():
    # In float32 instead of bfloat16, as on another device: with one device at hand, this moves the blocks.
    model = tiny_llama()
    before = {name: (id(tensor), tensor.dtype) for name, tensor in model.named_parameters()}
    blocks = model.get_submodule(find_blocks(model, ["model.layers.0.mlp.up_proj"]))
    with torch.no_grad(), streamed(model, blocks, model.device, upcast=True):
        found = window_logits(model, TOKENS[0])
    with torch.no_grad():
        expected = window_logits(tiny_llama().float(), TOKENS[0])
    assert torch.equal(found, expected)
    assert {name: (id(tensor), tensor.dtype) for name, tensor in model.named_parameters()} == before
    assert not any(tensor.is_inference() for tensor in model.parameters())


def test_failed_comparison_is_said_and_the_model_stays(monkeypatch, caplog, tmp_path):
    def overflow(*args):
        raise ValueError("the logits of the packed model are NaN in window 0")

    monkeypatch.setattr(held_out, "compare_logits", overflow)
    model = quantize(tiny_llama())
    report = model.hf_quantizer.report
    assert report.comparison is None
    assert report.comparison_failure == "ValueError: the logits of the packed model are NaN in window 0"
    assert "comparing it with its original failed: ValueError: the logits of the packed" in caplog.text
    model.save_pretrained(tmp_path)
    report.write(str(tmp_path))
    assert "The comparison with the original failed: ValueError" in (tmp_path / "quantization_report.md").read_text()


def test_comparison_leaves_the_mode_of_the_model():
    assert quantize(tiny_llama().train()).training
