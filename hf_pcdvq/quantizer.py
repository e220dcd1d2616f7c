"""The `HfQuantizer` classes: the hooks through which Transformers quantizes, loads and saves. No arithmetic.

- Quantizing while loading: `_process_model_before_weight_loading` replaces dense layers by packed ones on the meta
  device; each dense weight then passes through `Quantize` as it arrives.
- Quantizing with calibration: the dense model loads as usual, and the hook after loading calls `calibrate_model`.
- Loading a packed model: the same replacement; packed tensors load by name like any others.
- `dequantize=True`: nothing is replaced, `Dequantize` decodes packed tensors while they load.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.logging import is_progress_bar_enabled

from .calibration.held_out import with_comparison
from .calibration.model import calibrate_model, find_tokenizer
from .calibration.report import QuantizationReport
from .config import PackedConfig
from .files.headers import check_stored
from .load_operations import Dequantize, OneExpertAtATime, PassThrough, Quantize
from .modules import (
    PackedModule,
    count_matrices,
    dense_weights,
    is_fused_experts,
    packed_type,
    parameter_name,
    share_inputs,
)
from .select import select_layers
from .version import FORMAT_VERSION

logger = logging.getLogger(__name__)


class PackedHfQuantizer(HfQuantizer):
    """The quantizer of every method: the config says which codecs its layers have."""

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.serialized_names = {"weight": self._stored_names("weight")}
        self.failure: str | None = None
        self.report: QuantizationReport | None = None
        self._progress: tqdm | None = None
        self._to_calibrate: list[str] = []
        self._checkpoint_files: list[str] | None = None

    # ---------------------------------------------------------------------------------------- before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.dequantize:
            raise ValueError(
                "dequantize=True decodes a model that is packed already; this checkpoint is not. "
                "Leave it out to quantize, or load without a quantization_config"
            )

    def update_device_map(self, device_map: Any) -> Any:
        # Encoding and decoding belong on the accelerator if there is one; None would leave both on the CPU.
        if device_map is None and torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            return {"": f"{accelerator.type}:{torch.accelerator.current_device_index()}"}
        return device_map

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.dequantize:
            return
        selected = self.select(model)
        if not self.pre_quantized and self.quantization_config.calibration is not None:
            self._to_calibrate = selected  # after their weights have loaded
            self._checkpoint_files = checkpoint_files
            return
        matrices = 0
        for name in selected:
            module = model.get_submodule(name)
            matrices += count_matrices(module)
            empty = packed_type(module).empty_like(module, self.quantization_config.codec_of(name))
            # Transformers would try to initialize missing integers with normal noise; `_check_loaded` reports them.
            empty._is_hf_initialized = True
            model.set_submodule(name, empty)
        if self.pre_quantized:
            self._check_checkpoint(model, checkpoint_files)
        else:
            self._progress = tqdm(
                total=matrices, desc="Quantizing", unit="weight", disable=not is_progress_bar_enabled()
            )

    def select(self, model: nn.Module) -> list[str]:
        """Names of the layers to pack. Unless the model is packed already, the config records which ones are skipped.

        Raises:
            ValueError: there are none, or the config asks for one that cannot be packed.
        """
        config = self.quantization_config
        skip = self._modules_to_skip(model)
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        selected, left = select_layers(
            model, config.codec_of, skip, config.modules_to_convert, tied, model.base_model_prefix
        )
        if not selected:
            raise ValueError(f"{type(model).__name__} has no layer that {config.codec} can pack: {left}")
        if not self.pre_quantized:
            config.modules_to_not_convert = sorted(skip)
            config.left_unpacked = left
        return selected

    def _modules_to_skip(self, model: nn.Module) -> list[str]:
        """The user's patterns and Transformers' defaults, resolved when the model is packed and stored in its config.

        A packed model uses the stored list, because the defaults depend on the class it is loaded with. Only the
        output head is added: a model that was packed as a bare `AutoModel` had none.
        """
        asked = self.quantization_config.modules_to_not_convert or []
        if self.pre_quantized:
            head = model.get_output_embeddings()
            return asked + [name for name, module in model.named_modules() if head is not None and module is head]
        return self.get_modules_to_not_convert(model, asked, model._keep_in_fp32_modules, add_default_skips=True)

    def _check_checkpoint(self, model: nn.Module, files: list[str] | None) -> None:
        if files and all(str(file).endswith(".safetensors") for file in files):
            expected = {
                name: (tuple(parameter.shape), parameter.dtype)
                for path, module in _packed_modules(model).items()
                for name, parameter in module.named_parameters(path, recurse=False)
                if not name.endswith(".bias")
            }
            check_stored(expected, files, model.base_model_prefix)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        distributed = getattr(model.config, "distributed_config", None)
        if any((getattr(distributed, size, None) or 1) > 1 for size in ("tp_size", "ep_size")):
            raise NotImplementedError(
                "hf_pcdvq does not support tensor or expert parallelism yet: packed tensors would be sharded like "
                "dense ones. Load with device_map='auto' to spread the model over several GPUs"
            )
        super().update_parallel_plan(model, plan)

    # ---------------------------------------------------------------------------------------- during loading

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, PackedModule) and name in module.packed_parameters

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Dequantize}

    def _stored_names(self, parameter: str) -> list[str]:
        """The tensors in which a dense parameter may be stored, whatever the codec of its module."""
        suffixes = {
            suffix: None
            for codec in self.quantization_config.codecs
            for suffix in codec.specs(codec.row_multiple, codec.multiple)
        }
        return [parameter_name(suffix, parameter) for suffix in suffixes]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: nn.Module
    ) -> list[WeightTransform]:
        """The conversions between files and parameters, with fused experts packed one expert at a time."""
        if not self.pre_quantized:
            weight_conversions = [_one_expert_at_a_time(conversion) for conversion in weight_conversions]
        # Converters that merge dense experts are kept: packed experts are stored as stacks and do not match them.
        conversions = weight_conversions + self.get_weight_conversions()
        if self.quantization_config.dequantize:
            # Their names include the module's, because a dense layer may be called gate_up_proj too.
            stacks = {
                f"{name.rpartition('.')[2]}.{stack}"
                for name, module in model.named_modules()
                if is_fused_experts(module)
                for stack in dense_weights(module)
            }
            for stack in sorted(stacks):
                conversions.append(WeightConverter(self._stored_names(stack), stack, [Dequantize(self)]))
        return conversions

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self.pre_quantized:
            return super().get_weight_conversions()
        # Disk offloading reads a weight from the source checkpoint unless a converter applies to it.
        return [WeightConverter("weight", "weight", [PassThrough()])]

    def report_progress(self, name: str, error: float) -> None:
        """Advance the progress bar by one matrix of the parameter `name` and show its relative squared error."""
        if self._progress is not None:
            self._progress.set_postfix_str(f"{name.removesuffix('.weight')} error {error:.4f}", refresh=False)
            self._progress.update()

    # ----------------------------------------------------------------------------------------- after loading

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self.failure is not None:
            raise ValueError(self.failure)
        held_out = None
        if self._to_calibrate:
            config = self.quantization_config
            self.report, held_out = calibrate_model(
                model,
                self._to_calibrate,
                config,
                config.calibration.dataset,
                find_tokenizer(config, model, self._checkpoint_files),
                progress=is_progress_bar_enabled(),
            )
        layers = _packed_modules(model)
        if self.report is None:
            _check_loaded(layers)
        for layer in layers.values():
            layer.reset_tables()
        share_inputs(model)
        self._settle_conversions(model)
        if held_out is not None:
            self.report = with_comparison(self.report, model, held_out)
        if not self.pre_quantized:
            self._print_summary(len(layers))

    def _settle_conversions(self, model: nn.Module) -> None:
        """Make `save_pretrained` write packed weights unchanged and dense ones as in the model's original files.

        Packed weights keep the names of their modules, because overrides select codecs by them.
        """
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None or self.quantization_config.dequantize:
            # Whether there is a prefix was determined by loading.
            prefixes = [entry for entry in conversions or () if isinstance(entry, PrefixChange)]
            stock = get_model_conversion_mapping(model, add_legacy=False)
            conversions = prefixes + [entry for entry in stock if not isinstance(entry, PrefixChange)]
        packed = [
            f"{name}.{parameter}"
            for name, module in _packed_modules(model).items()
            for parameter in module.packed_parameters
        ]
        model._weight_conversions = [entry for entry in conversions if not _changes(entry, packed)]

    def _print_summary(self, layers: int) -> None:
        left = self.quantization_config.left_unpacked
        lines = [f"  {name}: {reason}" for name, reason in left.items()]
        logger.warning("\n".join([f"Packed {layers} layers; left unpacked:", *lines]))

    # ------------------------------------------------------------------------------- saving and dequantizing

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        return None, {"hf_pcdvq_format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # the config may hold its name
        layers = _packed_modules(model)
        for name, layer in layers.items():
            if next(layer.parameters()).device.type == "meta":
                raise ValueError(f"dequantize: {name} is offloaded; load the model without offloading first")
        for name, layer in layers.items():
            model.set_submodule(name, layer.dequantize(dtype))
            if getattr(layer, "shared_input", None) is not None:
                layer.shared_input.remove()
        model._weight_conversions = None  # back to the architecture's own, which may unstack experts when saving
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _check_loaded(layers: dict[str, PackedModule]) -> None:
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
    if tensor.device.type != "meta":
        return getattr(tensor, "_is_hf_initialized", False)
    weights = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    return weights is not None and name in weights


def _packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def _one_expert_at_a_time(conversion: WeightTransform) -> WeightTransform:
    first = conversion.operations[0] if isinstance(conversion, WeightConverter) else None
    if isinstance(first, MergeModulelist) and first.dim == 0:
        return OneExpertAtATime.of(conversion)
    return conversion


def _changes(conversion: WeightTransform, names: list[str]) -> bool:
    """Whether a conversion makes one of these parameters from tensors with other names."""
    if isinstance(conversion, PrefixChange):
        return False
    if isinstance(conversion, WeightRenaming):
        return any(conversion.reverse_transform().rename_source_key(name)[0] != name for name in names)
    if isinstance(conversion.operations[0], PassThrough):
        return False
    patterns = [re.compile(target.replace(r"\1", ".*") + "$") for target in conversion.target_patterns]
    return any(pattern.search(name) for pattern in patterns for name in names)
