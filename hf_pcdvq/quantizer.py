"""The `HfQuantizer` classes: the hooks through which Transformers quantizes, loads and saves. No arithmetic.

- Quantizing while loading: `_process_model_before_weight_loading` replaces dense layers by packed ones on the meta
  device; each dense weight then passes through `Quantize` as it arrives.
- Quantizing with calibration: the dense model loads as usual, and the hook after loading calls `calibrate_model`.
- Loading a packed model: its files say which modules are packed, and how. They are replaced likewise; packed tensors
  load by name like any others.
- `dequantize=True`: packed tensors load likewise, and the hook after loading decodes them.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import std
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightTransform,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.logging import is_progress_bar_enabled

from .calibration.held_out import with_comparison
from .calibration.model import calibrate_model, find_tokenizer
from .calibration.report import QuantizationReport
from .calibration.towers import not_reached_by_text
from .calibration.weights import ModelWeights
from .codecs import Codec
from .config import PackedConfig
from .files.marks import drop_marks
from .files.names import matched_names, renaming_of
from .files.packing import PackedFiles, PackingRecord, save_with
from .load_operations import PassThrough, Quantize, changes, check_loaded, one_expert_at_a_time
from .modules import (
    PackedModule,
    QuantEmbedding,
    count_matrices,
    packed_modules,
    packed_type,
    share_inputs,
    unshare_inputs,
)
from .modules.methods import replace_method
from .modules.tied import install, is_tied, owner_of, tie_dense, tied_to, uninstall
from .parameter_count import num_parameters
from .progress import progress_of
from .select import added_modules, check_packable, select_layers
from .vocabulary import RESIZE, check_vocabulary, refuse_resizing, vocabulary_settings

logger = logging.getLogger(__name__)


class PackedHfQuantizer(HfQuantizer):
    """The quantizer of every method: the config says which codecs its layers have."""

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.failure: str | None = None
        self.report: QuantizationReport | None = None
        # Whether the model stays on meta: its files are laid out, and its tensors put there later.
        self.hollow = False
        self._progress: std.tqdm | None = None
        self._to_calibrate: list[str] = []
        self._checkpoint_files: list[str] | None = None

    # ---------------------------------------------------------------------------------------- before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.dequantize:
            raise ValueError(
                "dequantize=True decodes a model that is packed already; this checkpoint is not. "
                "Leave it out to quantize, or load without a quantization_config"
            )
        config = self.quantization_config
        if not self.pre_quantized and config.target is not None and config.calibration is None:
            raise ValueError(
                f'bits="auto" for {config.target} chooses by what quantization does to predictions on a text, and needs '
                'calibration: pass calibration=Calibration(dataset=...) or "text.txt" in the config'
            )

    def update_device_map(self, device_map: Any) -> Any:
        # Encoding and decoding belong on the accelerator if there is one; None would leave both on the CPU.
        if device_map is None and torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            return {"": f"{accelerator.type}:{torch.accelerator.current_device_index()}"}
        return device_map

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Takes no part in choosing attention: it is the last hook that sees the config before the weights are looked for."""
        drop_marks(vars(config))
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            files = self._packed_files(model, checkpoint_files)
            files.check_hashes()
            self._prepare_for(model, files)
            return
        selected = self.select(model)
        if self.quantization_config.calibration is not None:
            self._to_calibrate = selected  # after their weights have loaded
            self._checkpoint_files = checkpoint_files
            return
        matrices = sum(count_matrices(model.get_submodule(name)) for name in selected)
        for name in selected:
            replace_by_packed(model, name, self.quantization_config.codec_of(name))
        self.show_progress(matrices, is_progress_bar_enabled())

    def select(self, model: nn.Module) -> list[str]:
        """Names of the layers to pack in a dense model. The config records which ones are skipped.

        Raises:
            ValueError: there are none, or the config asks for one that cannot be packed.
        """
        config = self.quantization_config
        asked = config.modules_to_not_convert or []
        skip = self.get_modules_to_not_convert(model, asked, model._keep_in_fp32_modules, add_default_skips=True)
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        added = {} if config.modules_to_convert is not None else added_modules(model)
        vocabulary = vocabulary_settings(model, config)
        for name, setting in vocabulary.items():
            check_vocabulary(model, name, config.codec_with_setting(setting))
        config.name_vocabulary(vocabulary)
        options = (skip, config.modules_to_convert, tied, model.base_model_prefix)
        selected, left = select_layers(model, config.codec_of, *options, added, list(vocabulary))
        layers = [name for name in selected if name not in vocabulary]
        if layers and config.calibration is not None and config.modules_to_convert is None:
            added = {**not_reached_by_text(model, layers, config.overridden), **added}
            selected, left = select_layers(model, config.codec_of, *options, added, list(vocabulary))
        if not selected:
            raise ValueError(f"{type(model).__name__} has no layer that {config.codec} can pack: {left}")
        packed = {module for name in vocabulary for module in (name, *tied_to(model, name))}
        config.modules_to_not_convert = sorted({*skip, *added} - packed)
        config.left_unpacked = left
        return selected

    def _packed_files(self, model: nn.Module, names: list[str] | None) -> PackedFiles:
        """What the checkpoint holds.

        Raises:
            ValueError: it is damaged, does not belong to the config, or is not in safetensors files.
        """
        if not names or not all(str(name).endswith(".safetensors") for name in names):
            raise ValueError(
                f"a packed {type(model).__name__} loads from safetensors files only, got {names or 'no files'}; pass the "
                "folder or the name on the Hub of a model that save_pretrained has written"
            )
        return PackedFiles.read(names, self.quantization_config)

    def _prepare_for(self, model: nn.Module, files: PackedFiles) -> None:
        """Replace those modules that are packed in the files, and no others, by packed ones on the meta device.

        Raises:
            ValueError: a packed module cannot be packed in this model, or has tensors of another shape or dtype.
        """
        modules = dict(model.named_modules())
        found = matched_names(files.codecs, modules, model.base_model_prefix, renaming_of(model))
        if not found:
            raise ValueError(
                f"config.json says that the model is packed, but its files hold packed tensors for no layer of "
                f"{type(model).__name__}"
            )
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        # Owners of tied weights first: where the file has two weights all the same, the other one is replaced once more.
        for name, stored in sorted(found.items(), key=lambda pair: is_tied(model, pair[0])):
            codec = files.codecs[stored]
            vocabulary = is_tied(model, name) or tied_to(model, name) or isinstance(modules[name], nn.Embedding)
            if vocabulary and owner_of(model, name) in found:
                model.set_submodule(name, modules[name])  # dense again where it was packed with its owner
                check_vocabulary(model, name, codec)  # and what is tied to it
            else:
                check_packable(name, modules[name], codec, tied)
            packed = replace_by_packed(model, name, codec)
            files.check_shapes(stored, {key: tensor for key, tensor in packed.named_parameters() if key != "bias"})

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        if not self.pre_quantized or not torch.distributed.is_available():
            return
        from .parallel import packed_plan  # not when this package is imported: it takes seconds

        # Called for either plan. Replaced, not changed in place: a caller's rules are merged into it later.
        names = [name for name in ("_tp_plan", "_ep_plan") if getattr(model, name) is plan]
        for name in names:
            setattr(model, name, packed_plan(model, plan))
        if not names and getattr(model.config, "distributed_config", None) is not None:
            raise NotImplementedError(
                f"{type(model).__name__} keeps its parallel plan where it cannot be completed with rules for packed weights, "
                "which would be cut as dense ones are; load it with device_map='auto' in one process"
            )

    # ---------------------------------------------------------------------------------------- during loading

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element, for device maps: with `dequantize`, those that a packed weight takes when it is decoded."""
        module, name = get_module_from_name(model, param_name)
        if self.quantization_config.dequantize and isinstance(module, PackedModule):
            entry = module.packed_parameters.get(name)
            return 0 if entry is None else prod(entry.shape) * model.dtype.itemsize / param.numel()
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if not self.pre_quantized and getattr(model, "_mesh_manager", None) is not None:
            raise ValueError(
                f"{type(model).__name__} cannot be quantized while it is loaded onto several processes: each would encode "
                "what it holds. Quantize it in one process, save it with save_pretrained, and load that with the same "
                "distributed_config"
            )
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, PackedModule) and name in module.packed_parameters

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: nn.Module
    ) -> list[WeightTransform]:
        """The conversions between files and parameters, with fused experts packed one expert at a time."""
        if not self.pre_quantized:
            weight_conversions = [one_expert_at_a_time(conversion) for conversion in weight_conversions]
            for conversion in weight_conversions:
                # Transformers asks only whether the first of several targets needs quantization.
                if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
                    conversion.quantization_operation = self.get_quantize_ops()
        # Converters that merge dense experts are kept: packed experts are stored as stacks and do not match them.
        return weight_conversions + self.get_weight_conversions()

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self.pre_quantized:
            return []
        # Disk offloading reads a weight from the source checkpoint unless a converter applies to it.
        return [WeightConverter("weight", "weight", [PassThrough()])]

    def show_progress(self, matrices: int, wanted: bool) -> None:
        """Begin a progress bar over a number of matrices, or end it."""
        if self._progress is not None:
            self._progress.close()
        self._progress = (
            progress_of(total=matrices, desc="Quantizing", unit="weight", shown=wanted) if matrices else None
        )

    def advance(self, matrices: int) -> None:
        """Advance the progress bar by matrices that were packed before."""
        if self._progress is not None:
            self._progress.update(matrices)

    def report_progress(self, name: str, error: float) -> None:
        """Advance the progress bar by one matrix of the parameter `name` and show its relative squared error."""
        if self._progress is not None:
            self._progress.set_postfix_str(f"{name.removesuffix('.weight')} error {error:.4f}", refresh=False)
            self._progress.update()

    # ----------------------------------------------------------------------------------------- after loading

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.show_progress(0, False)
        if self.failure is not None:
            raise ValueError(self.failure)
        held_out = None
        if self._to_calibrate:
            config = self.quantization_config
            self.report, held_out = calibrate_model(
                ModelWeights(model),
                self._to_calibrate,
                config,
                config.calibration.dataset,
                find_tokenizer(config, model, self._checkpoint_files),
                progress=is_progress_bar_enabled(),
            )
        layers = packed_modules(model)
        if self.report is None and not self.hollow:
            check_loaded(layers)
        for layer in layers.values():
            layer.reset_tables()
        if self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
            self._settle_conversions(model)
            return
        share_inputs(model)
        replace_method(model, "num_parameters", num_parameters)
        refuse_resizing(model)
        self._settle_conversions(model)
        if held_out is not None:
            self.report = with_comparison(self.report, lambda: ModelWeights(model), held_out)
        if not self.pre_quantized:
            self._print_summary(sum(not is_tied(model, name) for name in layers))

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
            for name, module in packed_modules(model).items()
            for parameter in module.packed_parameters
        ]
        model._weight_conversions = [entry for entry in conversions if not changes(entry, packed)]

    def _print_summary(self, layers: int) -> None:
        left = self.quantization_config.left_unpacked
        lines = [f"  {name}: {reason}" for name, reason in left.items()]
        logger.warning("\n".join([f"Packed {layers} layers; left unpacked{':' if left else ' was nothing'}", *lines]))

    # ------------------------------------------------------------------------------- saving and dequantizing

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        from transformers import modeling_utils  # not when this package is imported: it takes seconds

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are saved
        save_with(modeling_utils)
        record = PackingRecord.of(model, self.quantization_config)
        return None, record.hollow() if self.hollow else record.metadata()

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
        from accelerate.hooks import add_hook_to_module

        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # the config may hold its name
        layers = packed_modules(model)
        for name, layer in layers.items():
            if next(layer.parameters()).device.type == "meta":
                raise ValueError(f"dequantize: {name} is offloaded; load the model without offloading first")
        for name, layer in layers.items():
            uninstall(model, name)
            dense = layer.dequantize(dtype)
            model.set_submodule(name, dense)
            if hasattr(layer, "_hf_hook"):  # of a model on several devices
                add_hook_to_module(dense, layer._hf_hook)
        tie_dense(model, layers)
        if getattr(model, "_mesh_manager", None) is not None:
            from .parallel import parallelize

            parallelize(model, list(layers))
        unshare_inputs(model)
        for method in ("num_parameters", RESIZE):
            replace_method(model, method, None)
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


def replace_by_packed(model: nn.Module, name: str, codec: Codec) -> PackedModule:
    """Put an empty packed module on the meta device in the place of a dense one, and return it."""
    dense = model.get_submodule(name)
    empty = packed_type(dense).empty_like(dense, codec)
    # Transformers would try to initialize missing integers with normal noise; `check_loaded` reports them. Buffers that
    # no file holds it has to compute.
    empty._is_hf_initialized = not (isinstance(empty, QuantEmbedding) and empty.buffers_to_initialize)
    install(model, name, empty)
    return empty
