"""Sensitivities against gradients computed channel by channel, and Hessians weighted by them against their definition."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq.calibration.feedback import quantize_with_feedback
from hf_pcdvq.calibration.guidance import output_sensitivity
from hf_pcdvq.calibration.hessian import GroupedHessian, Hessian, InputMoments, group_sizes, prepare_guided
from hf_pcdvq.modules import packed_modules

CPU = torch.device("cpu")
BLOCKS = "model.layers"
NAMES = [f"{BLOCKS}.{number}.{part}" for number in (0, 1) for part in ("self_attn.k_proj", "mlp.down_proj")]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=80, initializer_range=0.2, **sizes)).eval()


def windows(count=3, length=12):
    return torch.randint(80, (count, length), generator=torch.Generator().manual_seed(1))


def found(model, groups, seed=0):
    return output_sensitivity(model, BLOCKS, NAMES, windows(), groups, seed, device=CPU, progress=False)


def expected_squares(model, labels):
    """Squared gradients of every output channel, float32 `[windows, L, channels]` by layer, without any checkpointing."""
    squares = {name: [] for name in NAMES}
    for window, label in zip(windows(), labels):
        outputs = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, into=outputs: into.__setitem__(name, output)
            )
            for name in NAMES
        ]
        loss = torch.nn.functional.cross_entropy(model(window[None]).logits[0], label, reduction="sum")
        gradients = torch.autograd.grad(loss, [outputs[name] for name in NAMES])
        for name, gradient in zip(NAMES, gradients):
            squares[name].append(gradient[0].square())
        for handle in handles:
            handle.remove()
    return {name: torch.stack(parts) for name, parts in squares.items()}


@pytest.mark.parametrize("groups", [1, 3])
def test_sensitivities_are_mean_squares_of_the_gradients_in_every_group(groups, monkeypatch):
    model = llama()
    labels = torch.randint(80, (3, 12), generator=torch.Generator().manual_seed(2))
    queue = iter(labels)
    monkeypatch.setattr(torch, "searchsorted", lambda cumulative, drawn: next(queue)[:, None])
    squares = found(model, groups)
    for name, channels in expected_squares(model, labels).items():
        sizes = group_sizes(channels.shape[-1], groups)
        assert len(sizes) == groups and sum(sizes) == channels.shape[-1]
        means = torch.stack([part.mean(-1) for part in channels.split(sizes, -1)], -1)
        torch.testing.assert_close(squares[name], means / means.mean(), rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_from_the_predictions(monkeypatch):
    drawn = []
    search = torch.searchsorted

    def recorded(cumulative, uniform):
        drawn.append((cumulative, search(cumulative, uniform)))
        return drawn[-1][1]

    monkeypatch.setattr(torch, "searchsorted", recorded)
    model = llama()
    for seed in range(200):
        found(model, 1, seed)
    token = torch.stack([labels[-1, 0] for cumulative, labels in drawn[::3]])
    cumulative = drawn[0][0][-1]
    shares = torch.bincount(token, minlength=80).float().cumsum(0) / len(token)
    assert (shares - cumulative).abs().max() < 1.63 / len(token) ** 0.5  # Kolmogorov-Smirnov, one percent


def test_it_leaves_the_model_as_it_was():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    found(model, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_guided_hessians_are_means_of_weighted_squares():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 100, 24, generator=generator)
    squares = {name: torch.rand(2, 100, groups, generator=generator) for name, groups in (("q", 3), ("k", 2))}
    moments = InputMoments(24, CPU)
    for index in range(2):
        moments.add(inputs[index : index + 1], None, {name: part[index] for name, part in squares.items()})
    guided = prepare_guided(moments, {"q": 7, "k": 4}, 1e-8, None)
    assert guided.sizes == [3, 2, 2, 2, 2]
    x = inputs.flatten(0, 1).double()
    weights = [*squares["q"].flatten(0, 1).T, *squares["k"].flatten(0, 1).T]
    for matrix, weight in zip(guided.matrix, weights):
        torch.testing.assert_close(matrix.double(), (x.T * weight) @ x / 200, rtol=1e-4, atol=1e-5)


def groups_and_weight(rows=(40, 56), columns=64):
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for _ in rows:
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
        inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
        matrices.append(inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns))
    weight = torch.randn(sum(rows), columns, generator=generator)
    return GroupedHessian(torch.stack(matrices), list(rows)), weight


def test_rows_that_do_not_share_codes_are_quantized_with_the_hessian_of_their_group():
    grouped, weight = groups_and_weight()
    codec, settings = PcdvqConfig().codec, Calibration(desc_act=False, sweeps=2)
    _, together = next(quantize_with_feedback([(weight, [codec.unit_encoder(weight)])], grouped, settings))
    for part, matrix, expected in zip(weight.split(grouped.sizes), grouped.matrix, together.split(grouped.sizes)):
        alone = Hessian(matrix, tokens=1, dead=0, damp_percent=0.0, note=None)
        _, quantized = next(quantize_with_feedback([(part, [codec.unit_encoder(part)])], alone, settings))
        # Products of other shapes may round differently and flip a tied code.
        assert (quantized - expected).norm() <= 0.02 * expected.norm()


def losses(grouped, error):
    return torch.stack([((e @ h) * e).sum() for e, h in zip(error.split(grouped.sizes), grouped.matrix)])


def test_rings_favor_the_rows_that_matter_more():
    grouped, weight = groups_and_weight()
    grouped = GroupedHessian(grouped.matrix * torch.tensor([16.0, 1.0])[:, None, None], grouped.sizes)
    codec, settings = CcqConfig(layout="stream").codec, Calibration(sweeps=0)
    errors = []
    for weighed in (False, True):
        encoder = codec.unit_encoder(weight)
        if weighed:
            encoder.weigh(grouped.importance)
        _, quantized = next(quantize_with_feedback([(weight, [encoder])], grouped, settings))
        errors.append(losses(grouped, weight - quantized))
    assert errors[1][0] < 0.9 * errors[0][0]
    assert errors[1].sum() < 0.95 * errors[0].sum()


def weighted_error(model, text, seed):
    """The error in what q, k and v of the first block, whose inputs nothing has changed, make of a text, weighed by sensitivity."""
    original, total = llama(), 0.0
    names = [f"{BLOCKS}.0.self_attn.{part}_proj" for part in "qkv"]
    squares = output_sensitivity(original, BLOCKS, names, text, 4, seed, device=CPU, progress=False)
    inputs = []
    original.get_submodule(names[0]).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        original(text)
        for name in names:
            dense, packed = original.get_submodule(name), model.get_submodule(name)
            error = inputs[0] @ (dense.weight - packed.dequantize(torch.float32).weight).T
            groups = error.square().split(group_sizes(error.shape[-1], 4), -1)
            total += (torch.stack([part.sum(-1) for part in groups], -1) * squares[name]).sum().item()
    return total


@pytest.mark.parametrize("config", [PcdvqConfig, lambda **options: CcqConfig(layout="stream", **options)])
def test_guided_models_lose_less_where_the_predictions_depend_on_it(config):
    """Not in KL: of random models, that is a toss (twelve draws: 0.98 to 1.06 of that without)."""
    text = torch.randint(80, (20, 32), generator=torch.Generator().manual_seed(3))
    reports, weights, lost = [], [], []
    for groups in (0, 4):
        model = llama()
        calibration = Calibration(samples=20, length=32, holdout=0, fisher_groups=groups, correction=0.0)
        quantize_model(model, None, config(calibration=calibration, hadamard_block=32), text, progress=False)
        reports.append(model.hf_quantizer.report)
        weights.append({name: module.packed_tensors("weight")[""] for name, module in packed_modules(model).items()})
        lost.append(weighted_error(model, text, calibration.seed))
    assert lost[1] < 0.95 * lost[0]
    assert len(weights[0]) == len(reports[1].layers) == 14
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any("not weighed" in (layer.note or "") for layer in reports[1].layers)
