"""The base of packed modules: packed tensors as parameters, and decoding tables as buffers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hf_pcdvq_kernels.backend import constant_when_compiled
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from .divided import is_divided, local_part
from .packed_words import PackedWords, packed_error


def parameter_name(suffix: str, parameter: str = "weight") -> str:
    """The name under which a packed tensor is stored: that of the dense parameter, or `<parameter>_<suffix>`."""
    return f"{parameter}_{suffix}" if suffix else parameter


class PackedParameter(NamedTuple):
    """The replacement of one dense parameter: names of parameters by suffix, and of buffers by table."""

    shape: tuple[int, ...]  # of the dense parameter
    tensors: dict[str, str]
    tables: dict[str, str]


class PackedModule(nn.Module):
    """A module with packed parameters.

    For a parameter `weight` `[N, K]` of the dense module, this one has `weight` (packed words, integer) and
    `weight_<suffix>`, as given by the codec's `specs`; for a stack of weights `[E, N, K]` they are stacked. Subclasses
    declare `weight = DenseName()`, so that the attribute cannot be taken for the dense parameter. The tables needed for
    decoding (codebook, rotation signs) are buffers that are not saved: they are determined by the config, and
    `reset_tables` fills them in after loading.

    Args:
        codec: the packed format.
        dtype: what the dense parameters have; None takes torch's default.

    Attributes:
        packed_parameters: by the name of the dense parameter.
        dense_dtype: dtype of the dense module, changed by `.to(dtype)`. Packed tensors do not have it.
    """

    def __init__(self, codec: Codec, dtype: torch.dtype | None):
        nn.Module.__init__(self)  # skips classes in between: nn.Linear would allocate the dense weight
        self.codec = codec
        self.dense_dtype = torch.get_default_dtype() if dtype is None else dtype
        self.packed_parameters: dict[str, PackedParameter] = {}

    def register_packed(self, parameter: str, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        """Allocate the packed tensors and the tables of a dense parameter `[..., N, K]`.

        Raises:
            ValueError: `K` is not a multiple of `codec.multiple`.
        """
        *stack, rows, columns = shape
        if columns % self.codec.multiple:
            raise ValueError(
                f"in_features must be a multiple of {self.codec.multiple} for {self.codec}, got {columns}"
            )
        tensors, names = {}, {}
        for suffix, (packed_shape, dtype) in self.codec.specs(rows, columns).items():
            tensors[suffix] = parameter_name(suffix, parameter)
            packed = torch.empty((*stack, *packed_shape), dtype=dtype, device=device)
            self.register_parameter(tensors[suffix], nn.Parameter(packed, requires_grad=False))
        for table, value in self.codec.tables(columns).items():
            names[table] = table if parameter == "weight" else f"{parameter}_{table}"
            self.register_buffer(names[table], value.to(device), persistent=False)
        self.packed_parameters[parameter] = PackedParameter(tuple(shape), tensors, names)

    def packed_tensors(self, parameter: str) -> Packed:
        """The packed tensors of a dense parameter, by suffix."""
        return {suffix: self._parameters[name] for suffix, name in self.packed_parameters[parameter].tensors.items()}

    def tables_of(self, parameter: str) -> Packed:
        """The constants needed to decode a dense parameter."""
        return {table: getattr(self, name) for table, name in self.packed_parameters[parameter].tables.items()}

    def op_arguments(self, parameter: str) -> tuple[str, list[Any]]:
        """The family of the ops for a dense parameter, and their arguments: what `Codec.arguments` makes of its tensors."""
        family, names = self._op(parameter)
        own, tables = self._parameters, self._buffers
        return family, [own[name] if name in own else tables[name] if name in tables else name for name in names]

    # `torch.compile` checks at every call all that it has looked at, which took longer than the products of a layer.
    @constant_when_compiled
    def _op(self, parameter: str) -> tuple[str, tuple[Any, ...]]:
        """As `op_arguments`, with the names of tensors in their places."""
        entry = self.packed_parameters[parameter]
        return self.codec.family.family, tuple(self.codec.arguments(entry.tensors, entry.tables))

    def set_packed(self, parameter: str, packed: Packed) -> None:
        """Replace the packed tensors of a dense parameter; they are moved to the module's device."""
        for suffix, name in self.packed_parameters[parameter].tensors.items():
            target = self._parameters[name]
            target.data = packed[suffix].to(target.device)

    def reset_tables(self) -> None:
        """Fill the table buffers, which loading leaves uninitialized, on their device."""
        for parameter, (shape, _, names) in self.packed_parameters.items():
            home = self._parameters[parameter].device
            for table, value in self.codec.tables(shape[-1]).items():
                device = getattr(self, names[table]).device
                self.register_buffer(names[table], value.to(home if device.type == "meta" else device), False)

    def decoded(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """A dense parameter decoded to `dtype`, on the same device, and divided among processes as the packed one is."""
        packed = {suffix: local_part(tensor) for suffix, tensor in self.packed_tensors(parameter).items()}
        dense = decode_stack(self.codec, packed, self.tables_of(parameter), dtype)
        words = self._parameters[parameter]
        if not is_divided(words):
            return dense
        from torch.distributed.tensor import DTensor

        whole = torch.empty(self.packed_parameters[parameter].shape, device="meta")
        # Words have the dimensions of the dense parameter, so what divides one divides the other.
        return DTensor.from_local(
            dense, words.device_mesh, words.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _apply(self, fn, recurse: bool = True):
        # `.to(dtype)` would round scales and levels. Moves between devices are kept, changes of dtype are undone.
        # Detached, because nn.Module changes parameters in place.
        entries = self.packed_parameters.values()
        packed = {name: self._parameters[name].detach() for entry in entries for name in entry.tensors.values()}
        tables = {name: getattr(self, name) for entry in entries for name in entry.tables.values()}
        super()._apply(fn, recurse)
        self.dense_dtype = fn(torch.empty(1, dtype=self.dense_dtype)).dtype
        for name, tensor in packed.items():
            moved = self._parameters[name]
            if moved.dtype != tensor.dtype:
                _refill(moved, tensor.to(moved.device))
        # Tables are constants: new memory, as from `to_empty`, is filled with what they were.
        for name, table in tables.items():
            moved = getattr(self, name)
            if moved is not table and not table.is_meta:
                self._buffers[name] = table.to(moved.device)
        if any(table.is_meta and not getattr(self, name).is_meta for name, table in tables.items()):
            self.reset_tables()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        entries = self.packed_parameters.items()
        if any(getattr(self, name).is_meta for _, entry in entries for name in entry.tables.values()):
            self.reset_tables()  # `assign=True` may have given the module its first real tensors

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Assigning to an attribute comes here too. Loading gives a packed parameter new tensors of the same kind; what
        # it gives to one on the meta device it checks itself.
        own = self._parameters.get(name)
        if self._is_packed(name) and own is not None and not own.is_meta:
            if isinstance(param, PackedWords) and param.words is own:
                return
            if param is None or (param.shape, param.dtype) != (own.shape, own.dtype):
                raise packed_error(f"{type(self).__name__}: {name}")
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        # A parametrization removes the parameter that it computes with.
        if self._is_packed(name):
            raise packed_error(f"{type(self).__name__}: {name}")
        super().__delattr__(name)

    def _is_packed(self, name: str) -> bool:
        return any(name in entry.tensors.values() for entry in self.packed_parameters.values())

    def reset_parameters(self) -> None:
        raise RuntimeError("a packed layer has no initialization; load its tensors or quantize a dense one")


def _refill(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter, which an optimizer may hold, other content, of any dtype."""
    if is_divided(parameter):  # whose `data` is not all of it
        torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    else:
        parameter.data = tensor


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """The packed modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def copy_rest(names: list[str], source: nn.Module, target: nn.Module) -> None:
    """Give `target` the named attributes, the child modules and the training mode of `source`."""
    for name in names:
        setattr(target, name, getattr(source, name))
    for name, child in source.named_children():
        target.add_module(name, child)
    target.train(source.training)


def encode_stack(codec: Codec, weight: Tensor) -> Packed:
    """Round a weight `[N, K]`, or each in a stack `[E, N, K]`, to the nearest codes. Raises like `codec.encode`."""
    if weight.ndim == 2:
        return codec.encode(weight)
    return stack_packed([codec.encode(matrix) for matrix in weight])


def decode_stack(codec: Codec, packed: Packed, tables: Packed, dtype: torch.dtype) -> Tensor:
    """Decode packed tensors to a weight or a stack of weights."""
    if packed[""].ndim == 2:
        return codec.decode(packed, tables, dtype)
    return torch.stack([codec.decode(part, tables, dtype) for part in unstack_packed(packed)])


def stack_packed(parts: list[Packed]) -> Packed:
    """Stack the packed tensors of several weights of the same shape."""
    return {suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]}


def unstack_packed(packed: Packed) -> list[Packed]:
    """The packed tensors of every weight in a stack, as views."""
    return [{suffix: tensor[index] for suffix, tensor in packed.items()} for index in range(len(packed[""]))]
