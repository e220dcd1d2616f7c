"""Makes the two methods known to Transformers."""

from __future__ import annotations

import warnings

from transformers.quantizers import auto

from .config import CcqConfig, PackedConfig, PcdvqConfig
from .quantizer import CcqHfQuantizer, PackedHfQuantizer, PcdvqHfQuantizer

METHODS: tuple[tuple[type[PackedConfig], type[PackedHfQuantizer]], ...] = (
    (PcdvqConfig, PcdvqHfQuantizer),
    (CcqConfig, CcqHfQuantizer),
)


def register() -> None:
    """Register "pcdvq" and "ccq" with Transformers. May be called any number of times.

    A method of the same name that somebody else registered is left in place, with a warning.
    """
    for config, quantizer in METHODS:
        taken = auto.AUTO_QUANTIZER_MAPPING.get(config.method)
        if taken is not None and taken.__module__.split(".")[0] != __package__:
            warnings.warn(
                f"quantization method {config.method!r} is already registered by {taken.__module__}; "
                "hf_pcdvq does not replace it, and its own models of that method cannot be loaded",
                stacklevel=2,
            )
            continue
        auto.AUTO_QUANTIZER_MAPPING[config.method] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[config.method] = config
    # Configs of these types may set loading attributes (dequantize=True) for a model that is packed already.
    loading = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = loading + tuple(config for config, _ in METHODS if config not in loading)
