"""GPTQ by GPTQModel, calibrated. Options: bits, group_size."""

import os
import tempfile

# GPTQModel takes its number of CPU workers from the environment; without it, it starts more than there are cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

import torch
from adapter import arguments, calibration_tokens, write
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file

source, out, options = arguments()
windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration_tokens(source)]
model = GPTQModel.load(str(source / "model"), QuantizeConfig(**options), device="cpu")
model.quantize(windows, batch_size=1)
with tempfile.TemporaryDirectory() as folder:
    model.save(folder)
    files = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")]
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
suffixes = ("qweight", "qzeros", "scales", "g_idx")
nbytes = sum(tensor.nbytes for name, tensor in stored.items() if name.rsplit(".", 1)[-1] in suffixes)
decoded = {
    f"{name.removeprefix('model.') if name.startswith('model.model.') else name}.weight": module.dequantize_weight().T
    for name, module in loaded.model.named_modules()
    if hasattr(module, "dequantize_weight")
}
write(source, out, "gptqmodel", decoded, nbytes)
