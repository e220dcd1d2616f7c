"""Quality of a packed model, measured against the model it was made from, on the same text.

Three numbers say how close the two are: the Kullback-Leibler divergence KL(original || packed) of the next-token
distributions, in nats per prediction; how often the most likely next token is the same; and the perplexity of both.
The divergence is the one to trust: perplexity can stay the same, or even fall, while the model's answers change.

Perplexities at different context lengths are not comparable, so the length is part of every result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress_of

# Memory for the float32 temporaries of one chunk of predictions, and how many copies of its logits `_compare_rows`
# holds at once: the log-probabilities of both models, a product, and the input of the current log-softmax.
_CHUNK_BYTES = 256 << 20
_CHUNK_COPIES = 4


@dataclass(frozen=True)
class Evaluation:
    """How a packed model compares with its original.

    Attributes:
        perplexity_original, perplexity_packed: exp of the mean negative log-likelihood of the text's tokens.
        kl_mean, kl_median, kl_p90, kl_p99: KL(original || packed) over the predictions, in nats: mean, median, 90th
            and 99th percentile.
        top1_agreement: share of the predictions, 0 to 1, in which both models have the same most likely token.
        context_length: tokens per window.
        windows: number of windows.
        predictions: number of predicted tokens, `windows * (context_length - 1)`.
    """

    perplexity_original: float
    perplexity_packed: float
    kl_mean: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    top1_agreement: float
    context_length: int
    windows: int
    predictions: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields as JSON-serializable values."""
        return asdict(self)


def token_windows(tokenizer: Any, text: str, length: int, limit: int | None = None) -> Tensor:
    """Tokenize a text as a whole, without special tokens, and cut it into windows; an incomplete one is dropped.

    Args:
        tokenizer: a Transformers tokenizer.
        text: the whole text. Read its file with `newline=""`, otherwise Python translates line ends.
        length: tokens per window, at least 2.
        limit: keep at most this many windows, from the start; None keeps all.

    Returns:
        int64 `[windows, length]` on the CPU.

    Raises:
        ValueError: `length` or `limit` is too small, or the text is shorter than one window.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(
            f"windows need at least 2 tokens, and the limit is at least 1: got length {length}, limit {limit}"
        )
    # verbose=False: the tokenizer would warn that the text is longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {length} of one window; give a longer text")
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def evaluate(original: nn.Module, packed: nn.Module, windows: Tensor, progress: bool = True) -> Evaluation:
    """Compare a packed causal language model with its original, window by window.

    The two may be on different devices and have different dtypes; logits are compared in float32 on the original's
    device. Of each window, only one loss, divergence and agreement per prediction are kept.

    Args:
        original, packed: causal language models of Transformers with the same vocabulary.
        windows: int64 `[n, L]`, see `token_windows`. Each token of a window is predicted from those before it, so a
            window has `L - 1` predictions.
        progress: show the progress with the mean divergence so far.

    Raises:
        ValueError: the vocabularies differ in size, the windows do not fit the models, or logits are NaN.
    """
    for model in (original, packed):
        check_windows(model, windows)
    with _inference(original), _inference(packed):
        pairs = ((window_logits(original, window), window_logits(packed, window)) for window in windows)
        return compare_logits(pairs, windows, progress)


def compare_logits(pairs: Iterable[tuple[Tensor, Tensor]], windows: Tensor, progress: bool = True) -> Evaluation:
    """Compare the predictions of a packed model with those of its original.

    Args:
        pairs: for each window the logits `[L - 1, vocabulary]` of the original and of the packed model, in any
            floating-point dtypes, on any devices; consumed one pair at a time.
        windows: int64 `[n, L]`.
        progress: show the progress with the mean divergence so far.

    Raises:
        ValueError: the vocabularies differ in size, or logits are NaN.
    """
    parts = []
    running = 0.0
    remaining = iter(pairs)
    bar = progress_of(windows, desc="Evaluating", unit="window", shown=progress)
    for index, window in enumerate(bar):
        # Nothing keeps a reference to the logits; otherwise those of two windows would be in memory at once.
        part = _compare(*next(remaining), window[1:])
        _refuse_nan(part[0], "original", index)
        _refuse_nan(part[1], "packed", index)
        parts.append(part)
        running += part[2].double().mean().item()
        bar.set_postfix(refresh=False, kl=f"{running / (index + 1):.4f}")
    loss_original, loss_packed, divergence, same = (torch.cat(column).double() for column in zip(*parts))
    ordered = divergence.sort().values
    return Evaluation(
        perplexity_original=math.exp(loss_original.mean()),
        perplexity_packed=math.exp(loss_packed.mean()),
        kl_mean=ordered.mean().item(),
        kl_median=_percentile(ordered, 50),
        kl_p90=_percentile(ordered, 90),
        kl_p99=_percentile(ordered, 99),
        top1_agreement=same.mean().item(),
        context_length=windows.shape[1],
        windows=windows.shape[0],
        predictions=len(ordered),
    )


def perplexity(model: nn.Module, windows: Tensor, progress: bool = True) -> float:
    """Perplexity of one causal language model over windows int64 `[n, L]`, `L - 1` predictions each.

    Raises:
        ValueError: the windows do not fit the model, or its logits are NaN.
    """
    check_windows(model, windows)
    total = 0.0
    with _inference(model):
        bar = progress_of(windows, desc="Perplexity", unit="window", shown=progress)
        for index, window in enumerate(bar):
            losses = _losses(window_logits(model, window), window[1:])
            _refuse_nan(losses, type(model).__name__, index)
            total += losses.double().mean().item()
            bar.set_postfix(refresh=False, ppl=f"{math.exp(total / (index + 1)):.2f}")
    return math.exp(total / len(windows))


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Reject windows that would end in an index error deep inside the model, or in a device-side assertion.

    Args:
        model: a causal language model.
        windows: int64 `[n, L]`, L >= 2, on the CPU.

    Raises:
        ValueError: there are none, or they have token ids or more positions than the model has.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"expected windows int64 [n, L] with n >= 1, L >= 2, got {windows.dtype} {list(windows.shape)}"
        )
    tokens = number_of_tokens(model)
    low, high = windows.min().item(), windows.max().item()
    if low < 0 or high >= tokens:
        raise ValueError(
            f"the windows have token ids from {low} to {high}, but {type(model).__name__} has {tokens} tokens; "
            "tokenizer and model do not belong together"
        )
    check_length(model, windows.shape[1])


def number_of_tokens(model: nn.Module) -> int:
    """The number of token embeddings of a model, packed or not."""
    embeddings = model.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    return embeddings.weight.shape[0] if known is None else known


def check_length(model: nn.Module, length: int) -> None:
    """Reject windows of more tokens than a model has positions, with a ValueError."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"windows of {length} tokens are longer than the {positions} positions of {type(model).__name__}"
        )


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the training mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def window_logits(model: nn.Module, window: Tensor) -> Tensor:
    """Logits `[L - 1, vocabulary]` of the predictions in one window `[L]`, in the model's dtype on its device."""
    device = model.get_input_embeddings().weight.device
    # Offloaded weights are on the meta device until accelerate's hook loads them; the hook also moves the input.
    ids = window[None].to("cpu" if device.type == "meta" else device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def _chunk_rows(vocabulary: int) -> int:
    return max(1, _CHUNK_BYTES // (_CHUNK_COPIES * 4 * vocabulary))


def _compare(original: Tensor, packed: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Per prediction, on the CPU: losses of original and packed model, KL in nats, same most likely token.

    Args:
        original, packed: logits `[P, vocabulary]` in any floating-point dtypes, on any devices.
        targets: token ids int64 `[P]`.
    """
    if original.shape != packed.shape:
        raise ValueError(
            f"the original has a vocabulary of {original.shape[-1]} tokens, the packed model one of "
            f"{packed.shape[-1]}; they cannot be compared"
        )
    rows = _chunk_rows(original.shape[-1])
    chunks = zip(original.split(rows), packed.split(rows), targets.split(rows))
    parts = [[column.cpu() for column in _compare_rows(*chunk)] for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*parts))


def _compare_rows(original: Tensor, packed: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    packed = packed.to(original.device)
    targets = targets.to(original.device)[:, None]
    same = original.argmax(-1) == packed.argmax(-1)
    log_p = original.float().log_softmax(-1)
    log_q = packed.float().log_softmax(-1)
    losses = -log_p.gather(1, targets)[:, 0], -log_q.gather(1, targets)[:, 0]
    # In place, because these tensors are large. Tokens of probability 0 contribute nothing, whatever their logarithms.
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0)
    return *losses, terms.sum(-1), same


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 `[P]` on the CPU."""
    rows = _chunk_rows(logits.shape[-1])
    parts = []
    for chunk, target in zip(logits.split(rows), targets.split(rows)):
        parts.append(nn.functional.cross_entropy(chunk.float(), target.to(chunk.device), reduction="none").cpu())
    return torch.cat(parts)


def _refuse_nan(losses: Tensor, which: str, window: int) -> None:
    if losses.isnan().any():
        raise ValueError(
            f"the logits of the {which} model are NaN in window {window}. In float16 its activations may overflow: "
            "evaluate in bfloat16 or float32"
        )


def _percentile(ordered: Tensor, percent: float) -> float:
    """Percentile of ascending values `[P]`, interpolated. `torch.quantile` is limited to 16 million values."""
    position = (len(ordered) - 1) * percent / 100
    below, above = math.floor(position), math.ceil(position)
    return torch.lerp(ordered[below], ordered[above], position - below).item()
