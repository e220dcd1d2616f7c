"""Everything that users do with a format, with the toy one. Runs in a separate process with Triton's interpreter.

python check.py <folder of a dense model> <working folder>
"""

import sys
from pathlib import Path

import hf_pcdvq_kernels as ops
import torch
from click.testing import CliRunner
from hf_pcdvq_kernels.random_weights import random_packed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq_cli import main

DENSE, WORK = map(Path, sys.argv[1:])
IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits.float()


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def close(a, b, tolerance):
    return (a - b).norm() < tolerance * b.norm()


# Quantizes on load, saves, loads and decodes: as the format of a config, and for some modules only.
for name, config in (("whole", CcqConfig(layout="toy")), ("some", PcdvqConfig(overrides={"mlp": "toy-4.0"}))):
    model = load(DENSE, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(WORK / name)
    assert load_file(WORK / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert torch.equal(logits(load(WORK / name)), logits(model))
    dense = load(WORK / name, quantization_config=type(config)(dequantize=True))
    assert close(logits(dense), logits(model), 1e-5)  # products with decoded weights are summed in a different order

# Calibrates: the result is closer to the original than with rounding.
model, rounded = (load(folder, dtype=torch.float32) for folder in (DENSE, WORK / "whole"))
before = logits(model)
windows = torch.randint(2, 200, (34, 64), generator=torch.Generator().manual_seed(0))
calibration = Calibration(samples=32, length=64, holdout=2)
quantize_model(model, None, CcqConfig(layout="toy", calibration=calibration), windows, progress=False)
assert (logits(model) - before).norm() < 0.9 * (logits(rounded) - before).norm()

# Multiplies, in the reference and as a kernel, with one weight and with a stack.
packed = random_packed("toy-4.0", 9, 192)
exact = ops.dequantize("toy", packed, torch.float64)
torch.library.opcheck(torch.ops.hf_pcdvq_kernels.toy_matmul, (torch.randn(3, 192, requires_grad=True), *packed))
for backend in ("reference", "triton"):
    ops.set_backend(backend)
    assert torch.equal(ops.dequantize("toy", packed, torch.float32), exact.float())
    for tokens in (1, 3, 12):
        x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens)).half()
        # float16 activations and sums
        assert close(ops.matmul("toy", x, packed).double(), x.double() @ exact.T, 2e-3)
    experts = torch.tensor([1, 0], dtype=torch.int32)
    stack = [torch.stack([tensor, tensor.flip(0)]) for tensor in packed]
    x = torch.randn(2, 1, 192, generator=torch.Generator().manual_seed(0)).half()
    assert close(ops.grouped_matmul("toy", x, experts, stack)[0].double(), x[0].double() @ exact.flip(0).T, 2e-3)
assert ops.prepare(x, None, "toy-4.0") is not None
ops.set_backend("auto")

# Is shown by `inspect`.
assert "toy-4.0" in run("inspect", WORK / "whole")
assert "toy-4.0" in run("inspect", WORK / "some")
out = WORK / "command"
assert "4." in run("quantize", DENSE, "--out", out, "--setting", "toy-4.0", "--no-calibration")
assert '"attention"' in run("estimate", DENSE, "--setting", "toy-4.0", "--json")
assert "toy-4.0" in run("card", out, "me/toy")
print("done")
