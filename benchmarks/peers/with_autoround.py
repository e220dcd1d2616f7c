"""AutoRound, calibrated: learned rounding, block by block. Options: bits, group_size, iters, samples, length."""

import torch
from adapter import arguments, calibration_tokens, write
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out, options = arguments()
length = options.pop("length")
tokens = calibration_tokens(source)[:, :length][: options.pop("samples")]
model = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source / "model")
batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
rounder = AutoRound(
    model,
    tokenizer,
    scheme="W2A16",
    dataset=batches,
    seqlen=length,
    nsamples=len(tokens),
    batch_size=1,
    gradient_accumulate_steps=8,
    device_map="cpu",
    sym=False,
    **options,
)
model, settings = rounder.quantize()
decoded = {f"{name}.weight": model.get_submodule(name).weight.data for name in settings}
bits, group = options["bits"], options["group_size"]
# As its own format stores them: codes, and per group a float16 scale and a zero point with as many bits as a code.
nbytes = sum(weight.numel() * bits // 8 + weight.numel() // group * (16 + bits) // 8 for weight in decoded.values())
write(source, out, "auto-round", decoded, nbytes)
