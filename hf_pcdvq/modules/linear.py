"""`QuantLinear`: the layer that replaces `nn.Linear`. Holds the packed tensors; the codec does the arithmetic."""

from __future__ import annotations

from functools import partial

import hf_pcdvq_kernels as ops
import torch
from hf_pcdvq_kernels.backend import constant_when_compiled
from hf_pcdvq_kernels.direct import DirectProduct, can_skip_dispatcher, direct_product
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from .packed import PackedModule
from .packed_words import DenseName
from .shared_input import SharedInput, prepared_when_traced


class QuantLinear(PackedModule, nn.Linear):
    """A linear layer with a packed weight. Subclasses `nn.Linear` so that PEFT and tied code paths recognize it.

    Its parameters are the tensors of the packed `weight`, and `bias` if the layer has one.

    Attributes:
        shared_input: state shared with layers that receive the same input, see `share_inputs`.

    Args:
        in_features, out_features: size of the layer; `in_features` must be a multiple of `codec.multiple`.
        bias: whether the layer has a bias, kept in the model's dtype.
        codec: the packed format.
        dtype: dtype of the dense layer, and of the bias; None takes torch's default.
        device: device to allocate on.

    Raises:
        ValueError: `in_features` is not a multiple of `codec.multiple`.
    """

    weight = DenseName()
    # Transformers asks: with tensor parallelism, packed products take local tensors, also where gradients are computed.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        codec: Codec,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        PackedModule.__init__(self, codec, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.shared_input = None
        self._direct: DirectProduct | None = None  # made by the first call that can use it
        self.register_packed("weight", (out_features, in_features), device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def empty_like(cls, linear: nn.Linear, codec: Codec) -> QuantLinear:
        """The replacement for a dense layer when loading, on the meta device."""
        return cls(
            linear.in_features, linear.out_features, linear.bias is not None, codec, linear.weight.dtype, "meta"
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, codec: Codec) -> QuantLinear:
        """Quantize a dense layer by rounding to the nearest codes, on its device. `linear` is not modified."""
        return cls.from_packed(linear, codec, {"weight": codec.encode(linear.weight)})

    @classmethod
    def from_packed(cls, linear: nn.Linear, codec: Codec, packed: dict[str, Packed]) -> QuantLinear:
        """The replacement for a dense layer, on its device, from a `weight` that is already packed."""
        bias, device = linear.bias, linear.weight.device
        layer = cls(linear.in_features, linear.out_features, bias is not None, codec, linear.weight.dtype, device)
        layer.set_packed("weight", packed["weight"])
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    @property
    def packed(self) -> Packed:
        """The packed tensors, by suffix."""
        return self.packed_tensors("weight")

    @property
    def tables(self) -> Packed:
        """The constants needed for decoding."""
        return self.tables_of("weight")

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias` for `x` `[..., in_features]`, in the dtype of `x`."""
        out = None
        if not torch.compiler.is_dynamo_compiling() and can_skip_dispatcher(x, self.codec.family):
            out = self._multiply_directly(x)
        if out is None:
            family, arguments = self.op_arguments("weight")
            signs = self._buffers.get("signs")
            out = ops.matmul(family, x, arguments, signs=signs, prepared=self._prepared(x, signs))
        return out if self.bias is None else out + self.bias

    @property
    def shared_input(self) -> SharedInput | None:
        return self._shared_input

    @shared_input.setter
    def shared_input(self, shared: SharedInput | None) -> None:
        self._shared_input, self._shares = shared, shared is not None

    def _prepared(self, x: Tensor, signs: Tensor | None) -> Tensor | None:
        if torch.compiler.is_dynamo_compiling():
            if not self._shares:
                return None
            format, rotation = self._shared_as()
            return prepared_when_traced(x, signs, format, rotation)
        if self._shared_input is None:
            return None
        return self._shared_input.prepared(x, partial(ops.prepare, signs=signs, format=self.codec.format))

    @constant_when_compiled
    def _shared_as(self) -> tuple[str, str]:
        return self.codec.format, f"{self.codec.max_block}, {self.codec.seed}"

    def _multiply_directly(self, x: Tensor) -> Tensor | None:
        """The product without PyTorch's dispatcher; None if it has to run as an op."""
        parameters, buffers, entry = self._parameters, self._buffers, self.packed_parameters["weight"]
        tensors = [parameters[name] for name in entry.tensors.values()]
        tensors += [buffers[name] for name in entry.tables.values()]
        product, signs = self._direct, buffers.get("signs")
        if product is None or not product.holds(tensors):
            # Those that are divided among processes have no memory of their own.
            if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device != x.device for tensor in tensors):
                return None
            product = self._direct = direct_product(*self.op_arguments("weight"), signs, tensors)
        if not product.takes(x):
            return None
        shared, prepared = self._shared_input, None
        if shared is not None and product.shares(x):
            prepared = shared.prepared(x, partial(product.prepare, signs=signs))
        return product(x, signs, prepared)

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary `nn.Linear` with the decoded weight in `dtype`, on the same device."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.decoded("weight", dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, codec={self.codec}"


def share_inputs(model: nn.Module) -> None:
    """Make packed layers that a module calls with the same tensor prepare it only once. Idempotent.

    `layer.shared_input = None` disables this for a layer: for modules that write into a tensor between two uses of
    it, and for `torch.export` with a dynamic number of tokens.
    """
    for parent in model.modules():
        if type(parent).forward is nn.Module.forward:  # a container: other modules call its members
            continue
        groups: dict[tuple[Codec, int], list[QuantLinear]] = {}
        for child in parent.children():
            if isinstance(child, QuantLinear) and child.shared_input is None and child.codec.has_kernels:
                groups.setdefault((child.codec, child.in_features), []).append(child)
        for layers in groups.values():
            if len(layers) > 1:
                shared = SharedInput(parent)
                for layer in layers:
                    layer.shared_input = shared
