"""What happens to each parameter of a dense model that is packed while Transformers loads it."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.quantizers.quantizers_utils import get_module_from_name

from .modules import PackedModule, encode_stack, parameter_name

if TYPE_CHECKING:
    from .quantizer import PackedHfQuantizer


class PassThrough(ConversionOps):
    """Leaves tensors unchanged. Packed tensors are saved under their own names, so saving has nothing to revert."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class LoadOperation(ConversionOps):
    """An op that runs while a parameter loads, and whose errors name the parameter.

    Transformers catches what an op raises, continues with the next parameter and finally raises an error that names
    neither tensor nor reason. So the first failure is recorded, the remaining work is skipped, and the hook after
    loading raises the error.
    """

    def __init__(self, hf_quantizer: PackedHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadOperation:
        # Transformers copies the op for every parameter; all copies must report to the same quantizer.
        return type(self)(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Tensor]:
        if self.hf_quantizer.failure is not None:
            return {}
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        try:
            return self.apply(tensors, full_layer_name, get_module_from_name(model, full_layer_name)[0])
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.hf_quantizer.failure = f"{full_layer_name}: {kind}{error}"
            return {}

    @abstractmethod
    def apply(self, tensors: dict[str, Tensor], name: str, module: nn.Module) -> dict[str, Tensor]:
        """Make parameters of the model from the checkpoint's tensors of the parameter `name` of `module`."""

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


class Quantize(LoadOperation):
    """Packs a dense weight, or a stack of them, into the packed tensors of its module."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Tensor]:
        # One tensor of a file may feed several layers (query, key and value in one), each of which is packed or not.
        targets = input_dict if len(input_dict) > 1 else {full_layer_name: next(iter(input_dict.values()))}
        found: dict[str, Tensor] = {}
        for name, tensor in targets.items():
            needed = self.hf_quantizer.param_needs_quantization(model, name)
            found |= super().convert({name: tensor}, name, model, **kwargs) if needed else {name: tensor}
        return found

    def apply(self, tensors: dict[str, Tensor], name: str, module: nn.Module) -> dict[str, Tensor]:
        (weight,) = tensors.values()
        packed = encode_stack(module.codec, weight)
        for matrix in range(len(weight)) if weight.ndim == 3 else [...]:
            part = {suffix: tensor[matrix] for suffix, tensor in packed.items()}
            self.hf_quantizer.report_progress(name, module.codec.relative_error(weight[matrix], part))
        path, _, parameter = name.rpartition(".")
        return {f"{path}.{parameter_name(suffix, parameter)}": tensor for suffix, tensor in packed.items()}


class OneExpertAtATime(WeightConverter):
    """A converter that merges the weights of experts into a stack, and reads, and packs, one expert at a time.

    Transformers' own converter would first read the dense weights of all experts of a layer, 15 GB in DeepSeek-V3, and
    then copy them into a stack. This one holds one dense expert at a time, besides the stack, which is packed or not.
    """

    __slots__ = ()

    @classmethod
    def of(cls, converter: WeightConverter) -> OneExpertAtATime:
        """A converter with the patterns, scope and operations of one of Transformers'."""
        made = cls(
            converter._original_source_patterns,
            converter._original_target_patterns,
            list(converter.operations),
            converter.force_cpu,
        )
        made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return made

    def convert(self, layer_name: str, **kwargs: Any) -> dict[str, Tensor]:
        """Parameters by their full names."""
        sources = dict(self.collected_tensors)
        counts = {len(tensors) for tensors in sources.values()}
        if not isinstance(self.operations[0], MergeModulelist) or len(counts) != 1:  # saving runs the reverse
            return super().convert(layer_name, **kwargs)
        number = counts.pop()
        stacks: dict[str, Tensor] = {}
        for expert in range(number):
            self.collected_tensors.clear()
            for pattern, tensors in sources.items():
                self.collected_tensors[pattern] = [tensors[expert]]
                tensors[expert] = None
            converted = super().convert(layer_name, **kwargs)
            if not converted:
                return {}  # it failed; the operation has recorded why
            for name, value in converted.items():
                stack_of_one = value[0] if isinstance(value, list) else value
                if expert == 0:
                    stacks[name] = stack_of_one.new_empty(number, *stack_of_one.shape[1:])
                stacks[name][expert] = stack_of_one[0]
        return stacks


def check_loaded(layers: dict[str, PackedModule]) -> None:
    """Check that all tensors of packed modules, by their names, were in the checkpoint.

    Raises:
        ValueError: some were not; the message names them.
    """
    missing = [
        f"{name}.{parameter}"
        for name, layer in layers.items()
        for parameter, tensor in layer.named_parameters(recurse=False)
        if not _loaded(layer, parameter, tensor)
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} tensors of packed layers were not in the checkpoint: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}. The model would compute with random weights"
        )


def _loaded(layer: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a parameter was read from the checkpoint, or packed from what was read. Hooks hold offloaded ones."""
    if getattr(tensor, "_is_hf_initialized", False):  # on meta too, where a model is that is read part by part
        return True
    weights = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    return weights is not None and name in weights


def one_expert_at_a_time(conversion: WeightTransform) -> WeightTransform:
    """A conversion that merges experts, with each packed as it arrives; any other as it is."""
    first = conversion.operations[0] if isinstance(conversion, WeightConverter) else None
    if isinstance(first, MergeModulelist) and first.dim == 0:
        return OneExpertAtATime.of(conversion)
    return conversion


def changes(conversion: WeightTransform, names: list[str]) -> bool:
    """Whether a conversion makes one of these parameters from tensors with other names."""
    if isinstance(conversion, PrefixChange):
        return False
    if isinstance(conversion, WeightRenaming):
        return any(conversion.reverse_transform().rename_source_key(name)[0] != name for name in names)
    if isinstance(conversion.operations[0], PassThrough):
        return False
    # A target may be a parameter or a whole module.
    patterns = [re.compile(target.replace(r"\1", ".*") + r"(\.|$)") for target in conversion.target_patterns]
    return any(pattern.search(name) for pattern in patterns for name in names)
