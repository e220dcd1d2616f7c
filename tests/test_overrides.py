"""A mixed recipe, as published for ERNIE-4.5: other settings for some experts and attention, one layer unpacked."""

import json

import pytest
import torch
from click.testing import CliRunner
from moe_models import ernie, logits
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pcdvq import Calibration, CcqConfig, quantize_model
from hf_pcdvq.estimate import estimate
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.modules import QuantExperts
from hf_pcdvq_cli import main
from hf_pcdvq_cli.tune import _shapes

EXPERTS = 2  # encoding them in four bits is slow
RECIPE = {  # the first match applies, so the order matters
    r"layers\.1\.mlp\.experts$": "stream-4.0",
    r"layers\.2\.mlp\.shared": None,
    "mlp": "pcdvq-2.0",
    ".": "int8",
}


def config():
    calibration = Calibration(samples=8, length=64, holdout=2, expert_tokens=16)
    return CcqConfig(overrides=RECIPE, calibration=calibration)


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    """Dense layer 0, experts in four bits in layer 1 and in two in layer 2. The router stays in float32."""
    dense = tmp_path_factory.mktemp("dense")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ernie(num_hidden_layers=3, moe_num_experts=EXPERTS, moe_k=1).to(torch.bfloat16).save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense)
    windows = torch.randint(0, 258, (10, 64), generator=torch.Generator().manual_seed(0))
    quantize_model(model, None, config(), windows, progress=False)
    folder = tmp_path_factory.mktemp("mixed")
    model.save_pretrained(folder)
    torch.save(logits(model), folder / "logits.pt")
    model.hf_quantizer.report.write(folder)
    return folder


def test_every_module_has_its_setting(packed_dir):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    first, second = (model.model.layers[number].mlp.experts for number in (1, 2))
    assert isinstance(first, QuantExperts) and (first.codec.bits, second.codec.bits) == (4, 2)
    assert model.model.layers[1].self_attn.q_proj.codec.bits == 8
    assert type(model.model.layers[2].mlp.shared_experts.up_proj) is torch.nn.Linear
    assert torch.equal(logits(model), torch.load(packed_dir / "logits.pt"))


def test_saved_again_and_dequantized(packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (packed_dir, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    exact = {"dtype": torch.float32}  # otherwise a token might be routed differently
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = AutoModelForCausalLM.from_pretrained(
            packed_dir, quantization_config=CcqConfig(dequantize=True), **exact
        )
    model = AutoModelForCausalLM.from_pretrained(packed_dir, **exact)
    expected = logits(model)
    for dense in (loaded, model.dequantize()):
        assert (logits(dense) - expected).norm() < 1e-4 * expected.norm()


def test_better_experts_have_less_error(packed_dir):
    report = json.loads((packed_dir / "quantization_report.json").read_text())
    losses = {record["name"]: record["proxy_loss"] for record in report["layers"]}
    assert len(losses) == 3 * 4 + 3 + 3 + 2 * 2 * EXPERTS  # attention, dense layer, one shared expert, experts
    for expert in range(EXPERTS):
        fine, coarse = (losses[f"model.layers.{number}.mlp.experts.{expert}.gate_up_proj"] for number in (1, 2))
        assert fine < 0.4 * coarse


def test_estimate_and_count_agree(packed_dir):
    count = count_folder(packed_dir)
    result = estimate(AutoConfig.from_pretrained(packed_dir), config())
    assert result.nbytes == count.file_bytes - count.header_bytes
    assert result.parameters == count.parameters
    assert result.parts["experts"].nbytes == sum(layer.nbytes for layer in count.layers if layer.experts > 1)


def test_inspect_shows_each_setting(packed_dir):
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["inspect", str(packed_dir)]).output
    assert "other settings for some layers" in shown and "layers\\.1\\.mlp\\.experts" in shown
    fields = json.loads(CliRunner().invoke(main, ["inspect", str(packed_dir), "--json"]).stdout)
    bits = {layer["name"]: layer["bits_per_weight"] for layer in fields["layers"]}
    assert bits["model.layers.1.mlp.experts.down_proj"] == pytest.approx(4 + 32 / 96)
    assert bits["model.layers.2.mlp.experts.down_proj"] == pytest.approx(2 + 32 / 96)
    assert bits["model.layers.0.self_attn.q_proj"] == pytest.approx(8 + 32 / 64)


def test_only_single_products_with_kernels_are_tuned(packed_dir):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert {(shape.format, shape.rows, shape.columns) for shape in _shapes(packed_dir, (1,))} == {
        ("pcdvq-2.0", 96, 64),
        ("pcdvq-2.0", 64, 96),
    }


def test_a_recipe_can_be_given_on_the_command_line(tmp_path, tiny_model_dir):
    arguments = ["quantize", str(tiny_model_dir), "--out", str(tmp_path / "packed"), "--setting", "stream-2.0"]
    arguments += ["--no-calibration", "--override", "self_attn=int8"]
    arguments += ["--override", r"layers\.0\.mlp=none"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["overrides"] == [["self_attn", "int8"], [r"layers\.0\.mlp", None]]
    assert CcqConfig.from_dict(stored).codec_of("model.layers.0.self_attn.q_proj").bits == 8
    assert stored["left_unpacked"]["model.layers.*.mlp.up_proj.weight"] == "left alone by overrides"
    bad = CliRunner().invoke(main, [*arguments[:4], "--override", "self_attn"])
    assert bad.exit_code == 2 and "'self_attn' is not PATTERN=SETTING" in bad.output
