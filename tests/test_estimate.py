"""Sizes estimated from a configuration alone, against published sizes and against files."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.estimate import estimate, read_model_config
from hf_pcdvq.files.size import count_folder
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
