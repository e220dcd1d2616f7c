"""16-bit float models on a CPU that only emulates 16-bit floats: computed in float32, and unchanged afterwards."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_pcdvq.calibration.run
import hf_pcdvq.calibration.sampling
import hf_pcdvq.calibration.weights
from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.calibration.data import split_windows
from hf_pcdvq.calibration.sampling import sample_from_model
from hf_pcdvq.emulation import is_emulated, placed
from hf_pcdvq.evaluation.metrics import evaluate
from hf_pcdvq.modules import QuantLinear

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 258, (12, 48), generator=torch.Generator().manual_seed(0))
SETTINGS = Calibration(samples=8, length=48, holdout=4)


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch):
    for module in (hf_pcdvq.calibration.run, hf_pcdvq.calibration.sampling, hf_pcdvq.calibration.weights):
        monkeypatch.setattr(module, "is_emulated", lambda dtype, device: request.param)
    return request.param


def test_only_short_floats_on_a_cpu_can_be_emulated():
    assert not is_emulated(torch.float32, CPU) and not is_emulated(torch.bfloat16, torch.device("cuda"))
    assert is_emulated(torch.bfloat16, CPU) != torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_placed_upcasts_and_restores_what_is_still_there():
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=False)).bfloat16()
    module[2].weight = module[0].weight  # tied, as embeddings and heads are
    module.register_buffer("wide", torch.rand(3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wide = module.wide.clone()
    with placed(module, CPU, upcast=True):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
        module[1] = nn.Identity()
        module[0].bias = nn.Parameter(torch.zeros(3, dtype=torch.int16), requires_grad=False)
    after = module.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"]) and after["0.weight"].dtype == torch.bfloat16
    assert after["0.bias"].dtype == torch.int16 and module[2].weight is module[0].weight
    assert module.wide.dtype == torch.float32 and torch.equal(module.wide, wide)


def test_calibration_computes_in_float32_and_leaves_the_model_in_its_dtype(tiny_model_dir, emulated, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtypes = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    quantize_model(model, None, PcdvqConfig(calibration=SETTINGS), WINDOWS, progress=False)
    # A run of the first block records the arguments of blocks in the model's own dtype; everything else is computed.
    assert dtypes.count(torch.bfloat16) == (1 if emulated else len(dtypes))
    _, held_out = split_windows(WINDOWS, SETTINGS)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    figures = evaluate(dense, model, held_out, progress=False)
    # float32 versus bfloat16: three digits in the logits of an untrained model.
    assert model.hf_quantizer.report.comparison.kl_mean == pytest.approx(figures.kl_mean, rel=0.05)
    for name, tensor in model.state_dict().items():
        if name in original and not isinstance(model.get_submodule(name.rpartition(".")[0]), QuantLinear):
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, original[name]), name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(WINDOWS[:1]).logits, model(WINDOWS[:1]).logits)


def test_text_is_written_in_float32_too(tiny_model_dir, emulated):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    dtypes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    windows = sample_from_model(model, 2, 8, seed=0, progress=False)
    assert windows.shape == (2, 8) and model.dtype == torch.bfloat16
    assert set(dtypes) == {torch.float32 if emulated else torch.bfloat16}
