"""`num_parameters()` of a packed model is that of the dense one."""

import copy
import gc
import pickle
import weakref

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_pcdvq


@pytest.fixture(scope="module")
def mixture_dir(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    folder = tmp_path_factory.mktemp("mixture")
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny_model_dir", "mixture_dir"])
def test_weights_are_counted(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf_pcdvq.PcdvqConfig())
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (packed, loaded, copy.deepcopy(packed)):
        assert model.num_parameters() == dense.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
        assert model.model.num_parameters() == dense.model.num_parameters()
    trained = sum(parameter.numel() for parameter in packed.parameters() if parameter.requires_grad)
    assert 0 < packed.num_parameters(only_trainable=True) <= trained
    assert pickle.loads(pickle.dumps(packed)).num_parameters() == dense.num_parameters()


def test_a_copy_counts_itself(tiny_model_dir):
    packed = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    copied = copy.deepcopy(packed)
    del copied.lm_head
    assert copied.num_parameters() < packed.num_parameters()
    packed.dequantize()
    assert packed.num_parameters() == sum(parameter.numel() for parameter in packed.parameters())


def test_a_packed_model_is_freed_with_its_last_reference(tiny_model_dir):
    """Without waiting for the garbage collector: what comes next may need the memory."""
    packed = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    gone = weakref.ref(packed.model.layers[0].mlp.up_proj)
    gc.collect()
    gc.disable()
    try:
        del packed
        assert gone() is None
    finally:
        gc.enable()
