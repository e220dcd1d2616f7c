"""`QuantExperts`: what replaces the fused experts of a mixture-of-experts layer.

In Transformers 5 the experts of a layer are two stacks of weights: `gate_up_proj` `[E, 2 I, H]`, the gate's rows before
those of the up projection, and `down_proj` `[E, H, I]`. Packed, each is a stack of packed weights, so that an expert is
a slice of every tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from .packed import PackedModule

STACKS = ("gate_up_proj", "down_proj")
# What the decorator `use_experts_implementation` of Transformers says about experts, as far as packing needs it so.
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

    Takes over everything else that the dense module holds: sizes, activation, what its gate reads. Which of
    Transformers' `experts_implementation`s is chosen makes no difference to it.

    Args:
        experts: the dense module, possibly on the meta device; it is left as it is.
        codec: the packed format.
        device: where to allocate.

    Raises:
        ValueError: these experts cannot be packed, or not with this codec.
    """

    def __init__(self, experts: nn.Module, codec: Codec, device: torch.device | str | None = None):
        PackedModule.__init__(self, codec)
        obstacle = experts_obstacle(experts)
        if obstacle:
            raise ValueError(f"experts cannot be packed: {obstacle}")
        self._dense_type = type(experts)
        _take_over(experts, self)
        for name in STACKS:
            self.register_packed(name, tuple(getattr(experts, name).shape), device)

    @classmethod
    def empty_like(cls, experts: nn.Module, codec: Codec) -> QuantExperts:
        """What will take the place of dense experts, on the meta device."""
        return cls(experts, codec, "meta")

    @classmethod
    def from_packed(cls, experts: nn.Module, codec: Codec, packed: dict[str, Packed]) -> QuantExperts:
        """What takes the place of dense experts whose stacks were packed elsewhere, on their device."""
        module = cls(experts, codec, experts.down_proj.device)
        for name in STACKS:
            module.set_packed(name, packed[name])
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of each token's experts, weighted.

        Args:
            hidden_states: `[T, H]` of any floating dtype.
            top_k_index: experts of every token, integer `[T, k]`. What is not an expert's number is skipped, as
                expert parallelism marks the experts of other devices.
            top_k_weights: weights of these experts, `[T, k]`.

        Returns:
            `[T, H]` in the dtype of `hidden_states`. Summed in float32.
        """
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        number = self.packed_parameters["down_proj"].shape[0]
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < number:
                continue
            token, place = torch.where(top_k_index == expert)
            result = self.run_expert(expert, hidden_states[token])
            out = out.index_add(0, token, result * top_k_weights[token, place, None].float())
        return out.to(hidden_states.dtype)

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """What one expert makes of tokens `[t, H]`."""
        return self._multiply("down_proj", expert, self.gate(self._multiply("gate_up_proj", expert, hidden_states)))

    def gate(self, gate_up: Tensor) -> Tensor:
        """The dense module's gate, usually `act(gate) * up`, of `[t, 2 I]`."""
        return self._dense_type._apply_gate(self, gate_up)

    def _multiply(self, stack: str, expert: int, x: Tensor) -> Tensor:
        packed = {suffix: tensor[expert] for suffix, tensor in self.packed_tensors(stack).items()}
        return self.codec.matmul(x, packed, self.tables_of(stack))

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The dense module with decoded weights in `dtype`, on the same device."""
        dense: nn.Module = object.__new__(self._dense_type)
        nn.Module.__init__(dense)
        _take_over(self, dense)
        for name in STACKS:
            dense.register_parameter(name, nn.Parameter(self.decoded(name, dtype)))
        return dense

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(entry.shape)}" for name, entry in self.packed_parameters.items())
        return f"{shapes}, codec={self.codec}"


def _take_over(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the attributes and child modules of `source` that it has none of, but no parameters and no codec."""
    own = {*vars(PackedModule(None)), "_dense_type"}
    for name, value in vars(source).items():
        if name not in own:
            setattr(target, name, value)
    for name, child in source.named_children():
        target.add_module(name, child)
    target.train(source.training)
