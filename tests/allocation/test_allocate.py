"""Mixed bits end to end: the target is met as counted on the file, and the bits go where they matter."""

import copy
import json
import logging

import pytest
import torch
from conftest import tiny_llama
from moe_models import model as mixture
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig, allocate_bits, quantize_model
from hf_pcdvq.allocation.dense import quantized, with_errors_of
from hf_pcdvq.allocation.groups import find_groups
from hf_pcdvq.allocation.replay import Replay
from hf_pcdvq.allocation.report import Allocation
from hf_pcdvq.allocation.windows import Windows
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.modules import PackedModule
from hf_pcdvq.quantizer import PackedHfQuantizer

CALIBRATION = Calibration(samples=12, length=32, holdout=0)
TOKENS = torch.randint(0, 258, (12, 32), generator=torch.Generator().manual_seed(0))
PLANTED = "model.layers.1.mlp.down_proj"


def planted():
    """A model to whose predictions only the MLP of the last block adds much."""
    model = tiny_llama()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")) and name != PLANTED:
                module.weight *= 0.001
    return model


def auto(config=PcdvqConfig, **fields):
    return config(bits="auto", calibration=CALIBRATION, **fields)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A model quantized for 2.35 bits per packed weight, and its folder."""
    folder = tmp_path_factory.mktemp("mixed")
    config = auto(target_bits=2.35)
    model = quantize_model(planted(), None, config, TOKENS, progress=False)
    assert config.bits == "auto"  # the caller's is not changed
    model.save_pretrained(folder)
    model.hf_quantizer.report.write(folder)
    return model, folder


def test_the_target_is_met_on_the_file(packed):
    model, folder = packed
    count, allocation = count_folder(folder), model.hf_quantizer.report.allocation
    assert count.bits_per_packed_weight <= 2.35
    assert count.packed_bytes == allocation.mixed.nbytes and allocation.kept == "mixed"
    # A larger setting of any group that is not at the largest would not have fitted.
    steps = [group.weights // 32 for group in allocation.groups if group.setting == "pcdvq-2.0"]
    assert count.packed_bytes + min(steps) > 2.35 * count.packed_weights / 8


def test_the_sensitive_layer_gets_more(packed):
    groups = packed[0].hf_quantizer.report.allocation.groups
    *others, gate_and_up, down = sorted(groups, key=lambda group: (group.block, "mlp" in group.kind))
    assert down.modules == [PLANTED] and gate_and_up.kind == "mlp.gate_proj + mlp.up_proj"
    assert min(down.sensitivity, gate_and_up.sensitivity) > 10 * max(group.sensitivity for group in others)
    assert down.setting == gate_and_up.setting == "pcdvq-2.25"
    assert "pcdvq-2.0" in {group.setting for group in others}


def test_the_config_says_which_layer_has_which_bits(packed):
    model, folder = packed
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = PcdvqConfig.from_dict(stored)
    assert config.to_dict() == stored and config.bits == 2.0 and config.target is None
    for group in model.hf_quantizer.report.allocation.groups:
        for name in group.modules:
            assert config.codec_of(name).format == model.get_submodule(name).codec.format == group.setting


def test_loads_and_equals_its_dense_twin(packed, exact_products):
    model, folder = packed
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.warns(UserWarning, match="loading attributes"):
        twin = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=PcdvqConfig(dequantize=True)
        )
    with torch.inference_mode():
        expected, found = (each(TOKENS[:2]).logits for each in (twin, again))
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_report_is_saved_and_reads_again(packed):
    model, folder = packed
    allocation = model.hf_quantizer.report.allocation
    assert Allocation.read(folder / "allocation.json") == allocation
    text = (folder / "allocation.md").read_text()
    assert "Kept: **mixed**" in text and f"{allocation.mixed.kl:.4f}" in text
    assert (folder / "allocation.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="config.json: no allocation of bits"):
        Allocation.read(folder / "config.json")


def test_a_size_is_that_of_the_whole_file(tmp_path):
    target = 220_000
    model = quantize_model(planted(), None, auto(target_size=target), TOKENS, progress=False)
    model.save_pretrained(tmp_path)
    allocation = model.hf_quantizer.report.allocation
    size = (tmp_path / "model.safetensors").stat().st_size
    steps = [group.weights // 32 for group in allocation.groups if group.setting == "pcdvq-2.0"]
    assert steps and target - min(steps) - 200 < size <= target  # a pattern more in the header takes up to 200


def test_int8_joins_where_the_method_does_not_reach(tmp_path):
    model = quantize_model(planted(), None, auto(target_bits=3.0), TOKENS, progress=False)
    settings = {group.modules[0]: group.setting for group in model.hf_quantizer.report.allocation.groups}
    assert settings[PLANTED] == "int8" and model.get_submodule(PLANTED).codec.bits == 8
    model.save_pretrained(tmp_path)
    assert 2.6 < count_folder(tmp_path).bits_per_packed_weight <= 3.0


def test_uniform_is_kept_where_mixed_is_not_better(caplog):
    """Probed on one repeated token, where attention cannot matter; compared on text, where it does."""
    windows = Windows(TOKENS[:6], torch.full((2, 32), 7), TOKENS[6:])
    config = auto(target_bits=2.75)
    model = tiny_llama()
    with caplog.at_level(logging.WARNING, "hf_pcdvq"):
        allocation = allocate_bits(model, None, config, windows, progress=False)
    assert same_state(model, tiny_llama())
    proposed = {group.name: group.proposed for group in allocation.groups}
    assert proposed["0 self_attn.q_proj"] == "pcdvq-2.0" and "int8" in proposed.values()
    assert allocation.mixed.kl >= allocation.uniform.kl
    assert allocation.kept == "uniform" and {group.setting for group in allocation.groups} == {allocation.base}
    assert "the mixed one is not better" in allocation.reason and "uniform setting is kept" in caplog.text
    assert config.settled(allocation.base, dict(allocation.overrides)).overrides == {}


def test_overrides_of_the_user_stay(tmp_path):
    config = auto(target_bits=4.05, overrides={r"layers\.0\.self_attn": "int8", r"layers\.0\.mlp": None})
    model = quantize_model(planted(), None, config, TOKENS, progress=False)
    allocation = model.hf_quantizer.report.allocation
    assert {group.block for group in allocation.groups} == {1}
    assert model.model.layers[0].self_attn.q_proj.codec.bits == 8
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    assert 4.0 < count_folder(tmp_path).bits_per_packed_weight <= 4.05  # what they take is counted


def test_an_override_takes_no_other_layer_out_of_the_choice():
    config = auto(target_bits=2.8, overrides={r"v_proj$": "int8"})
    allocation = allocate_bits(planted(), None, config, TOKENS, progress=False)
    modules = {name for group in allocation.groups for name in group.modules}
    assert {name for name in modules if "self_attn" in name} == {
        f"model.layers.{block}.self_attn.{part}_proj" for block in range(2) for part in "qko"
    }


def test_experts_of_a_layer_are_allocated_together(tmp_path):
    model = mixture("mixtral").to(torch.bfloat16)
    model = quantize_model(model, None, auto(target_bits=2.45), TOKENS, progress=False)
    allocation = model.hf_quantizer.report.allocation
    assert [group.block for group in allocation.groups if group.kind == "mlp.experts"] == [0, 1]
    model.save_pretrained(tmp_path)
    count = count_folder(tmp_path)
    assert count.bits_per_packed_weight <= 2.45
    assert count.packed_bytes == (allocation.mixed if allocation.kept == "mixed" else allocation.uniform).nbytes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"target_bits": 1.9},
            "target_bits 1.9 is out of range: LlamaForCausalLM can take 2.2333 to 8.2333 bits per",
        ),
        ({"target_bits": 8.5}, "target_bits 8.5 is out of range"),
        ({"target_size": "100kB"}, "target_size 100,000 is out of range"),
        ({"target_size": "1GB"}, "from pcdvq-2.0 to int8"),
    ],
)
def test_targets_out_of_range_are_refused_with_the_range(target, message):
    with pytest.raises(ValueError) as caught:
        quantize_model(planted(), None, auto(**target), TOKENS, progress=False)
    assert message in str(caught.value)


def test_other_refusals(tiny_model_dir):
    with pytest.raises(ValueError, match="needs calibration"):
        AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, quantization_config=PcdvqConfig(bits="auto", target_bits=2.3)
        )
    with pytest.raises(ValueError, match="needs at least 3 windows"):
        quantize_model(planted(), None, auto(target_bits=2.3), TOKENS[:2], progress=False)
    with pytest.raises(ValueError, match="nothing to allocate"):
        allocate_bits(planted(), None, PcdvqConfig(), TOKENS)
    with pytest.raises(ValueError, match="has no output head"):
        quantize_model(planted().model, None, auto(target_bits=2.3), TOKENS, progress=False)


def test_from_pretrained_allocates_too(tiny_model_dir, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{number} of many small words" for number in range(100)))
    calibration = Calibration(dataset=str(file), samples=12, length=32, holdout=0)
    config = PcdvqConfig(bits="auto", target_bits=2.35, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    assert 2.2334 < count_folder(tmp_path / "packed").bits_per_packed_weight <= 2.35


# ---------------------------------------------------------------------------------------------------------- resuming


class Interrupted(Exception):
    pass


def test_an_interrupted_allocation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    probed, genuine = [], Replay.divergence

    def divergence(self, start):
        if len(probed) == 4:
            raise Interrupted
        probed.append(start)
        return genuine(self, start)

    config, model = auto(target_bits=2.35), planted()
    monkeypatch.setattr(Replay, "divergence", divergence)
    with pytest.raises(Interrupted):
        allocate_bits(model, None, config, TOKENS, work_dir=tmp_path, progress=False)
    assert same_state(model, planted())
    with pytest.raises(ValueError, match="belongs to another run, which differs in the model's weights"):
        allocate_bits(tiny_llama(), None, config, TOKENS, work_dir=tmp_path, progress=False)
    counted = []
    monkeypatch.setattr(Replay, "divergence", lambda self, start: counted.append(start) or genuine(self, start))
    resumed = allocate_bits(model, None, config, TOKENS, work_dir=tmp_path, progress=False)
    assert len(counted) == 10 - 4
    again = allocate_bits(model, None, config, TOKENS, work_dir=tmp_path, progress=False)
    assert again == resumed and len(counted) == 6
    fresh = allocate_bits(model, None, config, TOKENS, progress=False)
    assert fresh.groups == resumed.groups and fresh.mixed == resumed.mixed and fresh.overrides == resumed.overrides


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("result.json", {"allocation": {"base": "pcdvq-2.0"}}, "is damaged (allocation: no allocation of bits"),
        ("sensitivity.json", {"0 self_attn.o_proj": "small"}, "is damaged (0 self_attn.o_proj: a divergence must be"),
        ("mixed.json", {"kl": None}, "is damaged (kl: a divergence must be a number"),
    ],
)
def test_a_damaged_record_is_named_and_can_be_computed_again(tmp_path, file, value, message):
    config = auto(target_bits=2.35)
    options = {"work_dir": tmp_path, "progress": False}
    whole = allocate_bits(planted(), None, config, TOKENS, **options)
    if file != "result.json":
        (tmp_path / "allocation" / "result.json").unlink()
    path = tmp_path / "allocation" / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "values": {**content["values"], **value}}))
    with pytest.raises(ValueError) as caught:
        allocate_bits(planted(), None, config, TOKENS, **options)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    again = allocate_bits(planted(), None, config, TOKENS, **options, restart=True)
    assert again.groups == whole.groups and again.mixed == whole.mixed


# --------------------------------------------------------------------------------------------------------- measuring


class WithLogits(torch.nn.Module):
    """A head that adds fixed logits: -inf for tokens that a model rules out."""

    def __init__(self, head, added):
        super().__init__()
        self.head, self.added = head, added
        self.weight = head.weight

    def forward(self, hidden):
        return self.head(hidden) + self.added


def with_logit(value):
    model = planted()
    added = torch.zeros(258)
    added[7] = value
    model.lm_head = WithLogits(model.lm_head, added)
    return model


def test_a_token_that_is_ruled_out_leaves_sensitivities_as_they_are():
    """With -inf for a token, KL is that of the other tokens; here as with a logit that is merely very low."""
    low, ruled_out = (
        Replay(with_logit(value), "model.layers", TOKENS[:2], torch.device("cpu")) for value in (-1e3, -torch.inf)
    )
    found = []
    for replay in (low, ruled_out):
        with replay.running(), torch.no_grad():
            replay._model.get_submodule(PLANTED).weight *= 0.5
            found.append(replay.divergence(1))
    assert found[0] > 1e-4 and found[1] == pytest.approx(found[0], rel=1e-6)


def test_logits_that_are_no_predictions_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM are NaN or infinite"):
        Replay(with_logit(torch.inf), "model.layers", TOKENS[:2], torch.device("cpu"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_group_whose_error_cannot_be_measured_is_named(monkeypatch, value):
    """A layer that overflows once it is quantized must not pass for one that does not matter."""
    model, genuine = planted(), PackedModule.decoded
    shape = model.get_submodule(PLANTED).weight.shape

    def decoded(self, parameter, dtype):
        weight = genuine(self, parameter, dtype)
        return torch.full_like(weight, value) if weight.shape == shape else weight

    monkeypatch.setattr(PackedModule, "decoded", decoded)
    with pytest.raises(ValueError, match=r"with model\.layers\.0\.mlp\.down_proj as quantized, the predictions"):
        allocate_bits(model, None, auto(target_bits=2.35), TOKENS, progress=False)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sensitivities_are_those_of_the_whole_model(kind):
    """From the changed block on, with what came before kept, is the same as computing all of the model."""
    model = tiny_llama() if kind == "llama" else mixture(kind).to(torch.bfloat16).eval()
    names = PackedHfQuantizer(PcdvqConfig(bits=2.0), pre_quantized=False).select(model)
    groups = find_groups(model, "model.layers", names, TOKENS[0])
    codec, device = PcdvqConfig(bits=2.0).codec, torch.device("cpu")
    before = copy.deepcopy(model)
    options = {"device": device, "store": None, "progress": False}
    with quantized(model, "model.layers", names, lambda name: codec, CALIBRATION, TOKENS, **options) as packed:
        assert not same_state(model, before)
    assert same_state(model, before)
    replay = Replay(model, "model.layers", TOKENS[:3], device)
    with replay.running():
        assert replay.divergence(0) < 1e-7  # nothing has changed
        for group in (groups[0], groups[-1], groups[len(groups) // 2]):
            with with_errors_of(model, group, packed):
                found = replay.divergence(group.block)
            changed = copy.deepcopy(before).float()
            for name in group.modules:
                changed.set_submodule(name, packed[name].dequantize(torch.float32))
            with torch.no_grad():
                ours, theirs = (
                    each(TOKENS[:3]).logits.log_softmax(-1).flatten(0, 1)
                    for each in (changed, copy.deepcopy(before).float())
                )
            assert found == pytest.approx(
                kl_div(ours, theirs, log_target=True, reduction="batchmean").item(), rel=1e-3
            )
    assert same_state(model, before)


def test_tied_weights_are_tied_again_afterwards():
    settings = tiny_llama().config
    settings.tie_word_embeddings = True  # embeddings and head are one tensor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(settings).to(torch.bfloat16).eval()
    before, keys = copy.deepcopy(model.state_dict()), dict(model.all_tied_weights_keys)
    config = PcdvqConfig(bits=2.0, head="int8", calibration=CALIBRATION)
    names = PackedHfQuantizer(config, pre_quantized=False).select(model)
    options = {"device": torch.device("cpu"), "store": None, "progress": False}
    with quantized(model, "model.layers", names, config.codec_of, CALIBRATION, TOKENS, **options) as packed:
        assert packed["model.embed_tokens"].codec.format == model.lm_head.codec.format == "int8"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.all_tied_weights_keys == keys
