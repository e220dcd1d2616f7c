"""`hf-pcdvq tune` as far as possible without a GPU: which products it would measure, and what it prints."""

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq_cli import main

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.parametrize(
    "config, codec",
    [
        (PcdvqConfig(bits=2.0), "pcdvq-2.0"),
        (CcqConfig(layout="2.5"), "ccq-2.5"),
        (CcqConfig(layout="stream", bits=3.0), "stream-3.0"),
    ],
)
def test_products_of_a_packed_model(config, codec, tiny_model_dir, tmp_path):
    from hf_pcdvq_kernels.triton.launch_config import Shape, candidates

    from hf_pcdvq_cli.tune import _shapes

    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config).save_pretrained(tmp_path)
    shapes = _shapes(tmp_path, (1, 3, 4, 9))
    # q and o, k and v, gate and up, down; 3 and 4 tokens run as 8, and 9 as 16
    sizes = {(128, 128), (64, 128), (192, 128), (128, 192)}
    assert set(shapes) == {Shape(codec, tokens, *size) for size in sizes for tokens in (1, 8, 16)}
    assert len(shapes) == len(set(shapes)) and all(candidates(shape) for shape in shapes)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_says_that_a_gpu_is_needed(tiny_model_dir):
    done = CliRunner().invoke(main, ["tune", str(tiny_model_dir)])
    assert done.exit_code == 1 and "measured on a GPU, and PyTorch finds none here" in done.output
    done = CliRunner().invoke(main, ["tune", str(tiny_model_dir), "--device", "cpu"])
    assert done.exit_code == 1 and "--device cpu: launch configs are measured on a GPU" in done.output


def test_a_model_that_is_not_packed_is_refused(tiny_model_dir):
    from hf_pcdvq_cli.tune import _shapes

    with pytest.raises(ValueError, match="holds no packed layers"):
        _shapes(tiny_model_dir, (1,))
