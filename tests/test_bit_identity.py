"""Packed files never change by accident: the output of every setting is compared with a record of earlier output.

Codes are compared by hash. Floating-point tensors are compared by their sums, since their last bits depend on the
order of additions, which varies between CPUs. The weights are multiples of 1/64 and rotations have blocks of 64, so
rotated weights are exact on any CPU. Calibration computes Hessians and their inverses in float32, where the last bits
occasionally decide a code: on a different kind of CPU than the recorded one, calibrated models' codes are skipped.

    python tests/test_bit_identity.py        updates the record; only if a format changes, which then gets a new name
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq.config import config_of_setting

RECORD = Path(__file__).parent / "data" / "packed_files.json"
BLOCK = {"hadamard_block": 64}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SETTINGS = (
    *("pcdvq-2.0", "pcdvq-2.25"),
    *("ccq-2.75", "ccq-2.5", "ccq-2.0625", "ccq-2.75-published", "ccq-2.5-published", "ccq-2.0625-published"),
    *("stream-2.0", "stream-2.25", "stream-2.5", "stream-3.0", "stream-4.0"),
)
MIXED = {
    "q_proj": "int8",
    "k_proj": "stream-3.0",
    "v_proj": None,
    "o_proj": "ccq-2.5-published",
    "down_proj": "pcdvq-2.0",
}


def projection():
    return PcdvqConfig(magnitude="projection", **BLOCK)


def wide_window():
    return CcqConfig(layout="stream", window_bits=14, **BLOCK)


CONFIGS = {
    **{name: lambda name=name: config_of_setting(name, **BLOCK) for name in SETTINGS},
    "pcdvq-2.25, projection": projection,
    "stream-2.0, window 14": wide_window,
    "pcdvq-2.25 with overrides": lambda: PcdvqConfig(overrides=MIXED, **BLOCK),
    "stream-2.0 with overrides": lambda: config_of_setting("stream-2.0", overrides=MIXED, **BLOCK),
}
CALIBRATED = ("pcdvq-2.25", "ccq-2.5", "ccq-2.0625", "stream-2.0")
EXPERTS = ("pcdvq-2.25", "ccq-2.0625", "stream-2.5", "int8 experts")


def on_a_grid(model):
    """Replace the model's weights with multiples of 1/64, roughly normal, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            dice = torch.randint(-8, 9, (3, *weight.shape), generator=generator).sum(0)
            weight.data = (dice / 64).to(weight.dtype)
    return model.eval()


def llama():
    return on_a_grid(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SIZES)))


def mixtral():
    return on_a_grid(
        MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, **SIZES))
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense models on disk, by name."""
    made = {}
    for build in (llama, mixtral):
        made[build.__name__] = tmp_path_factory.mktemp(build.__name__)
        build().save_pretrained(made[build.__name__])
    return made


def packed(folder, config, out):
    """Pack the model in a folder with a config while loading it."""
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(out)
    return fingerprint(out)


def calibrated(model, setting, out):
    windows = torch.randint(64, (12, 48), generator=torch.Generator().manual_seed(0))
    config = config_of_setting(setting, calibration=Calibration(samples=10, length=48, holdout=2), **BLOCK)
    quantize_model(model, None, config, windows, progress=False).save_pretrained(out)
    return fingerprint(out)


def experts_config(name):
    if name == "int8 experts":
        return PcdvqConfig(overrides={"experts": "int8"}, **BLOCK)
    return config_of_setting(name, **BLOCK)


def fingerprint(folder):
    """For every tensor in a folder: dtype, shape and hash of its integers, or the sums of its floats and squares."""
    found = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if tensor.is_floating_point():
            found[name] = [list(tensor.shape), tensor.double().sum().item(), tensor.double().square().sum().item()]
        else:
            content = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
            found[name] = f"{tensor.dtype} {list(tensor.shape)} {content}"
    return found


def cpu():
    """The CPU properties that determine the order of additions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kind = [re.search(rf"^{key}\s*: (.*)$", info, re.MULTILINE) for key in ("vendor_id", "cpu family", "model")]
    return ", ".join([*(found[1] for found in kind if found), torch.backends.cpu.get_cpu_capability()])


def compare(found, case, tolerance=1e-5, codes=True):
    recorded = json.loads(RECORD.read_text())[case]
    assert found.keys() == recorded.keys()
    for name, figures in recorded.items():
        if not isinstance(figures, str):
            assert found[name][0] == figures[0], name
            assert found[name][1:] == pytest.approx(figures[1:], rel=tolerance, abs=tolerance), name
        elif codes:
            assert found[name] == figures, name


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_packs_what_it_packed(name, folders, tmp_path):
    compare(packed(folders["llama"], CONFIGS[name](), tmp_path), name)


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_pack_what_they_packed(name, folders, tmp_path):
    compare(packed(folders["mixtral"], experts_config(name), tmp_path), f"experts, {name}")


@pytest.mark.parametrize("build", (llama, mixtral))
@pytest.mark.parametrize("setting", CALIBRATED)
def test_calibration_packs_what_it_packed(build, setting, tmp_path):
    recorded_on = json.loads(RECORD.read_text())["cpu"]
    same = cpu() == recorded_on
    # A few codes differ on another CPU, and so do the scales, slightly.
    found = calibrated(build(), setting, tmp_path)
    compare(found, f"{build.__name__} calibrated, {setting}", 1e-5 if same else 1e-2, codes=same)
    if not same:
        pytest.skip(f"codes of calibrated models were recorded on {recorded_on}, this is {cpu()}")


def record(work):
    """Record everything that the tests compare."""
    found = {"cpu": cpu()}
    for build in (llama, mixtral):
        build().save_pretrained(work / build.__name__)
    for name, config in CONFIGS.items():
        found[name] = packed(work / "llama", config(), work / name)
    for name in EXPERTS:
        found[f"experts, {name}"] = packed(work / "mixtral", experts_config(name), work / f"experts, {name}")
    for build in (llama, mixtral):
        for setting in CALIBRATED:
            case = f"{build.__name__} calibrated, {setting}"
            found[case] = calibrated(build(), setting, work / case)
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        RECORD.parent.mkdir(exist_ok=True)
        cases = record(Path(temporary)).items()
        lines = [f"{json.dumps(case)}: {json.dumps(found)}" for case, found in cases]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
