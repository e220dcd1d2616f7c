"""A model that is quantized part by part gives the very files that it gives in memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import moe_models
import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_pcdvq import Calibration, quantize_model
from hf_pcdvq.calibration import model as calibration_model
from hf_pcdvq.calibration.activations import MappedActivations
from hf_pcdvq.calibration.run import CalibratedRun
from hf_pcdvq.config import config_of_setting
from hf_pcdvq.streaming import quantize as streaming
from hf_pcdvq.streaming.checkpoint import CannotStream, Checkpoint
from hf_pcdvq.streaming.quantize import quantize_checkpoint

TOKENS = torch.randint(2, 90, (8, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
SHARDS = {"max_shard_size": "100KB"}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def biased():
    """Biases, and embeddings that are tied to the output head."""
    config = Qwen2Config(**SIZES, num_key_value_heads=1, intermediate_size=128, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.bfloat16()


def opt():
    """Layers to pack before and after the blocks, and biases everywhere."""
    config = OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32, init_std=0.2)
    return OPTForCausalLM(config)


def gemma():
    """Tied embeddings of a class of their own, which multiplies them by a factor."""
    config = Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, head_dim=32, intermediate_size=128, initializer_range=0.2
    )
    return Gemma3ForCausalLM(config).bfloat16()


MODELS = {"llama": tiny_llama, "biased": biased, "gemma": gemma, "opt": opt, **moe_models.KINDS}
CASES = [
    ("llama", "pcdvq-2.25", {}),
    ("llama", "ccq-2.0625", {}),
    ("biased", "stream-2.0", {}),
    ("biased", "pcdvq-2.0", {"overrides": {"v_proj": None, "o_proj": "int8"}}),
    ("biased", "pcdvq-2.0", {"head": "int8"}),  # one tensor for the embeddings and the head
    ("gemma", "stream-2.0", {"embeddings": "int8"}),
    ("opt", "ccq-2.5", {}),
    ("mixtral", "ccq-2.0625", {}),
    ("mixtral", "pcdvq-2.25", {"overrides": {"experts": None}}),  # experts that are fused, and not packed
    ("deepseek", "pcdvq-2.0", {}),
    ("ernie", "ccq-2.75", {}),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of dense models in several files, by name."""
    folders = {}
    for name, build in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("dense") / name
        seeded(build).save_pretrained(folders[name], **SHARDS)
    return folders


def configured(setting, calibrated, options):
    calibration = Calibration(samples=6, length=16, holdout=2, expert_tokens=8) if calibrated else None
    return config_of_setting(setting, calibration=calibration, **options)


def in_memory(folder, config, out):
    if config.calibration is None:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        quantize_model(model, None, config, TOKENS, progress=False)
    model.save_pretrained(out)
    return model.hf_quantizer.report


def streamed(folder, config, out, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
    out.mkdir()
    scratch = out.with_name("scratch")
    scratch.mkdir(exist_ok=True)
    return quantize_checkpoint(model, None, config, out, scratch, TOKENS, progress=False, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_files(found, expected):
    found, expected = contents(found), contents(expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize(("name", "setting", "options"), CASES)
def test_rounded_files_are_those_of_the_path_in_memory(name, setting, options, dense, tmp_path):
    in_memory(dense[name], configured(setting, False, options), tmp_path / "expected")
    streamed(dense[name], configured(setting, False, options), tmp_path / "found")
    assert_same_files(tmp_path / "found", tmp_path / "expected")


@pytest.mark.parametrize(("name", "setting", "options"), CASES)
def test_calibrated_files_and_comparison_are_those_of_the_path_in_memory(name, setting, options, dense, tmp_path):
    expected = in_memory(dense[name], configured(setting, True, options), tmp_path / "expected")
    result = streamed(dense[name], configured(setting, True, options), tmp_path / "found")
    assert_same_files(tmp_path / "found", tmp_path / "expected")
    report = result.compare(tmp_path / "found")
    assert report.comparison == expected.comparison and report.comparison.kl_mean > 0
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert [block.output_error for block in report.blocks] == [block.output_error for block in expected.blocks]
    del result, report
    assert list((tmp_path / "scratch").iterdir()) == []  # no activations stay


def test_no_more_than_one_block_is_in_memory(dense, tmp_path, monkeypatch):
    loaded, seen = [], []
    convert = Checkpoint._convert

    def watched(self, keys, device):
        found = convert(self, keys, device)
        if device.type != "meta":
            layers = self.model.model.layers
            seen.append([number for number, layer in enumerate(layers) if not layer.mlp.up_proj.weight.is_meta])
            loaded.append(found)
        return found

    monkeypatch.setattr(Checkpoint, "_convert", watched)
    streamed(dense["llama"], configured("pcdvq-2.0", True, {}), tmp_path / "found")
    assert [0] in seen and [1] in seen and [0, 1] not in seen
    head = [found for found in loaded if "lm_head.weight" in found]
    assert head and all(found == {"lm_head.weight"} for found in head)


@pytest.mark.parametrize("before", ["write", "save"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("name", "options"), [("mixtral", {}), ("biased", {"head": "int8"})])
def test_interrupted_run_goes_on_at_the_block_where_it_stopped(
    name, options, calibrated, before, dense, tmp_path, monkeypatch
):
    in_memory(dense[name], configured("pcdvq-2.25", calibrated, options), tmp_path / "expected")
    write, store = streaming.Output.write, streaming.BlockStore.save
    saved = []

    def killed(self, model, unit):
        if any(name.startswith("model.layers.1") for name in unit.modules):
            raise KeyboardInterrupt
        write(self, model, unit)

    def not_kept(self, number, result):
        if any(layer.startswith("model.layers.1") for layer in result.packed):
            raise KeyboardInterrupt
        store(self, number, result)

    def counted(self, number, result):
        saved.append(list(result.packed))
        store(self, number, result)

    if before == "write":
        monkeypatch.setattr(streaming.Output, "write", killed)
    else:
        monkeypatch.setattr(streaming.BlockStore, "save", not_kept)
    run = configured("pcdvq-2.25", calibrated, options), tmp_path / "found"
    with pytest.raises(KeyboardInterrupt):
        streamed(dense[name], *run, work_dir=tmp_path / "work")
    monkeypatch.setattr(streaming.Output, "write", write)
    monkeypatch.setattr(streaming.BlockStore, "save", counted)
    for remains in ("found", "scratch"):  # as the command does
        shutil.rmtree(tmp_path / remains)
    streamed(dense[name], *run, work_dir=tmp_path / "work")
    computed = {layer.split(".")[2] for layers in saved for layer in layers if layer.startswith("model.layers.")}
    assert computed == ({"1"} if before == "save" else set())
    assert_same_files(tmp_path / "found", tmp_path / "expected")


def test_finished_blocks_of_another_checkpoint_are_refused(dense, tmp_path):
    run = configured("pcdvq-2.25", False, {})
    streamed(dense["llama"], run, tmp_path / "first", work_dir=tmp_path / "work")
    other = tmp_path / "other"
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] += 1
    model.save_pretrained(other, **SHARDS)
    with pytest.raises(ValueError, match="belongs to another run, which differs in the model's weights"):
        streamed(other, run, tmp_path / "second", work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="belongs to another run, which differs in the settings"):
        streamed(dense["llama"], configured("pcdvq-2.0", False, {}), tmp_path / "third", work_dir=tmp_path / "work")


@pytest.mark.parametrize("name", ["biased", "mixtral"])
def test_finished_blocks_are_gone_on_with_in_memory(name, dense, tmp_path, monkeypatch):
    run = configured("pcdvq-2.0", True, {})
    streamed(dense[name], run, tmp_path / "found", work_dir=tmp_path / "work")
    (tmp_path / "work" / "block-0001.safetensors").unlink()
    saved, store = [], streaming.BlockStore.save
    monkeypatch.setattr(streaming.BlockStore, "save", lambda *args: saved.append(args[1]) or store(*args))
    model = AutoModelForCausalLM.from_pretrained(dense[name])
    quantize_model(model, None, run, TOKENS, work_dir=tmp_path / "work", progress=False)
    assert saved == [1]
    model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "found", tmp_path / "expected")


@pytest.mark.parametrize("calibrated", [False, True])
def test_finished_blocks_of_another_kind_of_device_are_refused(calibrated, dense, tmp_path, monkeypatch):
    run = configured("pcdvq-2.0", calibrated, {})
    with monkeypatch.context() as patch:  # as an accelerator would have recorded it
        for module in (streaming, calibration_model):
            of = module.run_identity
            patch.setattr(module, "run_identity", lambda *args, of=of: {**of(*args), "the kind of device": "cuda"})
        streamed(dense["llama"], run, tmp_path / "first", work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="belongs to another run, which differs in the kind of device"):
        streamed(dense["llama"], run, tmp_path / "second", work_dir=tmp_path / "work")


def test_what_cannot_be_read_part_by_part_is_refused_with_the_reason(dense, tmp_path):
    def load(edit):
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(dense["biased"], folder)
        rewrite(folder, edit)
        return AutoModelForCausalLM.from_pretrained(folder, device_map="meta")

    def without_norm(state):
        del state["model.layers.1.input_layernorm.weight"]

    def both_ends_of_a_tie(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    with pytest.raises(CannotStream, match=r"'model.layers.1.input_layernorm.weight' is not in its files"):
        Checkpoint(load(without_norm))
    with pytest.raises(CannotStream, match="lm_head.weight and model.embed_tokens.weight are tied, and both are"):
        Checkpoint(load(both_ends_of_a_tie))


def rewrite(folder, edit):
    """Change the tensors of a folder, which are put into one file."""
    files = sorted(folder.glob("*.safetensors"))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink()
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_text_that_the_model_writes_needs_it_whole(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense["llama"], device_map="meta")
    with pytest.raises(CannotStream, match="writes its calibration text itself"):
        quantize_checkpoint(model, None, configured("pcdvq-2.0", True, {}), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("options", "calibration", "reason"),
    [
        ({"bits": "auto", "target_bits": 2.1}, {}, 'bits="auto" measures'),
        ({}, {"fisher_groups": 2}, "fisher_groups=2 takes a backward pass"),
        ({}, {"tune_steps": 3}, "tune_steps=3 takes a backward pass"),
    ],
)
def test_settings_that_need_the_whole_model_are_refused_by_name(options, calibration, reason, dense, tmp_path):
    config = config_of_setting("pcdvq-2.0", calibration=Calibration(samples=6, length=16, **calibration), **options)
    with pytest.raises(CannotStream, match=reason):
        streamed(dense["llama"], config, tmp_path / "found")
    assert list((tmp_path / "found").iterdir()) == []


@pytest.mark.parametrize("name", ["biased", "mixtral"])
def test_activations_that_a_device_has_room_for_stay_there(name, dense, tmp_path, monkeypatch):
    run = configured("pcdvq-2.0", True, {})
    streamed(dense[name], run, tmp_path / "expected")
    monkeypatch.setattr(CalibratedRun, "_has_room", lambda self, hidden: True)
    used, join = [], MappedActivations.join
    monkeypatch.setattr(MappedActivations, "join", lambda self, *args: used.append(args[0]) or join(self, *args))
    streamed(dense[name], run, tmp_path / "found")
    assert_same_files(tmp_path / "found", tmp_path / "expected")
    # States before the first block, and for the comparison; no inputs of layers.
    assert set(used) == set(range(6))


def test_own_share_of_corrections_is_that_of_the_path_in_memory(dense, tmp_path):
    for name in ("llama", "mixtral"):
        run = configured("pcdvq-2.0", True, {})
        run.calibration = replace(run.calibration, correction="own")
        in_memory(dense[name], run, tmp_path / f"{name}-expected")
        streamed(dense[name], run, tmp_path / f"{name}-found")
        assert_same_files(tmp_path / f"{name}-found", tmp_path / f"{name}-expected")


@pytest.mark.parametrize("fisher_groups", [0, 2])
def test_windows_that_go_through_a_block_together_change_rounding_errors_only(fisher_groups, dense):
    weights = {}
    for batch, groups in ((16, fisher_groups), (64, fisher_groups), (16, 2 - fisher_groups)):  # one window, and four
        run = configured("pcdvq-2.25", True, {})
        run.calibration = replace(run.calibration, fisher_groups=groups)
        model = AutoModelForCausalLM.from_pretrained(dense["llama"], dtype=torch.float32)
        quantize_model(model, None, run, TOKENS, batch_tokens=batch, progress=False)
        weights[batch, groups] = model.model.layers[0].self_attn.q_proj.dequantize(torch.float32).weight
    one, four, other = weights.values()
    assert (one - four).norm() < 1e-3 * one.norm() < (one - other).norm()


def test_the_original_is_not_overwritten(dense, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense["llama"], folder)
    before = contents(folder)
    for calibrated in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
        with pytest.raises(ValueError, match="holds the original"):
            quantize_checkpoint(model, None, configured("pcdvq-2.0", calibrated, {}), folder, tmp_path, TOKENS)
    assert contents(folder) == before


def test_of_a_file_and_an_index_the_weights_are_those_that_transformers_loads(dense, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense["llama"], folder)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[5] += 1
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    in_memory(folder, configured("pcdvq-2.0", False, {}), tmp_path / "expected")
    streamed(folder, configured("pcdvq-2.0", False, {}), tmp_path / "found")
    assert_same_files(tmp_path / "found", tmp_path / "expected")


def test_activations_are_read_back_and_a_tensor_that_was_read_stays_when_it_is_replaced(tmp_path):
    kept = MappedActivations(tmp_path)
    first = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    kept[0, "a"] = first
    read = kept[0, "a"]
    kept[0, "a"] = torch.zeros(1, 3, 4)
    assert torch.equal(read, first) and torch.equal(kept[0, "a"], torch.zeros(1, 3, 4))
    kept.join("all", iter([torch.ones(2, 5), torch.zeros(0, 5), torch.zeros(1, 5)]))
    assert torch.equal(kept["all"], torch.tensor([[1.0] * 5, [1.0] * 5, [0.0] * 5]))
    kept["empty"] = torch.zeros(0, 4)
    assert kept["empty"].shape == (0, 4) and len(kept) == 3 and (0, "a") in kept
    assert len(list(Path(tmp_path).rglob("*"))) == 4  # a folder and three files
    del kept, read
    assert list(tmp_path.iterdir()) == []


def test_several_files_hold_the_same_tensors_and_belong_together(dense, tmp_path):
    # Which tensors share a file may differ: in memory, those that were read from one file are kept together.
    in_memory(dense["ernie"], configured("pcdvq-2.0", False, {}), tmp_path / "expected")
    streamed(dense["ernie"], configured("pcdvq-2.0", False, {}), tmp_path / "found", **SHARDS)
    files = sorted((tmp_path / "found").glob("*.safetensors"))
    index = json.loads((tmp_path / "found" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and set(index["weight_map"].values()) == {file.name for file in files}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "found")  # which checks that the files belong together
    assert torch.equal(
        moe_models.logits(model), moe_models.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "expected"))
    )
