"""`dequantize=True` on models with tensors whose names resemble those of packed weights: only what is packed is decoded."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import PackedModule

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 258}
IDS = torch.arange(8, 40)[None]


def gemma3():
    """Text and images; the image encoder has a fused `in_proj_weight`, the projector a bare `..._weight`."""
    vision = {**SIZES, "image_size": 16, "patch_size": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    )


def gpt_oss():
    """Experts that are transposed and stay dense, so that `gate_up_proj` and `down_proj` are not packed."""
    return GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def wav2vec2():
    """A convolution whose weight is parametrized: `weight.original0` and `weight.original1`."""
    convolution = {"conv_dim": [64], "conv_kernel": [4], "conv_stride": [2]}
    positions = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **convolution, **positions, vocab_size=32))


def output(model):
    with torch.inference_mode():
        if isinstance(model, Wav2Vec2ForCTC):
            return model(torch.sin(torch.arange(400) / 3.0)[None]).logits
        return model(IDS).logits


@pytest.mark.parametrize("make", [gemma3, gpt_oss, wav2vec2], ids=lambda make: make.__name__)
def test_only_packed_weights_are_decoded(make, tmp_path):
    torch.manual_seed(0)
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    options = {"dtype": torch.float32}
    config = PcdvqConfig(2.0)
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config, **options)
    expected = output(model)
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = type(dense).from_pretrained(
            tmp_path / "packed", quantization_config=PcdvqConfig(dequantize=True), **options
        )
    for decoded in (loaded, model.dequantize()):
        assert not any(isinstance(module, PackedModule) for module in decoded.modules())
        assert (output(decoded) - expected).norm() < 1e-5 * expected.norm()  # summed in another order
    loaded.save_pretrained(tmp_path / "again")
    again = type(dense).from_pretrained(tmp_path / "again", **options)
    assert torch.equal(output(again), output(loaded))
    names = [{name for name, _ in model.named_parameters()} for model in (dense, loaded)]
    assert names[0] == names[1]


def test_the_automatic_class_of_a_vision_language_model_decodes_too(tmp_path):
    torch.manual_seed(0)
    gemma3().save_pretrained(tmp_path / "dense")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "packed", quantization_config=PcdvqConfig(dequantize=True)
    )
    assert not any(isinstance(module, PackedModule) for module in loaded.modules())


def test_device_maps_leave_room_for_decoded_weights(tmp_path):
    """A packed layer counts with the size that it has when it is decoded."""
    torch.manual_seed(0)
    sizes = {**TEXT, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig())
    model.save_pretrained(tmp_path / "packed")
    room = {"cpu": 150_000}  # bytes: enough for the packed model, not for the dense one
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "packed", device_map="auto", max_memory=room)
    assert {parameter.device.type for parameter in packed.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="is offloaded; load the model without offloading"):
        LlamaForCausalLM.from_pretrained(
            tmp_path / "packed", device_map="auto", max_memory=room, offload_folder=tmp_path / "offload",
            quantization_config=PcdvqConfig(dequantize=True),
        )  # fmt: skip
