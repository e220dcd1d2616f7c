"""`PcdvqConfig` and `CcqConfig`: what a user asks for, and what a packed model's config.json records.

Every field is validated on construction. Both are JSON-clean and carry `format_version`; a config that a newer version
wrote is refused, with that version named, rather than read with its unknown fields dropped.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from typing import Any

from hf_pcdvq_kernels import CCQ_LAYOUTS, STREAM_BITS, STREAM_WINDOWS
from transformers.utils.quantization_config import QuantizationConfigMixin

from .calibration.settings import Calibration
from .codecs.base import Codec
from .codecs.codebook import codebook_hash
from .codecs.convolutional import ConvolutionalCodec
from .codecs.polar import CODEBOOKS, PolarCodec
from .codecs.scalar import ScalarCodec
from .codecs.stream import StreamCodec
from .version import FORMAT_VERSION

_NOT_SAVED = ("dequantize", "tokenizer")


def _one_of(owner: str, field: str, value: Any, allowed: tuple) -> Any:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ValueError(f"{owner}: {field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _names(owner: str, field: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{owner}: {field} must be a list of module names or patterns, got {value!r}")
    return list(value)


def _integer(owner: str, field: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{owner}: {field} must be an integer from {low} to {high}, got {value!r}")
    return value


def _overrides(owner: str, value: Any) -> dict[str, str | None]:
    try:
        overrides = dict(value or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: overrides must map patterns to settings, got {value!r}") from error
    for pattern, setting in overrides.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{owner}: overrides: {pattern!r} is not a regular expression: {error}") from error
        if setting is not None:
            _one_of(owner, f"overrides[{pattern!r}]", setting, tuple(SETTINGS))
    return overrides


class PackedConfig(QuantizationConfigMixin):
    r"""The fields that both methods share. Use `PcdvqConfig` or `CcqConfig`.

    Args:
        hadamard_block: largest block of the input rotation, a power of two from 8 to 1024; the block of a layer is
            the largest power of two that divides its number of inputs, at most this.
        hadamard_seed: seed of the rotation's signs.
        modules_to_not_convert: names, suffixes or regular expressions of modules to leave as they are, in addition to
            the defaults (output head, tied weights, modules that the model keeps in float32). After quantization it
            holds the resolved list.
        modules_to_convert: if given, only modules that match one of these are packed. A pattern that matches nothing,
            or a module that cannot be packed, is an error.
        calibration: what to calibrate on and how: a `Calibration`, a dictionary of its fields, or just its `dataset`.
            None rounds to the nearest codes. In a packed model it records how the model was made.
        tokenizer: for calibration while a model loads: a tokenizer, or a name or folder to load it from; None takes
            the one that lies beside the model. Not saved.
        overrides: other settings for some modules: from regular expressions, searched in the module's name, to the name of
            a setting (see `SETTINGS`), or to None, which leaves the modules as they are. The first that is found counts.
            `{r"layers\.[0-6]\.mlp\.experts": "stream-4.0", "self_attn": "int8"}`. config.json has a list of pairs.
        dequantize: when loading a packed model, decode it into ordinary dense layers.
        left_unpacked: set by the quantizer, not by the user: parameters that stayed as they were, with the reason.
        format_version: version of the packed format.

    Raises:
        ValueError: a field has a value that is not allowed, or is unknown.
    """

    method: str

    def __init__(
        self,
        *,
        hadamard_block: int,
        hadamard_seed: int,
        modules_to_not_convert: list[str] | None,
        modules_to_convert: list[str] | None,
        calibration: Calibration | dict[str, Any] | str | None,
        tokenizer: Any,
        overrides: dict[str, str | None] | list[list[str | None]] | None,
        dequantize: bool,
        left_unpacked: dict[str, str] | None,
        format_version: int,
        unknown: dict[str, Any],
    ):
        owner = type(self).__name__
        self._check_version(owner, format_version, unknown)
        if hadamard_block not in [1 << power for power in range(3, 11)]:
            raise ValueError(f"{owner}: hadamard_block must be a power of two from 8 to 1024, got {hadamard_block!r}")
        self.quant_method = self.method
        self.format_version = format_version
        self.hadamard_block = hadamard_block
        self.hadamard_seed = _integer(owner, "hadamard_seed", hadamard_seed, 0, 2**31 - 1)
        self.modules_to_not_convert = _names(owner, "modules_to_not_convert", modules_to_not_convert)
        self.modules_to_convert = _names(owner, "modules_to_convert", modules_to_convert)
        self.calibration = Calibration.of(calibration)
        self.tokenizer = tokenizer
        self.overrides = _overrides(owner, overrides)
        self.dequantize = _one_of(owner, "dequantize", dequantize, (False, True))
        self.left_unpacked = dict(left_unpacked) if left_unpacked else {}

    def _check_version(self, owner: str, format_version: Any, unknown: dict[str, Any]) -> None:
        _integer(owner, "format_version", format_version, 1, 1 << 30)
        # Transformers adds these keys to some saved configs; the method's name must still be ours.
        method = unknown.pop("quant_method", self.method)
        if method != self.method:
            raise ValueError(f"{owner}: quant_method must be {self.method!r}, got {method!r}")
        if format_version > FORMAT_VERSION:
            detail = f"; fields unknown here: {', '.join(sorted(unknown))}" if unknown else ""
            raise ValueError(
                f"{owner}: format_version {format_version} is newer than {FORMAT_VERSION}, the newest that this "
                f"hf_pcdvq reads{detail}. Upgrade it: pip install -U hf_pcdvq"
            )
        if unknown:
            raise ValueError(f"{owner}: unknown field {', '.join(map(repr, sorted(unknown)))}")

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """The codec that this config describes, for modules without an override."""

    def codec_of(self, module: str) -> Codec | None:
        """The codec of a module, by its name; None if it is to be left as it is."""
        for pattern, setting in self.overrides.items():
            if re.search(pattern, module):
                return None if setting is None else self._codec_of_setting(setting)
        return self.codec

    def _codec_of_setting(self, setting: str) -> Codec:
        kind, fields = SETTINGS[setting]
        if kind == "int8":
            return ScalarCodec(self.hadamard_block, self.hadamard_seed)
        rotation: dict[str, Any] = {"hadamard_block": self.hadamard_block, "hadamard_seed": self.hadamard_seed}
        return CONFIGS[kind](**fields, **rotation).codec

    @property
    def codecs(self) -> list[Codec]:
        """Every codec that modules may have."""
        settings = [setting for setting in self.overrides.values() if setting is not None]
        return [self.codec, *(self._codec_of_setting(setting) for setting in dict.fromkeys(settings))]

    def get_loading_attributes(self) -> dict[str, Any]:
        """Fields that a config given to `from_pretrained` may set for a model that is packed already."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean fields. `dequantize` and `tokenizer` are about this process, not about what is saved."""
        fields = {name: copy.deepcopy(value) for name, value in self.__dict__.items() if name not in _NOT_SAVED}
        fields["calibration"] = self.calibration.to_dict() if self.calibration else None
        # Their order counts, and Transformers sorts dictionaries when it saves them.
        fields["overrides"] = [list(pair) for pair in self.overrides.items()]
        return fields


class PcdvqConfig(PackedConfig):
    """Polar coordinate decoupled vector quantization (arXiv 2506.05432).

    Args:
        bits: 2.0 (2^14 directions, 4 magnitudes per 8 weights) or 2.25 (2^16 directions).
        magnitude: the paper's `"norm"` (default; better text after calibration) or the `"projection"` on the chosen
            direction (2 % less squared error of the weights).
        codebook: id of the shipped codebook; None takes the one for `bits`.
        codebook_sha256: set by the quantizer: hash of the codebook's contents, checked on load.

    The other fields are described in `PackedConfig`. The rotation is part of the method and always on.
    """

    method = "pcdvq"

    def __init__(
        self,
        bits: float = 2.25,
        magnitude: str = "norm",
        codebook: str | None = None,
        codebook_sha256: str | None = None,
        hadamard_block: int = 128,
        hadamard_seed: int = 0,
        modules_to_not_convert: list[str] | None = None,
        modules_to_convert: list[str] | None = None,
        calibration: Calibration | dict[str, Any] | str | None = None,
        tokenizer: Any = None,
        overrides: dict[str, str | None] | list[list[str | None]] | None = None,
        dequantize: bool = False,
        left_unpacked: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ):
        super().__init__(
            hadamard_block=hadamard_block,
            hadamard_seed=hadamard_seed,
            modules_to_not_convert=modules_to_not_convert,
            modules_to_convert=modules_to_convert,
            calibration=calibration,
            tokenizer=tokenizer,
            overrides=overrides,
            dequantize=dequantize,
            left_unpacked=left_unpacked,
            format_version=format_version,
            unknown=unknown,
        )
        self.bits = float(_one_of("PcdvqConfig", "bits", bits, tuple(CODEBOOKS)))
        self.magnitude = _one_of("PcdvqConfig", "magnitude", magnitude, ("norm", "projection"))
        self.codebook = CODEBOOKS[self.bits] if codebook is None else codebook
        self.codebook_sha256 = codebook_hash(self.codebook)
        if self.codec.bits != self.bits:
            raise ValueError(
                f"PcdvqConfig: codebook {self.codebook!r} is for {self.codec.bits} bits, but bits is {self.bits}"
            )
        if codebook_sha256 not in (None, self.codebook_sha256):
            raise ValueError(
                f"PcdvqConfig: the model was packed with a codebook {self.codebook!r} of SHA-256 {codebook_sha256}, "
                f"but the installed one has {self.codebook_sha256}; it would decode other weights"
            )

    @property
    def codec(self) -> PolarCodec:
        return PolarCodec(self.hadamard_block, self.hadamard_seed, self.codebook, self.magnitude)


class CcqConfig(PackedConfig):
    """Convolutional code quantization (arXiv 2507.07145): its published layouts, and `"stream"`.

    Args:
        layout: `"2.75"`, `"2.5"` or `"2.0625"`, published and named by bits per weight, or `"stream"`: ours, much better
            at the same bits (`codecs/stream.py`).
        hadamard: rotate the inputs (default; far better at these bits). False is the published form.
        bits: bits per weight. Only `"stream"` leaves a choice: 2.0 (default), 2.25, 2.5, 3.0 or 4.0.
        window: of `"stream"` only: bits per window, 12 (default) to 16. Each bit more takes over twice as long to encode,
            for about 1 % less squared error.

    The other fields are described in `PackedConfig`.
    """

    method = "ccq"

    def __init__(
        self,
        layout: str = "2.5",
        hadamard: bool = True,
        bits: float | None = None,
        window: int | None = None,
        hadamard_block: int = 128,
        hadamard_seed: int = 0,
        modules_to_not_convert: list[str] | None = None,
        modules_to_convert: list[str] | None = None,
        calibration: Calibration | dict[str, Any] | str | None = None,
        tokenizer: Any = None,
        overrides: dict[str, str | None] | list[list[str | None]] | None = None,
        dequantize: bool = False,
        left_unpacked: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ):
        super().__init__(
            hadamard_block=hadamard_block,
            hadamard_seed=hadamard_seed,
            modules_to_not_convert=modules_to_not_convert,
            modules_to_convert=modules_to_convert,
            calibration=calibration,
            tokenizer=tokenizer,
            overrides=overrides,
            dequantize=dequantize,
            left_unpacked=left_unpacked,
            format_version=format_version,
            unknown=unknown,
        )
        self.layout = _one_of("CcqConfig", "layout", layout, (*CCQ_LAYOUTS, "stream"))
        if layout == "stream":
            self.bits = float(_one_of("CcqConfig", "bits", 2.0 if bits is None else bits, STREAM_BITS))
            self.window = int(_one_of("CcqConfig", "window", 12 if window is None else window, STREAM_WINDOWS))
        else:
            for name, value, own in (("bits", bits, CCQ_LAYOUTS[layout].bits), ("window", window, None)):
                if value not in (None, own):
                    raise ValueError(f"CcqConfig: {name} {value!r} needs layout 'stream', the layout is {layout!r}")
            self.bits, self.window = CCQ_LAYOUTS[layout].bits, None
        self.hadamard = _one_of("CcqConfig", "hadamard", hadamard, (False, True))

    @property
    def codec(self) -> ConvolutionalCodec | StreamCodec:
        block = self.hadamard_block if self.hadamard else 0
        if self.layout == "stream":
            return StreamCodec(block, self.hadamard_seed, self.bits, self.window)
        return ConvolutionalCodec(block, self.hadamard_seed, self.layout)


# Settings by name: the method, and the fields of its config. "int8" is for overrides alone (`codecs/scalar.py`).
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"pcdvq-{bits}": ("pcdvq", {"bits": bits}) for bits in CODEBOOKS},
    **{f"ccq-{layout}": ("ccq", {"layout": layout}) for layout in CCQ_LAYOUTS},
    **{f"ccq-{layout}-published": ("ccq", {"layout": layout, "hadamard": False}) for layout in CCQ_LAYOUTS},
    **{f"stream-{bits}": ("ccq", {"layout": "stream", "bits": bits}) for bits in STREAM_BITS},
    "int8": ("int8", {}),
}

CONFIGS: dict[str, type[PackedConfig]] = {config.method: config for config in (PcdvqConfig, CcqConfig)}


def config_of_setting(setting: str, **fields: Any) -> PackedConfig:
    """The config of a named setting, with further fields.

    Raises:
        ValueError: there is no such setting, it is for overrides alone, or a field has a value that is not allowed.
    """
    names = tuple(name for name, (method, _) in SETTINGS.items() if method in CONFIGS)
    method, own = SETTINGS[_one_of("config", "setting", setting, names)]
    return CONFIGS[method](**own, **fields)
