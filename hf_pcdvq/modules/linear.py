"""`QuantLinear`: the layer that replaces `nn.Linear`. Holds the packed tensors and calls the codec; no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codecs.base import Codec, Packed


def parameter_name(suffix: str, parameter: str = "weight") -> str:
    """Name under which a packed tensor is stored: `weight` itself, or `weight_<suffix>`."""
    return f"{parameter}_{suffix}" if suffix else parameter


class QuantLinear(nn.Linear):
    """A linear layer with a packed weight. Subclasses `nn.Linear` so that PEFT and tied code paths know it.

    Parameters are `weight` (packed words, integer), `weight_<suffix>` as the codec's `specs` say, and `bias` if there
    is one. The tables that decoding reads (codebook, rotation signs) are buffers that are not saved: they follow from
    the config, and `reset_tables` fills them in after loading.

    Args:
        in_features, out_features: size of the layer; `in_features` a multiple of `codec.multiple`.
        bias: whether the layer has a bias, kept in the model's dtype.
        codec: the packed format.
        dtype: dtype of the bias; None takes torch's default.
        device: where to allocate.

    Raises:
        ValueError: `in_features` is not a multiple of `codec.multiple`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        codec: Codec,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear would allocate the dense weight
        if in_features % codec.multiple:
            raise ValueError(f"in_features must be a multiple of {codec.multiple} for {codec}, got {in_features}")
        self.in_features, self.out_features, self.codec = in_features, out_features, codec
        specs = codec.specs(out_features, in_features)
        self.suffixes = tuple(specs)
        for suffix, (shape, dtype_) in specs.items():
            packed = nn.Parameter(torch.empty(shape, dtype=dtype_, device=device), requires_grad=False)
            self.register_parameter(parameter_name(suffix), packed)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        tables = codec.tables(in_features)
        self.table_names = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, codec: Codec) -> QuantLinear:
        """Quantize a dense layer by rounding to the nearest codes, on its device. `linear` is left as it is."""
        return cls.from_packed(linear, codec, codec.encode(linear.weight))

    @classmethod
    def from_packed(cls, linear: nn.Linear, codec: Codec, packed: Packed) -> QuantLinear:
        """What takes the place of a dense layer whose weight was packed elsewhere, on the layer's device."""
        bias, device = linear.bias, linear.weight.device
        layer = cls(linear.in_features, linear.out_features, bias is not None, codec, linear.weight.dtype, device)
        for suffix, tensor in packed.items():
            getattr(layer, parameter_name(suffix)).data = tensor.to(device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    @property
    def packed(self) -> Packed:
        """The packed tensors by suffix."""
        return {suffix: getattr(self, parameter_name(suffix)) for suffix in self.suffixes}

    @property
    def tables(self) -> Packed:
        """The constants that decoding reads."""
        return {name: getattr(self, name) for name in self.table_names}

    def reset_tables(self) -> None:
        """Fill the table buffers, which loading leaves uninitialized, in place on their device."""
        for name, table in self.codec.tables(self.in_features).items():
            device = getattr(self, name).device
            self.register_buffer(name, table.to(self.weight.device if device.type == "meta" else device), False)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias` for `x` `[..., in_features]`, in the dtype of `x`."""
        out = self.codec.matmul(x, self.packed, self.tables)
        return out if self.bias is None else out + self.bias

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary `nn.Linear` with the decoded weight in `dtype`, on the same device."""
        weight = self.codec.decode(self.packed, self.tables, dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def _apply(self, fn, recurse: bool = True):
        # `.to(dtype)` would round scales and levels to it. Moves are kept, changes of dtype are undone. Detached, because
        # nn.Module changes parameters in place.
        fixed = (*(parameter_name(suffix) for suffix in self.suffixes), *self.table_names)
        before = {name: getattr(self, name).detach() for name in fixed}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                restored = tensor.to(moved.device)
                if name in self._parameters:
                    self._parameters[name] = nn.Parameter(restored, requires_grad=False)
                else:
                    self._buffers[name] = restored
        return self

    def reset_parameters(self) -> None:
        raise RuntimeError("a packed layer has no initialization; load its tensors or use QuantLinear.from_linear")

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, codec={self.codec}"
