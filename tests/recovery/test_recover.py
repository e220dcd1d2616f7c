"""A packed model predicts what its original predicts better than before, and stores nothing more than before."""

from pathlib import Path

import moe_models
import pytest
import torch
from packed_pairs import SETTINGS, pair, saved_original, scales, tensors, windows
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_pcdvq import CcqConfig, PcdvqConfig, Recovery, recover
from hf_pcdvq.evaluation.divergence import NotFiniteError
from hf_pcdvq.evaluation.metrics import evaluate
from hf_pcdvq.modules import packed_modules

QUICK = Recovery(steps=12, batch=2, learning_rate=0.02, evaluations=3)
TEXT, HELD_OUT = windows(12), windows(4, seed=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_original(tmp_path_factory.mktemp("original"))


def _recover(packed: PreTrainedModel, teacher: PreTrainedModel, settings: Recovery = QUICK, **options):
    options = {"held_out": HELD_OUT, "progress": False, **options}
    return recover(packed, teacher, None, options.pop("dataset", TEXT), settings=settings, **options)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_format_comes_closer_to_its_original_with_the_same_codes_and_size(original, tmp_path, setting):
    packed, teacher = pair(original, setting)
    packed.save_pretrained(tmp_path / "before")
    stored, before = tensors(packed), evaluate(teacher, packed, HELD_OUT, progress=False)
    report = _recover(packed, teacher)
    after = evaluate(teacher, packed, HELD_OUT, progress=False)
    assert after.kl_mean < 0.97 * before.kl_mean
    # What is reported was computed with dense weights, and is true of the packed model.
    assert report.before.kl_mean == pytest.approx(before.kl_mean, rel=1e-3)
    assert report.after.kl_mean == pytest.approx(after.kl_mean, rel=1e-3)
    trained = {name for name, tensor in tensors(packed).items() if not torch.equal(tensor, stored[name])}
    norms = {name for name in stored if "norm" in name}
    assert trained == scales(packed) | norms
    packed.save_pretrained(tmp_path / "after")
    assert _size(tmp_path / "after") == _size(tmp_path / "before")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    assert all(torch.equal(tensor, tensors(packed)[name]) for name, tensor in tensors(loaded).items())


@pytest.mark.parametrize("config", [PcdvqConfig(bits=2.0), CcqConfig(layout="stream", bits=2.0)])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek"])
def test_every_row_of_every_fused_expert_has_a_factor_of_its_own(tmp_path, kind, config):
    teacher = moe_models.model(kind)
    teacher.save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    stored, before = tensors(packed), evaluate(teacher, packed, HELD_OUT, progress=False)
    _recover(packed, teacher)
    assert evaluate(teacher, packed, HELD_OUT, progress=False).kl_mean < 0.97 * before.kl_mean
    after = tensors(packed)
    stacks = [name for name in scales(packed) if name.endswith(("gate_up_proj_scale", "down_proj_scale"))]
    assert stacks
    for name in stacks:
        factors = after[name] / stored[name]
        assert factors.shape[0] == moe_models.EXPERTS and factors.ndim == 2
        assert factors.std(1).min() > 1e-3 and (factors[0] - factors[1]).abs().max() > 1e-3
    codes = {name for name, tensor in stored.items() if not tensor.is_floating_point()}
    assert codes and all(torch.equal(after[name], stored[name]) for name in codes)


@pytest.mark.parametrize(("vocabulary", "tied"), [(None, False), ("int8", False), ("int8", True)])
def test_biases_are_trained_and_embeddings_are_not(tmp_path, vocabulary, tied):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 258}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
        teacher = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=tied))
    teacher.save_pretrained(tmp_path)
    config = PcdvqConfig(bits=2.0, embeddings=vocabulary, head=vocabulary)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    stored = tensors(packed)
    _recover(packed, teacher)
    trained = {name for name, tensor in tensors(packed).items() if not torch.equal(tensor, stored[name])}
    assert {name for name in stored if name.endswith("bias")} <= trained
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [False, True])
def test_what_is_saved_in_sixteen_bits_is_trained_in_finer_steps(tiny_model_dir, monkeypatch, dtype, emulated):
    """Steps of less than half a unit in the last place add up, wherever the models are computed."""
    monkeypatch.setattr("hf_pcdvq.recovery.recover.is_emulated", lambda kind, device: emulated)
    config = PcdvqConfig(bits=2.0)
    packed = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype, quantization_config=config)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
    before, of_teacher = tensors(packed), tensors(teacher)
    report = _recover(packed, teacher, Recovery(steps=12, batch=2, learning_rate=1e-3, evaluations=2))
    after = tensors(packed)
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    norm = "model.layers.0.input_layernorm.weight"
    assert after[norm].dtype == dtype and not torch.equal(after[norm], before[norm])
    assert report.after.kl_mean < report.before.kl_mean
    measured = evaluate(teacher, packed, HELD_OUT, progress=False)
    assert report.after.kl_mean == pytest.approx(measured.kl_mean, rel=0.05)
    assert all(torch.equal(tensor, of_teacher[name]) for name, tensor in tensors(teacher).items())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(original):
    results = []
    for seed in (0, 0, 1):
        packed, teacher = pair(original)
        _recover(packed, teacher, Recovery(steps=4, batch=2, seed=seed))
        results.append(tensors(packed))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert any(not torch.equal(tensor, results[2][name]) for name, tensor in results[0].items())


def test_computing_activations_twice_changes_nothing_and_leaves_dropout_off(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "vocab_size": 258,
        }
        OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, dropout=0.5)).save_pretrained(tmp_path)
    results, calls = [], []
    for checkpointing in (False, True):
        packed, teacher = pair(tmp_path, "pcdvq-2.0")
        attention, calls_now = packed.model.decoder.layers[0].self_attn, []
        attention.register_forward_pre_hook(lambda *_, seen=calls_now: seen.append(1))
        report = _recover(packed, teacher, Recovery(steps=3, batch=2, evaluations=1, checkpointing=checkpointing))
        results.append((tensors(packed), report.evaluations))
        calls.append(len(calls_now))
        assert "forward" not in vars(packed.model.decoder.layers[0])
    assert calls[1] == calls[0] + 3 * 2  # a second forward pass for every window that is trained on
    assert results[0][1] == results[1][1]
    assert all(torch.equal(tensor, results[1][0][name]) for name, tensor in results[0][0].items())


def test_scales_that_cannot_be_changed_leave_the_model_alone(original, monkeypatch):
    packed, teacher = pair(original)
    stored, codec = tensors(packed), type(next(iter(packed_modules(packed).values())).codec)
    calls, with_factor = [], codec.with_factor

    def fail_late(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return with_factor(self, *args)

    monkeypatch.setattr(codec, "with_factor", fail_late)
    with pytest.raises(MemoryError):
        _recover(packed, teacher)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors(packed).items())


def test_the_model_is_judged_as_often_as_is_asked_for(original):
    packed, teacher = pair(original)
    report = _recover(packed, teacher, Recovery(steps=10, batch=1, evaluations=4, patience=9))
    assert [step for step, _ in report.evaluations] == [0, 3, 5, 8, 10]
    assert report.windows == 10  # of the 12 that there are


def test_a_run_does_not_end_in_its_warm_up(original):
    packed, teacher = pair(original)
    settings = Recovery(steps=10, batch=1, learning_rate=1.0, warmup=0.5, evaluations=10, patience=1)
    assert _recover(packed, teacher, settings).steps == 6


def test_the_best_step_is_kept_and_training_that_brings_nothing_ends(original):
    packed, teacher = pair(original)
    stored = tensors(packed)
    # So large a rate makes the model worse.
    settings = Recovery(steps=20, batch=1, learning_rate=1.0, warmup=0.0, evaluations=10, patience=2)
    report = _recover(packed, teacher, settings)
    assert report.best_step == 0 and report.steps == 4
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors(packed).items())
    assert any("did not improve" in note for note in report.notes())


def test_models_are_as_they_were_afterwards(original):
    packed, teacher = pair(original)
    packed.train()
    modules = {name: type(module) for name, module in packed.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in packed.named_parameters()}
    of_teacher = tensors(teacher)
    _recover(packed, teacher, Recovery(steps=2, batch=1))
    assert {name: type(module) for name, module in packed.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in packed.named_parameters()} == required
    assert all(parameter.grad is None for parameter in packed.parameters())
    assert all(module.training for module in packed.modules())
    assert all(torch.equal(tensor, of_teacher[name]) for name, tensor in tensors(teacher).items())


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_model_alone(original):
    packed, teacher = pair(original)
    stored, calls = tensors(packed), []

    def overflow(module, args, output):
        calls.append(output.requires_grad)
        return output * torch.nan if sum(calls) == 5 else output

    packed.model.norm.register_forward_hook(overflow)
    with pytest.raises(NotFiniteError, match="the loss is not finite at step 3, with the learning rate 0.02"):
        _recover(packed, teacher)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors(packed).items())


def test_progress_is_written_line_by_line(original, capsys):
    packed, teacher = pair(original)
    _recover(packed, teacher, Recovery(steps=4, batch=1, evaluations=2), progress=True)
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("recovery: step 2/4, loss ")]
    assert len(shown) == 1 and "held out" in shown[0] and shown[0].endswith(" left")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_model_that_is_not_packed_is_refused(original):
    teacher = AutoModelForCausalLM.from_pretrained(original)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not packed"):
        _recover(teacher, teacher)


def test_a_packed_teacher_is_refused(original):
    packed, _ = pair(original)
    with pytest.raises(ValueError, match="is packed itself; pass the original"):
        _recover(packed, packed)


def test_a_teacher_with_another_vocabulary_is_refused(original):
    packed, teacher = pair(original)
    teacher.resize_token_embeddings(260)
    with pytest.raises(ValueError, match="has 258 tokens and the teacher 260"):
        _recover(packed, teacher)


def test_text_with_tokens_that_the_models_lack_is_refused(original):
    packed, teacher = pair(original)
    with pytest.raises(ValueError, match="token ids from 0 to 258"):
        _recover(packed, teacher, dataset=torch.arange(259)[None])


def test_text_that_is_known_by_name_only_is_refused(original):
    packed, teacher = pair(original)
    config = packed.hf_quantizer.quantization_config
    config.calibration = type(config)(calibration="wiki.txt").calibration
    with pytest.raises(ValueError, match="was calibrated on 'wiki.txt'"):
        _recover(packed, teacher, dataset=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch", True), ("length", 1), ("learning_rate", float("nan")), ("warmup", 1.0), ("samples", -1)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Recovery: {field} must be"):
        Recovery(**{field: value})
