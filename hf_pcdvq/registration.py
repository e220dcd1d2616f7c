"""Registers the quantization methods with Transformers."""

from __future__ import annotations

import warnings

from transformers.quantizers import auto

from .config import CONFIGS
from .quantizer import PackedHfQuantizer


def register() -> None:
    """Register the configs and the quantizer, by method, with Transformers. May be called any number of times.

    A method of the same name that another package has registered is left in place, with a warning.
    """
    for config in CONFIGS.values():
        taken = auto.AUTO_QUANTIZER_MAPPING.get(config.method)
        if taken is not None and taken.__module__.split(".")[0] != __package__:
            warnings.warn(
                f"quantization method {config.method!r} is already registered by {taken.__module__}; "
                "hf_pcdvq does not replace it, and its own models of that method cannot be loaded",
                stacklevel=2,
            )
            continue
        auto.AUTO_QUANTIZER_MAPPING[config.method] = PackedHfQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[config.method] = config
    # Configs of these types may set loading attributes (dequantize=True) for a model that is already packed.
    loading = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = loading + tuple(
        config for config in CONFIGS.values() if config not in loading
    )
