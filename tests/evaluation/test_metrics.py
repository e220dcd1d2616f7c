"""The quality metrics against naive computations in float64, and the inputs that are rejected."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_pcdvq import progress
from hf_pcdvq.evaluation import metrics as module
from hf_pcdvq.evaluation.metrics import evaluate, perplexity, token_windows

ENGLISH = (
    "The river rises in the mountains and flows through three countries before it reaches the sea. For centuries "
    "its valley was the most important trade route between the north and the south, and many towns grew along its "
    "banks. In the nineteenth century engineers built dams and canals, which made it possible for larger ships to "
    "travel upstream. Today the river is known for its bridges, its old harbours and the vineyards on the hills. "
)


@pytest.fixture
def original(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def changed(original):
    """A model that differs from the original the way a quantized one does: by noise on the weights."""
    model = copy.deepcopy(original)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data += 0.05 * torch.randn_like(layer.weight)
    return model


def windows(count=3, length=40):
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(2))


def naive_log_probabilities(model, tokens):
    """float64 `[predictions, vocabulary]`, all windows at once."""
    with torch.inference_mode():
        return model(tokens).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)


def naive_perplexity(model, tokens):
    log_p = naive_log_probabilities(model, tokens)
    return math.exp(-log_p.gather(1, tokens[:, 1:].reshape(-1, 1)).mean())


# ------------------------------------------------------------------------------------------------------------- figures


# The second limit makes chunks of 5 predictions, the last one shorter.
@pytest.mark.parametrize("chunk_bytes", [256 << 20, 5 * 4 * 4 * 258])
def test_figures_match_a_naive_float64_computation(original, changed, monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    tokens = windows()
    log_p, log_q = naive_log_probabilities(original, tokens), naive_log_probabilities(changed, tokens)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)

    result = evaluate(original, changed, tokens, progress=False)

    assert result.kl_mean > 0.01
    assert result.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    percentiles = [result.kl_median, result.kl_p90, result.kl_p99]
    expected = torch.quantile(divergence, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    assert percentiles == pytest.approx(expected, rel=1e-4)
    assert result.perplexity_original == pytest.approx(naive_perplexity(original, tokens), rel=1e-5)
    assert result.perplexity_packed == pytest.approx(naive_perplexity(changed, tokens), rel=1e-5)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert 0 < agreement < 1
    assert result.top1_agreement == pytest.approx(agreement)
    assert (result.context_length, result.windows, result.predictions) == (40, 3, 117)


def test_model_against_itself_has_no_divergence(original):
    result = evaluate(original, original, windows(), progress=False)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0, 0, 1)
    assert result.perplexity_original == result.perplexity_packed


def test_divergence_is_that_of_the_original_from_the_packed_model(original, changed):
    forward = evaluate(original, changed, windows(), progress=False)
    backward = evaluate(changed, original, windows(), progress=False)
    assert forward.kl_mean != pytest.approx(backward.kl_mean, rel=1e-3)
    assert forward.perplexity_original == backward.perplexity_packed


def test_models_of_different_dtypes_are_compared(original):
    result = evaluate(original, copy.deepcopy(original).float(), windows(), progress=False)
    assert 0 < result.kl_mean < 0.01


def test_tokens_of_probability_zero_add_nothing(original):
    class Masked(nn.Module):
        """The original with one logit that is always minus infinity, like vocabulary padding."""

        config = original.config

        def get_input_embeddings(self):
            return original.get_input_embeddings()

        def forward(self, **inputs):
            output = original(**inputs)
            output.logits[..., 0] = -torch.inf
            return output

    result = evaluate(Masked(), Masked(), windows(), progress=False)
    assert result.kl_mean == 0


def test_perplexity_matches_a_naive_computation(original):
    tokens = windows()
    assert perplexity(original, tokens, progress=False) == pytest.approx(naive_perplexity(original, tokens), rel=1e-5)


def test_training_mode_is_off_meanwhile_and_restored(original):
    original.train()
    seen = []
    hook = original.register_forward_hook(lambda model, *_: seen.append((model.training, torch.is_grad_enabled())))
    perplexity(original, windows(count=1), progress=False)
    hook.remove()
    assert seen == [(False, False)]
    assert original.training


def test_progress_shows_the_running_divergence(original, changed, capsys, monkeypatch):
    evaluate(original, changed, windows())
    assert capsys.readouterr().err == ""  # which takes seconds, off a terminal
    for interval in ("_FIRST", "_INTERVAL"):
        monkeypatch.setattr(progress, interval, 1e-9)
    result = evaluate(original, changed, windows())
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("Evaluating: window 3 of 3, ") and last.endswith(f", kl={result.kl_mean:.4f}")
    evaluate(original, changed, windows(), progress=False)
    assert capsys.readouterr().err == ""


def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_memory_for_a_large_vocabulary_is_that_of_one_window_of_both_models():
    vocabulary, length = 150_000, 256  # 73 MiB of bfloat16 logits; neither two windows nor float32 fit below
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocabulary,
    )
    models = [LlamaForCausalLM(config).to(torch.bfloat16) for _ in range(2)]
    tokens = torch.randint(0, vocabulary, (2, length))
    evaluate(*models, tokens[:1, :2], progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current usage
    before = kilobytes("VmRSS")
    evaluate(*models, tokens, progress=False)
    peak = (kilobytes("VmHWM") - before) / 1024
    assert peak < 2 * 73 + 256 + 32  # MiB: logits, the limit for temporaries, some slack


@pytest.mark.real_model
def test_real_model_predicts_english(smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokens = token_windows(tokenizer, ENGLISH, 64, limit=1)
    shuffled = tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert 5 < perplexity(model, tokens, progress=False) < 40
    assert perplexity(model, shuffled, progress=False) > 200


# -------------------------------------------------------------------------------------------------------------- windows


def test_windows_hold_the_text_without_special_tokens(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id
    cut = token_windows(tokenizer, "abcdefghijk", 4)
    assert cut.dtype == torch.int64
    assert [tokenizer.decode(window) for window in cut] == ["abcd", "efgh"]
    assert [tokenizer.decode(window) for window in token_windows(tokenizer, "abcdefghijk", 4, limit=1)] == ["abcd"]
    assert len(token_windows(tokenizer, "abcdefghijk", 4, limit=9)) == 2


def test_text_shorter_than_a_window_is_refused_with_both_numbers(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match="3 tokens.*the 4 of one window"):
        token_windows(tokenizer, "abc", 4)


@pytest.mark.parametrize(("length", "limit"), [(1, None), (4, 0)])
def test_impossible_windows_are_refused(tiny_model_dir, length, limit):
    with pytest.raises(ValueError, match="2 tokens"):
        token_windows(AutoTokenizer.from_pretrained(tiny_model_dir), "abcdefgh", length, limit)


# ------------------------------------------------------------------------------------------------------ what is rejected


def test_vocabularies_of_different_size_are_refused(original):
    config = LlamaConfig(**(original.config.to_dict() | {"vocab_size": 300}))
    with pytest.raises(ValueError, match="258 tokens.*300"):
        evaluate(original, LlamaForCausalLM(config), windows(), progress=False)


def test_model_that_computes_nan_is_refused_by_name(original, changed):
    changed.lm_head.weight.data[7, 7] = torch.nan
    with pytest.raises(ValueError, match="packed model are NaN in window 0"):
        evaluate(original, changed, windows(), progress=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM model are NaN in window 0"):
        perplexity(changed, windows(), progress=False)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (windows(length=600), "600 tokens are longer than the 512 positions"),
        (windows() + 200, "has 258 tokens"),
        (windows()[0], r"int64 \[n, L\]"),
        (windows().float(), r"int64 \[n, L\]"),
        (windows(length=1), r"int64 \[n, L\]"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(original, tokens, message):
    with pytest.raises(ValueError, match=message):
        evaluate(original, original, tokens, progress=False)
    with pytest.raises(ValueError, match=message):
        perplexity(original, tokens, progress=False)
