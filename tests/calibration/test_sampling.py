"""Calibration text that the model writes itself."""

import torch
from conftest import tiny_llama
from torch import nn

from hf_pcdvq.calibration.sampling import sample_answers, sample_from_model


class Constant(nn.Module):
    """An output head that predicts the same whatever came before."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_the_seed_decides_and_the_global_generator_is_not_touched():
    model = tiny_llama()
    state = torch.random.get_rng_state()
    first = sample_from_model(model, 3, 12, seed=0, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (3, 12) and first.dtype == torch.int64
    assert (first[:, 0] == 0).all()  # the beginning-of-text token
    assert torch.equal(first, sample_from_model(model, 3, 12, seed=0, progress=False))
    assert not torch.equal(first, sample_from_model(model, 3, 12, seed=1, progress=False))


def test_every_token_is_predicted_from_all_before_it():
    """The text is written with a cache, token by token; the predictions are those of one pass over the whole."""
    model = tiny_llama().float()
    predicted = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: predicted.append(output[:, -1:]))
    windows = sample_from_model(model, 3, 40, seed=0, progress=False)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(predicted, 1), model(windows).logits[:, 1:-1], rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_with_their_probabilities_and_ends_of_text_never():
    model = tiny_llama()
    model.generation_config.update(eos_token_id=[1, 7], do_sample=True, temperature=0.5, top_k=1)  # what chats use
    logits = torch.full((258,), -torch.inf)
    logits[[1, 3, 7, 200, 257]] = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()
    model.lm_head = Constant(logits.bfloat16())
    drawn = sample_from_model(model, 100, 102, seed=0, progress=False)[:, 2:]
    found = drawn.flatten().bincount(minlength=258) / drawn.numel()
    expected = torch.zeros(258)
    expected[[3, 200, 257]] = torch.tensor([0.3, 0.06, 0.04]) / 0.4
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_every_row_and_every_step_is_drawn_by_itself():
    """Shared random numbers would keep all frequencies, and leave less text than there seems to be."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    model.lm_head = Constant(torch.zeros(258, dtype=torch.bfloat16))  # every token is equally likely
    drawn = sample_from_model(model, 80, 82, seed=0, progress=False)[:, 2:]  # rows of more than one batch
    ranks = (drawn - 128.5) / 258 * 12**0.5  # mean 0, variance 1
    neighbours = {(0, 1): "next step", (1, 0): "next row", (1, 1): "both", (40, 0): "next batch"}
    for (row, step), name in neighbours.items():
        pairs = ranks[row:, step:] * ranks[: 80 - row, : 80 - step]
        assert abs(pairs.mean().item()) < 5 / pairs.numel() ** 0.5, name


def test_answers_follow_prompts_and_end_where_the_next_prompt_begins():
    model = tiny_llama()
    model.generation_config.update(eos_token_id=[1, 7])
    logits = torch.full((258,), -torch.inf)
    logits[[1, 3, 7, 200]] = torch.tensor([0.05, 0.5, 0.05, 0.4]).log()
    model.lm_head = Constant(logits.bfloat16())
    prompts = [[10, 11, 12], [20, 21]]
    windows = sample_answers(model, prompts, 66, 60, seed=0, progress=False)  # more than one batch
    assert windows.shape == (66, 60) and windows.dtype == torch.int64
    assert torch.equal(windows, sample_answers(model, prompts, 66, 60, seed=0, progress=False))
    seen, ended = set(), 0
    for row in windows.tolist():
        while row:
            prompt = next(ids for ids in prompts if row[: len(ids)] == ids[: len(row)])
            seen.add(tuple(prompt))
            row = row[len(prompt) :]
            end = next((place for place, token in enumerate(row) if token in (1, 7)), len(row))
            assert set(row[:end]) <= {3, 200}
            ended += end < len(row)
            row = row[end + 1 :]
    assert len(seen) == 2 and 0.5 < ended / (windows == 3).sum() / 0.2 < 2
