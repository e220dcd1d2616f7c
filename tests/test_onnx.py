"""Exporting a packed model to ONNX ends in one clear line."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_pcdvq


def test_onnx_export_names_what_works_instead(tiny_model_dir, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    model.config.use_cache = False
    with pytest.raises(Exception, match="packed layers cannot be exported to ONNX.*dequantize=True"):
        torch.onnx.export(model, (torch.arange(2, 30)[None],), tmp_path / "model.onnx", dynamo=True)
