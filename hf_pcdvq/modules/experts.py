"""`QuantExperts`: replaces the fused experts of a mixture-of-experts layer.

In Transformers 5 the experts of a layer are two stacks of weights: `gate_up_proj` `[E, 2 I, H]`, the gate's rows
before those of the up projection, and `down_proj` `[E, H, I]`. Packed, they are stacks of packed weights, so an
expert is a slice of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hf_pcdvq_kernels.backend import use_cpu, use_triton
from hf_pcdvq_kernels.routing import tiles_of_tokens
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from .packed import PackedModule, copy_rest
from .packed_words import DenseName

STACKS = ("gate_up_proj", "down_proj")
_PAIRS_ON_CPU = 16  # up to this many, one call for all of them is faster on a CPU than one for each expert
# Attributes set by Transformers' decorator `use_experts_implementation`: the value that packing requires, and the
# problem with any other.
_NEEDED = {
    "is_transposed": (False, "its weights are transposed"),
    "has_bias": (False, "it has biases"),
    "has_gate": (True, "it has no gate"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
}


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as three-dimensional parameters."""
    return any(tensor.ndim == 3 for tensor in module.parameters(recurse=False)) and hasattr(module, "down_proj")


def experts_obstacle(module: nn.Module) -> str | None:
    """Why fused experts cannot be packed, whatever the codec; None if they can."""
    kind = type(module).__name__
    for name, (needed, problem) in _NEEDED.items():
        found = getattr(module, name, None)
        if found is not None and found != needed:
            return f"{kind}: {problem}"
    stacks = [getattr(module, name, None) for name in STACKS]
    if any(not isinstance(stack, nn.Parameter) or stack.ndim != 3 for stack in stacks):
        return f"{kind}: not one gate_up_proj and one down_proj of three dimensions"
    if not hasattr(module, "_apply_gate"):
        return f"{kind}: its forward pass is its own, not that of Transformers' experts interface"
    gate_up, down = stacks
    experts, rows, hidden = gate_up.shape
    if tuple(down.shape) != (experts, hidden, rows // 2) or rows % 2:
        return f"{kind}: {list(gate_up.shape)} and {list(down.shape)} are not [E, 2 I, H] and [E, H, I]"
    return None


class QuantExperts(PackedModule):
    """Fused experts with packed weights.

    Takes over the dense module's other attributes and child modules: sizes, activation, whatever its gate reads.
    Transformers' option `experts_implementation` has no effect on it.

    Args:
        experts: the dense module, possibly on the meta device; not changed.
        codec: the packed format.
        device: device to allocate on.

    Raises:
        ValueError: these experts cannot be packed at all, or not with this codec.
    """

    gate_up_proj = DenseName()
    down_proj = DenseName()

    def __init__(self, experts: nn.Module, codec: Codec, device: torch.device | str | None = None):
        obstacle = experts_obstacle(experts)
        if obstacle:
            raise ValueError(f"experts cannot be packed: {obstacle}")
        PackedModule.__init__(self, codec, experts.down_proj.dtype)
        self._dense_type = type(experts)
        self._copied = [name for name in vars(experts) if name not in vars(self)]
        copy_rest(self._copied, experts, self)
        for name in STACKS:
            self.register_packed(name, tuple(getattr(experts, name).shape), device)

    @classmethod
    def empty_like(cls, experts: nn.Module, codec: Codec) -> QuantExperts:
        """The replacement for dense experts when loading, on the meta device."""
        return cls(experts, codec, "meta")

    @classmethod
    def from_packed(cls, experts: nn.Module, codec: Codec, packed: dict[str, Packed]) -> QuantExperts:
        """The replacement for dense experts, on their device, from stacks that are already packed."""
        module = cls(experts, codec, experts.down_proj.device)
        for name in STACKS:
            module.set_packed(name, packed[name])
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: `[T, H]` of any floating-point dtype.
            top_k_index: experts of every token, integer `[T, k]`. Out-of-range indices are skipped: expert
                parallelism uses them to mark the experts of other devices.
            top_k_weights: weights of these experts, `[T, k]`.

        Returns:
            `[T, H]` in the dtype of `hidden_states`. Summed in float32, or in float64 if that is the dtype.
        """
        if self._has_grouped_kernels(hidden_states, top_k_index.numel()):
            return self._forward_in_tiles(hidden_states, top_k_index, top_k_weights)
        return sum_over_experts(hidden_states, top_k_index, top_k_weights, self._number, self.run_expert)

    @property
    def _number(self) -> int:
        # Of those that this process holds: with expert parallelism, some of them.
        return len(self.packed_tensors("down_proj")[""])

    def _has_grouped_kernels(self, hidden_states: Tensor, pairs: int) -> bool:
        """Whether grouped kernels can be used, which are not differentiable, and pay for so many (token, expert) pairs."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return False
        device, dtype = hidden_states.device, hidden_states.dtype
        if self.codec.family.on_cpu and use_cpu(device, dtype):
            return 0 < pairs <= _PAIRS_ON_CPU
        return dtype in (torch.float16, torch.bfloat16) and use_triton(device, dtype)

    def _forward_in_tiles(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward` with one kernel launch for all experts, without data-dependent shapes or synchronization."""
        tokens, k = top_k_index.shape
        experts, place, size = tiles_of_tokens(top_k_index.flatten(), self._number)
        x = hidden_states.new_zeros(len(experts) * size, hidden_states.shape[1])
        x[place] = hidden_states.repeat_interleave(k, 0)
        x = x.view(len(experts), size, -1)
        out = self._multiply_groups(
            "down_proj", experts, self.gate(self._multiply_groups("gate_up_proj", experts, x))
        )
        chosen = out.flatten(0, 1)[place].view(tokens, k, -1)
        return (chosen.float() * top_k_weights[..., None].float()).sum(1).to(hidden_states.dtype)

    def _multiply_groups(self, stack: str, experts: Tensor, x: Tensor) -> Tensor:
        packed, tables = self.packed_tensors(stack), self.tables_of(stack)
        out = self.codec.grouped_matmul(x, experts, packed, tables)
        if out is not None:
            return out
        # One product per expert in turn: slower, but also without synchronization.
        out = x.new_zeros(*x.shape[:-1], packed["scale"].shape[1])
        for expert in range(self._number):
            mine = (experts == expert)[:, None, None]
            out = torch.where(mine, self._multiply(stack, expert, x), out)
        return out

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """The output `[t, H]` of one expert for tokens `[t, H]`."""
        return self._multiply("down_proj", expert, self.gate(self._multiply("gate_up_proj", expert, hidden_states)))

    def gate(self, gate_up: Tensor) -> Tensor:
        """The dense module's gate, usually `act(gate) * up`: `[t, 2 I]` to `[t, I]`."""
        return self._dense_type._apply_gate(self, gate_up)

    def _multiply(self, stack: str, expert: int, x: Tensor) -> Tensor:
        packed = {suffix: tensor[expert] for suffix, tensor in self.packed_tensors(stack).items()}
        return self.codec.matmul(x, packed, self.tables_of(stack))

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The dense module with decoded weights in `dtype`, on the same device."""
        dense: nn.Module = object.__new__(self._dense_type)
        nn.Module.__init__(dense)
        copy_rest(self._copied, self, dense)
        for name in STACKS:
            dense.register_parameter(name, nn.Parameter(self.decoded(name, dtype)))
        return dense

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(entry.shape)}" for name, entry in self.packed_parameters.items())
        return f"{shapes}, codec={self.codec}"


def sum_over_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    number: int,
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the outputs of each token's experts, one expert after the other.

    Args:
        hidden_states, top_k_index, top_k_weights: see `QuantExperts.forward`.
        number: number of experts.
        run: the output `[t, H]` of an expert for tokens `[t, H]`.
    """
    summed = torch.promote_types(hidden_states.dtype, torch.float32)
    out = torch.zeros_like(hidden_states, dtype=summed)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < number:
            continue
        token, place = torch.where(top_k_index == expert)
        result = run(expert, hidden_states[token])
        out = out.index_add(0, token, result * top_k_weights[token, place, None].to(summed))
    return out.to(hidden_states.dtype)
