"""Sizes estimated from a configuration alone, against published sizes and against files."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from vision_models import save_tiny_gemma3, save_tiny_qwen3_5

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq.emulation import is_emulated
from hf_pcdvq.estimate import estimate, read_model_config
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.modules import QuantLinear
from hf_pcdvq_cli import main

MODELS = Path(__file__).parents[1] / "benchmarks" / "models"
# 2-bit experts as published, everything else in 4 bits, embeddings and output head left in bfloat16.
REST = {r"mlp\.experts$": "ccq-2.0625-published", ".": "stream-4.0"}


@pytest.mark.parametrize(
    ("model", "parameters", "overrides", "gigabytes"),
    (
        ("deepseek_v3", 671e9, REST, 184),
        ("ernie_4_5_300b_a47b", 299.5e9, {r"layers\.[0-6]\.mlp\.experts$": "stream-4.0", **REST}, 89),
    ),
)
def test_published_sizes(model, parameters, overrides, gigabytes):
    config = CcqConfig(layout="2.0625", hadamard=False, overrides=overrides)
    result = estimate(read_model_config(str(MODELS / f"{model}.json")), config)
    assert result.parameters == pytest.approx(parameters, rel=0.001)
    assert result.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.03)
    assert result.parts["experts"].parameters > 0.95 * parameters


@pytest.mark.parametrize("config", (PcdvqConfig(), CcqConfig(layout="stream"), PcdvqConfig(overrides={"mlp": None})))
def test_it_is_what_the_files_take(tiny_model_dir, tmp_path, config):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config).save_pretrained(tmp_path)
    count = count_folder(tmp_path)
    result = estimate(AutoConfig.from_pretrained(tiny_model_dir), config)
    assert result.nbytes == count.file_bytes - count.header_bytes
    assert result.parameters == count.parameters
    packed = sum(result.parts[part].nbytes for part in ("attention", "other layers"))
    assert packed == count.packed_bytes
    assert result.cache_bytes == 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, head size, bytes of bfloat16


def test_tied_embeddings_are_counted_once(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    both = estimate(config, PcdvqConfig())
    config.tie_word_embeddings = True
    tied = estimate(config, PcdvqConfig())
    assert both.nbytes - tied.nbytes == 258 * 128 * 2 and tied.parts["output head"].nbytes == 0


def test_memory_for_quantizing_is_that_of_one_block_however_many_there_are(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    few = estimate(config, PcdvqConfig()).efforts
    config.num_hidden_layers = 40
    many = estimate(config, PcdvqConfig()).efforts
    for how in ("rounded", "calibrated"):
        assert many[how].memory_bytes == pytest.approx(few[how].memory_bytes, rel=0.001)
        assert many[how].read_bytes > 10 * few[how].read_bytes
        assert many[how].disk_bytes > few[how].disk_bytes and few[how].seconds is None
    assert few["calibrated"].memory_bytes > few["rounded"].memory_bytes


def test_embeddings_and_head_in_int8_are_rounded_in_slices():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "vocab_size": 128256}
    config = LlamaConfig(**sizes, tie_word_embeddings=False)  # of Llama-3-8B
    dense, packed = (
        estimate(config, PcdvqConfig(embeddings=setting, head=setting)).efforts for setting in (None, "int8")
    )
    assert packed["calibrated"].memory_bytes == dense["calibrated"].memory_bytes
    # At 24 bytes for each of their weights they would take 12.6 GB.
    assert packed["rounded"].memory_bytes < 5.5e9


def test_processes_divide_activations_and_time_but_not_the_memory_for_a_block(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    one = estimate(config, PcdvqConfig()).efforts["calibrated"]
    four = estimate(config, PcdvqConfig(), processes=4).efforts["calibrated"]
    assert four.memory_bytes == one.memory_bytes and four.read_bytes == one.read_bytes
    # Of the first process: 128 windows of 1024 tokens; hidden states, and inputs of query, output, gate and down.
    activations = 128 * 1024 * 2 * (2 * 128 + 2 * (128 + 128 + 128 + 192))
    assert one.disk_bytes - four.disk_bytes == pytest.approx(activations * 3 / 4 * size_of_a_number(), rel=1e-9)


def test_each_process_has_what_all_experts_receive():
    model = read_model_config(str(MODELS / "deepseek_v3.json"))
    disk = [estimate(model, PcdvqConfig(), processes=count).efforts["calibrated"].disk_bytes for count in (1, 16)]
    numbers = 128 * 1024 * 2 * size_of_a_number() * 2 * 7168  # hidden states in both models
    assert disk[1] < disk[0] and disk[1] > numbers
    with pytest.raises(ValueError, match="too few for 17 processes: start at most 16"):
        estimate(model, PcdvqConfig(), processes=17)


def size_of_a_number():
    """In which hidden states are kept, relative to bfloat16: a CPU that emulates that has float32."""
    return 2 if is_emulated(torch.bfloat16, torch.device("cpu")) else 1


def test_an_output_projection_as_wide_as_the_queries_has_an_input_of_its_own(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    whole, without = (
        estimate(config, PcdvqConfig(modules_to_not_convert=skip)).efforts["calibrated"]
        for skip in (None, ["o_proj"])
    )
    # In both models, less what the dense weights take more than packed ones.
    assert whole.disk_bytes - without.disk_bytes > 0.99 * (128 * 1024 * 2 * 2 * 128)


def test_deepseek_v3_is_rounded_in_a_fraction_of_its_size():
    found = estimate(read_model_config(str(MODELS / "deepseek_v3.json")), CcqConfig(layout="stream")).efforts
    # A block of experts is 22.5 GB in bfloat16 and 2.9 GB packed; the checkpoint is 1342 GB.
    assert 2.9e9 < found["rounded"].memory_bytes < 12e9
    assert 22.5e9 < found["calibrated"].memory_bytes < 60e9
    assert found["rounded"].read_bytes == pytest.approx(2 * 1342e9, rel=0.01)


def test_time_grows_with_the_model(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    found = estimate(config, PcdvqConfig(bits=2.0), timed=True).efforts
    assert 0 < found["rounded"].seconds < found["calibrated"].seconds


def test_the_command(tiny_model_dir, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["estimate", *arguments])

    found = run(
        str(tiny_model_dir / "config.json"), "--setting", "stream-2.0", "--override", "self_attn=int8", "--json"
    )
    fields = json.loads(found.stdout)
    attention = fields["parts"]["attention"]
    assert 8 * attention["nbytes"] / attention["parameters"] == pytest.approx(8 + 32 / 128)
    assert "GPU memory" in run(str(tiny_model_dir)).stdout
    bad = run(str(tiny_model_dir), "--override", "self_attn=3bit")
    assert bad.exit_code == 1 and "overrides['self_attn'] must be one of" in bad.stderr
    bad = run(str(tiny_model_dir), "--setting", "int8")
    assert bad.exit_code == 1 and "setting must be one of" in bad.stderr
    (tmp_path / "config.json").write_text("{}")
    bad = run(str(tmp_path / "config.json"))
    assert bad.exit_code == 1 and "no model_type" in bad.stderr


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_tower_is_counted_as_it_is_stored(calibrated, tmp_path):
    """Of a model whose language model has a class and a config of its own."""
    save_tiny_qwen3_5(tmp_path / "dense")
    calibration = Calibration(samples=4, length=16, holdout=0) if calibrated else None
    config = PcdvqConfig(calibration=calibration)
    if calibrated:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
        tokens = torch.randint(2, 250, (4, 16), generator=torch.Generator().manual_seed(0))
        quantize_model(model, None, config, tokens, progress=False)
    else:
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "dense", dtype=torch.bfloat16, quantization_config=config
        )
    assert isinstance(model.model.visual.blocks[0].attn.qkv, QuantLinear) != calibrated
    model.save_pretrained(tmp_path / "packed")
    count = count_folder(tmp_path / "packed")
    result = estimate(read_model_config(str(tmp_path / "dense")), PcdvqConfig(calibration=calibration))
    assert result.parameters == count.parameters
    assert result.nbytes == count.file_bytes - count.header_bytes
    # One layer has keys and values in bfloat16, the other states that do not grow with the text.
    assert result.cache_bytes == 2 * 64 * 2
    linear, _ = model(input_ids=torch.ones(1, 20, dtype=torch.int64), use_cache=True).past_key_values.layers
    states = [*linear.conv_states.values(), *linear.recurrent_states.values()]
    assert result.state_bytes == sum(tensor.nbytes for tensor in states) > 0


def test_the_command_counts_what_is_calibrated_unless_told_otherwise(tmp_path):
    save_tiny_gemma3(tmp_path, byte_tokenizer())
    found = {}
    for option in ("--json", "--no-calibration"):
        result = CliRunner().invoke(main, ["estimate", str(tmp_path), "--json", option])
        assert result.exit_code == 0, result.stderr
        found[option] = json.loads(result.stdout)
    name = "model.vision_tower.encoder.layers.*.mlp.fc1.weight"
    assert "does not reach it" in found["--json"]["left_unpacked"][name]
    assert name not in found["--no-calibration"]["left_unpacked"]
    assert found["--no-calibration"]["bytes"] < found["--json"]["bytes"]
