"""2-bit language models in Hugging Face Transformers.

Importing this package registers the quantization methods "pcdvq" and "ccq", so that `from_pretrained` quantizes with
`PcdvqConfig` or `CcqConfig` and loads packed models.
"""

from hf_pcdvq_kernels import get_backend, set_backend

from .calibration.settings import Calibration
from .config import CcqConfig, PcdvqConfig
from .publish.push import push_to_hub
from .quantize import quantize_model
from .quantizer import PackedHfQuantizer
from .registration import register
from .version import FORMAT_VERSION, __version__

register()

__all__ = [
    "FORMAT_VERSION",
    "Calibration",
    "CcqConfig",
    "PackedHfQuantizer",
    "PcdvqConfig",
    "__version__",
    "get_backend",
    "push_to_hub",
    "quantize_model",
    "register",
    "set_backend",
]
