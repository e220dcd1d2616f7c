"""A mixture of experts with a trained router, packed with calibration."""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.modules import QuantExperts

TEXT = Path(__file__).parents[2] / "scripts" / "data" / "sample_text.txt"
LENGTH, BATCH, STEPS = 64, 16, 300


def windows_of(text, count, generator):
    start = torch.randint(0, len(text) - LENGTH, (count,), generator=generator)
    return torch.stack([text[first : first + LENGTH] for first in start.tolist()])


def loss_of(model, windows):
    logits = model(windows).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def test_a_trained_mixture_keeps_nine_tenths_of_what_it_has_learned():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    routing = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **routing, num_key_value_heads=2, vocab_size=256))
    generator = torch.Generator().manual_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    train, held_out = text[: -len(text) // 5], windows_of(text[-len(text) // 5 :], 64, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.no_grad():
        untrained = loss_of(model, held_out).item()
    for _ in range(STEPS):
        windows = windows_of(train, BATCH, generator)
        # Includes the load-balancing loss, which keeps all experts in use.
        model(windows, labels=windows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = loss_of(model, held_out).item()
    assert untrained - trained > 2  # otherwise there would be nothing to lose

    config = PcdvqConfig(bits=2.25, calibration=Calibration(samples=64, length=LENGTH, holdout=0, expert_tokens=64))
    quantize_model(model, None, config, list(windows_of(train, 64, generator)), progress=False)
    assert isinstance(model.model.layers[1].mlp.experts, QuantExperts)
    with torch.no_grad():
        packed = loss_of(model, held_out).item()
    print(untrained, trained, packed)
    assert packed - trained < 0.1 * (untrained - trained), (untrained, trained, packed)
