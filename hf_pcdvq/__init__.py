"""2-bit language models in Hugging Face Transformers.

Importing this package registers the quantization methods "pcdvq" and "ccq", so that `from_pretrained` quantizes with
`PcdvqConfig` or `CcqConfig` and loads packed models. `push_to_hub`, `quantize_model` and `recover` are imported on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_pcdvq_kernels import get_backend, set_backend

from .calibration.settings import Calibration
from .config import CcqConfig, PcdvqConfig
from .quantizer import PackedHfQuantizer
from .recovery.settings import Recovery
from .registration import register
from .version import FORMAT_VERSION, __version__

if TYPE_CHECKING:
    from .allocate import allocate_bits
    from .publish.push import push_to_hub
    from .quantize import quantize_model
    from .recovery.recover import recover

__all__ = [
    "FORMAT_VERSION",
    "Calibration",
    "CcqConfig",
    "PackedHfQuantizer",
    "PcdvqConfig",
    "Recovery",
    "__version__",
    "allocate_bits",
    "get_backend",
    "push_to_hub",
    "quantize_model",
    "recover",
    "register",
    "set_backend",
]

_ON_FIRST_USE = {
    "allocate_bits": ".allocate",
    "push_to_hub": ".publish.push",
    "quantize_model": ".quantize",
    "recover": ".recovery.recover",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
