"""The quantization methods "pcdvq" and "ccq" as vLLM asks for them. Which module has which codec, the files say."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from .coding import Coding
from .experts import PackedExpertsMethod
from .linear import PackedLinearMethod
from .names import packed_as
from .record import read_codings


class PackedConfig(QuantizationConfig):
    """What both methods have in common.

    Args:
        settings: the `quantization_config` of config.json.
    """

    method: ClassVar[str]

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = settings
        self.codings: dict[str, Coding] = {}

    @classmethod
    def get_name(cls) -> str:
        return cls.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the kernels of older NVIDIA GPUs have never been compiled

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json only

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read which modules are packed, and how, from the headers of the files.

        Raises:
            As `read_codings`.
        """
        self.codings = read_codings(model_name, revision, self.settings)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as the class of the model does."""
        self.codings = hf_to_vllm_mapper.apply_dict(self.codings)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer; None leaves embeddings, heads and caches of attention as they are.

        Raises:
            ValueError: weights that vLLM merges are packed in different ways.
            NotImplementedError: packed experts are spread over several devices, or embeddings or the output head are packed.
        """
        if isinstance(layer, RoutedExperts):
            coding = self.codings.get(prefix)
            return None if coding is None else PackedExpertsMethod(prefix, coding, layer.moe_config)
        if not isinstance(layer, LinearBase):
            if prefix in self.codings:
                raise NotImplementedError(
                    f"{prefix} is packed, but embeddings and the output head are vLLM's own here: quantize the model without "
                    "the options embeddings and head"
                )
            return None
        found = packed_as(prefix, self.codings, self.packed_modules_mapping)
        return UnquantizedLinearMethod() if found is None else PackedLinearMethod(prefix, *found)


class PcdvqConfig(PackedConfig):
    """Polar coordinate decoupled vector quantization."""

    method = "pcdvq"


class CcqConfig(PackedConfig):
    """Convolutional code quantization."""

    method = "ccq"


CONFIGS: tuple[type[PackedConfig], ...] = (PcdvqConfig, CcqConfig)
