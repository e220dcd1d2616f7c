"""Every op, declared once: schema, fake implementation, implementation, gradient.

An implementation validates its arguments, then runs Triton kernels, the library of the CPU backend or the PyTorch reference, as
`backend` decides; `prepare` exists for the first two only. The ops of a family of formats are derived from its description in
`formats/`. `functional.py` has the public functions and their documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from .backend import use_cpu, use_triton
from .formats import FAMILIES, PackedWeight
from .reference import products
from .reference.hadamard import hadamard as reference_hadamard

# The package's own name, so that copies which Hugging Face's `kernels` loads under other names can coexist.
NAMESPACE = __package__.replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)


# ------------------------------------------------------------------------------------------------ hadamard


torch.library.define(f"{NAMESPACE}::hadamard", "(Tensor x, Tensor signs, bool inverse=False) -> Tensor")


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "packed layers cannot be exported to ONNX, which has no operator for them: load the model with dequantize=True "
            "in its quantization_config, and export that"
        )


@torch.library.register_fake(f"{NAMESPACE}::hadamard")
def _(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    checks.check_hadamard(x, signs)
    return x.new_empty(x.shape)


@torch.library.impl(f"{NAMESPACE}::hadamard", "default")
def _(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    checks.check_hadamard(x, signs)
    return _rotate(x, signs, inverse)


def _rotate(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    # The library of the CPU backend rotates in its products only: encoders rotate with this op, and codes must stay the same.
    if use_triton(x.device, x.dtype):
        from .triton import launch

        return launch.hadamard(x, signs, inverse)
    return reference_hadamard(x, signs, inverse)


def _hadamard_setup(ctx, inputs, output):
    _, signs, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx, grad):
    return OPS.hadamard(grad, ctx.saved_tensors[0], not ctx.inverse), None, None


torch.library.register_autograd(f"{NAMESPACE}::hadamard", _hadamard_backward, setup_context=_hadamard_setup)


# ------------------------------------------------------------------------------------------------- prepare


torch.library.define(f"{NAMESPACE}::prepare", "(Tensor x, Tensor? signs, str format) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::prepare")
def _(x: Tensor, signs: Tensor | None, format: str) -> Tensor:
    checks.check_prepare(x, signs)
    size = x.numel() // x.shape[-1], x.shape[-1]
    if use_cpu(x.device, x.dtype):
        from .cpu import launch

        return x.new_empty(launch.prepared_words(*size), dtype=torch.int32)
    from .triton import product

    return x.new_empty(product.prepared_words(format, *size), dtype=torch.int32)


@torch.library.impl(f"{NAMESPACE}::prepare", "default")
def _(x: Tensor, signs: Tensor | None, format: str) -> Tensor:
    checks.check_prepare(x, signs)
    if use_cpu(x.device, x.dtype):
        from .cpu import launch

        return launch.prepare(x, signs, format)
    from .triton import product

    return product.prepare(x, signs, format)


# ---------------------------------------------------------------------------------- the ops of every family of formats


def _schema(family: type[PackedWeight]) -> str:
    """The part of the schema that all ops of a family share."""
    return ", ".join(f"{argument.type} {argument.name}" for argument in family.arguments)


def _runs_as_triton(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> bool:
    return weight.has_kernels and use_triton(device, dtype)


def _runs_on_cpu(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> bool:
    return weight.on_cpu and use_cpu(device, dtype)


def _multiply_in_pytorch(x: Tensor, weight: PackedWeight, transposed: bool, signs: Tensor | None) -> Tensor:
    """The product in PyTorch, with a rotation that may run as a kernel, which does not depend on the format."""
    if signs is not None and not transposed:
        x = _rotate(x, signs, False)
    out = weight.reference_matmul(x, transposed)
    return _rotate(out, signs, True) if signs is not None and transposed else out


def _define_dequantize(family: type[PackedWeight]) -> None:
    name = f"{family.family}_dequantize"
    torch.library.define(f"{NAMESPACE}::{name}", f"({_schema(family)}, ScalarType dtype) -> Tensor")

    def checked(arguments: tuple[Any, ...]) -> tuple[PackedWeight, torch.dtype]:
        *packed, dtype = arguments
        checks.check_float(name, "dtype", dtype)
        return family.checked(name, *packed), dtype

    def fake(*arguments):
        weight, dtype = checked(arguments)
        return weight.weight.new_empty(weight.rows, weight.columns, dtype=dtype)

    def implementation(*arguments):
        weight, dtype = checked(arguments)
        if _runs_as_triton(weight, weight.weight.device, dtype):
            from .triton import launch

            return launch.dequantize(weight, dtype)
        if _runs_on_cpu(weight, weight.weight.device, dtype):
            from .cpu import launch as cpu

            return cpu.dequantize(weight, dtype)
        return products.dequantize(weight, dtype)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    torch.library.impl(f"{NAMESPACE}::{name}", "default", implementation)


def _define_matmul(family: type[PackedWeight]) -> None:
    name = f"{family.family}_matmul"
    schema = f"Tensor x, {_schema(family)}, bool transposed=False, Tensor? signs=None, Tensor? prepared=None"
    torch.library.define(f"{NAMESPACE}::{name}", f"({schema}) -> Tensor")
    count = len(family.arguments)  # excluding x and the last three, which are optional

    def check(x, packed, last):
        # PyTorch passes the last three by position, by name or, if they have their default values, not at all.
        packed, positional = packed[:count], packed[count:]
        given = {**last, **dict(zip(("transposed", "signs", "prepared"), positional))}
        transposed, signs, prepared = given.get("transposed", False), given.get("signs"), given.get("prepared")
        weight = family.checked(name, *packed)
        checks.check_input(name, x, weight.weight, weight.rows, weight.columns, transposed)
        if signs is not None:
            checks.check_signs(name, signs, weight.columns, x.device)
        return weight, transposed, signs, prepared

    def fake(x, *packed, **last):
        _refuse_onnx()
        weight, transposed, *_ = check(x, packed, last)
        return x.new_empty(*x.shape[:-1], weight.columns if transposed else weight.rows)

    def implementation(x, *packed, **last):
        weight, transposed, signs, prepared = check(x, packed, last)
        if _runs_as_triton(weight, x.device, x.dtype):
            from .triton import launch

            return launch.matmul(x, weight, transposed, signs, prepared)
        if _runs_on_cpu(weight, x.device, x.dtype):
            from .cpu import launch as cpu

            return cpu.matmul(x, weight, transposed, signs, prepared)
        return _multiply_in_pytorch(x, weight, transposed, signs)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    torch.library.impl(f"{NAMESPACE}::{name}", "default", implementation)
    _register_matmul_autograd(name)


def _register_matmul_autograd(name: str) -> None:
    """The gradient of `x @ W.T` with respect to `x` is `grad @ W`, the same op transposed; codes have no gradient."""
    op = getattr(OPS, name)

    def setup_context(ctx, inputs, output):
        _, *packed, ctx.transposed, signs, _ = inputs
        packed = [*packed, signs]
        ctx.plain = [None if isinstance(item, Tensor) else item for item in packed]
        ctx.is_tensor = [isinstance(item, Tensor) for item in packed]
        ctx.save_for_backward(*(item for item in packed if isinstance(item, Tensor)))

    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        *packed, signs = [next(saved) if tensor else item for tensor, item in zip(ctx.is_tensor, ctx.plain)]
        return op(grad, *packed, not ctx.transposed, signs), *(None for _ in packed), None, None, None

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)


def _define_grouped_matmul(family: type[PackedWeight]) -> None:
    name = f"{family.family}_grouped_matmul"
    schema = f"Tensor x, Tensor experts, {_schema(family)}, Tensor? signs=None"
    torch.library.define(f"{NAMESPACE}::{name}", f"({schema}) -> Tensor")
    count = len(family.arguments)
    is_stacked = [argument.stacked for argument in family.arguments]

    def one(packed, expert: int) -> PackedWeight:
        """The weight of one expert."""
        own = [item[expert] if stacked and item is not None else item for stacked, item in zip(is_stacked, packed)]
        return family.checked(name, *own)

    def check(x, experts, packed, signs):
        packed, last = packed[:count], packed[count:]
        signs = last[0] if last else signs
        checks.check_stack(name, [item for stacked, item in zip(is_stacked, packed) if stacked])
        first = one(packed, 0)
        checks.check_groups(name, x, experts, first.columns)
        checks.check_input(name, x, first.weight, first.rows, first.columns, False)
        if signs is not None:
            checks.check_signs(name, signs, first.columns, x.device)
        return first, packed, signs

    def fake(x, experts, *packed, signs=None):
        _refuse_onnx()
        first, _, _ = check(x, experts, packed, signs)
        return x.new_empty(*x.shape[:-1], first.rows)

    def implementation(x, experts, *packed, signs=None):
        first, packed, signs = check(x, experts, packed, signs)
        multiply: Callable[..., Tensor] = _multiply_in_pytorch
        if _runs_as_triton(first, x.device, x.dtype):
            from .triton import launch

            out = launch.grouped_matmul(x, experts, first, len(packed[0]), signs)
            if out is not None:
                return out
            multiply = launch.matmul
        checks.check_experts(name, experts, len(packed[0]))
        if _runs_on_cpu(first, x.device, x.dtype):
            from .cpu import launch as cpu

            stack = {argument.name: item for argument, item in zip(family.arguments, packed) if argument.stacked}
            out = cpu.grouped_matmul(x, experts, first, stack, signs)
            if out is not None:
                return out
            multiply = cpu.matmul
        out = x.new_zeros(*x.shape[:-1], first.rows)
        for group, expert in enumerate(experts.tolist()):
            if expert >= 0:
                out[group] = multiply(x[group], one(packed, expert), False, signs)
        return out

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    torch.library.impl(f"{NAMESPACE}::{name}", "default", implementation)


for _family in FAMILIES.values():
    _define_dequantize(_family)
    _define_matmul(_family)
    _define_grouped_matmul(_family)
