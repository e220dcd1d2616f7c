"""Models with an encoder and a decoder are refused by name where they would be calibrated, and packed by rounding."""

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_pcdvq

SIZES = {"d_model": 128, "vocab_size": 258, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
BOTH = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {"layers": 1, "ffn_dim": 128, "attention_heads": 4}.items()
}


def t5():
    return T5ForConditionalGeneration(T5Config(**SIZES, d_kv=32, d_ff=128, num_layers=1, num_heads=4))


def bart():
    return BartForConditionalGeneration(BartConfig(**SIZES, **BOTH))


def whisper():
    sizes = {**SIZES, **BOTH, "num_mel_bins": 16, "max_source_positions": 32}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, suppress_tokens=None, begin_suppress_tokens=None))


@pytest.mark.parametrize("make", [t5, bart, whisper])
@pytest.mark.parametrize("given", [True, False])
def test_calibration_is_refused_by_name(make, given):
    model = make()
    config = hf_pcdvq.PcdvqConfig(calibration=hf_pcdvq.Calibration(samples=4, length=32))
    data = [torch.arange(2, 34)] * 8 if given else None
    with pytest.raises(NotImplementedError, match="ForConditionalGeneration has an encoder and a decoder"):
        hf_pcdvq.quantize_model(model, None, config, data, progress=False)


@pytest.mark.parametrize("make, auto", [(t5, AutoModelForSeq2SeqLM), (whisper, AutoModelForSpeechSeq2Seq)])
def test_rounded_ones_are_saved_and_loaded(make, auto, tmp_path):
    make().save_pretrained(tmp_path / "dense")
    packed = auto.from_pretrained(tmp_path / "dense", quantization_config=hf_pcdvq.PcdvqConfig())
    packed.save_pretrained(tmp_path / "packed")
    loaded = auto.from_pretrained(tmp_path / "packed")
    ids = torch.arange(2, 12)[None]
    name = packed.main_input_name
    inputs = {name: ids if name == "input_ids" else torch.randn(1, 16, 64), "decoder_input_ids": ids}
    assert torch.equal(packed(**inputs).logits, loaded(**inputs).logits)
