"""`PcdvqConfig` and `CcqConfig`: what a user asks for, and what a packed model's config.json records.

Every field is validated on construction. Both are JSON-serializable and carry `format_version`; a config written by a
newer version is rejected with an error that names the version, rather than read without its unknown fields.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from typing import Any, ClassVar, Self

from hf_pcdvq_kernels.formats.stream import STREAM_BITS
from transformers.utils.quantization_config import QuantizationConfigMixin

from .allocation.target import AUTO, Target
from .calibration.settings import Calibration
from .codecs import SETTINGS, Codec, codec_of_setting
from .codecs.base import one_of
from .codecs.codebook import codebook_hash
from .config_fields import integer, named, names, overrides_of, reasons, setting_or_none
from .version import FORMAT_VERSION, INSTALL

# What concerns the process that quantizes or loads, and never stands in a file.
_NOT_SAVED = ("dequantize", "tokenizer", "_named")
# What bits="auto" is to reach; settled before anything is quantized.
_TARGETS = ("target_bits", "target_size")
# What a config.json holds only where it is asked for.
_OPTIONAL = (*_TARGETS, "embeddings", "head")
# What records how a model was made: decoding does not depend on it.
_RECORDS = ("calibration", "left_unpacked", "modules_to_convert", "modules_to_not_convert")


def _codecs_by(field: str, method: str) -> dict[Any, type[Codec]]:
    """The codecs of a method, by the field of its config that tells them apart.

    Raises:
        ValueError: two codecs claim the same value.
    """
    found: dict[Any, type[Codec]] = {}
    for codec, fields in SETTINGS.values():
        if codec.method == method and found.setdefault(fields[field], codec) is not codec:
            raise ValueError(f"{field} {fields[field]!r} is claimed by two codecs of {method!r}")
    return found


class PackedConfig(QuantizationConfigMixin):
    r"""The fields common to both methods. Use `PcdvqConfig` or `CcqConfig`.

    Args:
        hadamard_block: largest block of the input rotation, a power of two from 8 to 1024; the block of a layer is
            the largest power of two that divides its number of inputs, at most this.
        hadamard_seed: seed of the rotation's signs.
        modules_to_not_convert: names, suffixes or regular expressions of modules not to pack, in addition to the
            defaults (output head, tied weights, modules that the model keeps in float32). After quantization it holds
            the resolved list.
        modules_to_convert: if given, only modules that match one of these are packed. A pattern that matches nothing,
            or a module that cannot be packed, is an error.
        calibration: what to calibrate on and how: a `Calibration`, a dictionary of its fields, or just its `dataset`.
            None rounds to the nearest codes. In a packed model it records how the model was made.
        tokenizer: for calibration while loading a model: a tokenizer, or a name or folder to load it from; None takes
            the model's own. Not saved.
        target_bits, target_size: with `bits="auto"`, one of them: bits per packed weight, or the size of the whole
            safetensors file, in bytes or as `"1.2GB"`, that an allocation of different bits to different layers must not
            exceed (docs/mixed_bits.md). It needs calibration, and settles `bits` and `overrides`.
        overrides: other settings for some modules: maps regular expressions, searched for in the module's name, to
            the name of a setting (see `SETTINGS`), or to None, which leaves the modules unpacked. The first match
            applies. `{r"layers\.[0-6]\.mlp\.experts": "stream-4.0", "self_attn": "int8"}`. Used when a model is
            quantized. config.json keeps a list of pairs as a record; what a packed module holds, its file says.
        embeddings: the setting of the token embeddings, `"int8"` mostly; None leaves them as they are. Their rows are decoded
            one by one, so that it must be one whose rows do not depend on each other: none of `stream`.
        head: the setting of the output head, `"int8"` mostly; None leaves it as it is. Where the model ties the head to the
            embeddings they are one tensor: either field then packs both. Neither is calibrated.
        dequantize: when loading a packed model, decode it into ordinary dense layers.
        left_unpacked: set by the quantizer, not by the user: parameters that were not packed, with the reason.
        format_version: version of the packed format.

    Raises:
        ValueError: a field is unknown or has an invalid value.
    """

    method: ClassVar[str]
    paper: ClassVar[str]  # URL of the paper that introduced the method
    format_fields: ClassVar[tuple[str, ...]]  # the fields that determine the format

    def __init__(
        self,
        *,
        hadamard_block: int = 128,
        hadamard_seed: int = 0,
        modules_to_not_convert: list[str] | None = None,
        modules_to_convert: list[str] | None = None,
        calibration: Calibration | dict[str, Any] | str | None = None,
        tokenizer: Any = None,
        target_bits: float | None = None,
        target_size: int | str | None = None,
        overrides: dict[str, str | None] | list[list[str | None]] | None = None,
        embeddings: str | None = None,
        head: str | None = None,
        dequantize: bool = False,
        left_unpacked: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ):
        self.quant_method = self.method
        with named(type(self).__name__):
            self._check_version(format_version, unknown)
            if type(hadamard_block) is not int or hadamard_block not in [1 << power for power in range(3, 11)]:
                raise ValueError(f"hadamard_block must be a power of two from 8 to 1024, got {hadamard_block!r}")
            self.hadamard_seed = integer("hadamard_seed", hadamard_seed, 0, 2**31 - 1)
            self.modules_to_not_convert = names("modules_to_not_convert", modules_to_not_convert)
            self.modules_to_convert = names("modules_to_convert", modules_to_convert)
            self.calibration = Calibration.of(calibration)
            Target.of(target_bits, target_size)
            self.overrides = overrides_of(overrides)
            self.embeddings, self.head = setting_or_none("embeddings", embeddings), setting_or_none("head", head)
            self.dequantize = one_of("dequantize", dequantize, (False, True))
            self.left_unpacked = reasons(left_unpacked)
        self.format_version = format_version
        self.hadamard_block = hadamard_block
        self.tokenizer = tokenizer
        self.target_bits, self.target_size = target_bits, target_size
        # Names of the embeddings and the head in the model that is quantized, with their settings.
        self._named: dict[str, str] = {}

    def _check_version(self, format_version: Any, unknown: dict[str, Any]) -> None:
        integer("format_version", format_version, 1, 1 << 30)
        # Transformers adds these keys to some saved configs; the method's name must still be ours.
        method = unknown.pop("quant_method", self.method)
        if method != self.method:
            raise ValueError(f"quant_method must be {self.method!r}, got {method!r}")
        if format_version > FORMAT_VERSION:
            detail = f"; fields unknown here: {', '.join(sorted(unknown))}" if unknown else ""
            raise ValueError(
                f"format_version {format_version} is newer than {FORMAT_VERSION}, the newest that this "
                f"hf_pcdvq reads{detail}. Get a newer one: {INSTALL}, once that is updated"
            )
        if unknown:
            raise ValueError(f"unknown field {', '.join(map(repr, sorted(unknown)))}")

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """The codec that this config describes, for modules without an override; with `bits="auto"` the smallest."""

    @property
    def target(self) -> Target | None:
        """What an allocation of bits is to reach; None unless `bits="auto"`."""
        return Target.of(self.target_bits, self.target_size)

    def settled(self, setting: str, overrides: dict[str, str | None]) -> Self:
        """A copy with a named setting of the same method and with these overrides, in place of `bits="auto"`."""
        fields = {**vars(self), **SETTINGS[setting][1], "overrides": overrides, **dict.fromkeys(_TARGETS)}
        named_modules = fields.pop("_named")
        settled = type(self)(**fields)
        settled._named = named_modules
        return settled

    def name_vocabulary(self, settings: dict[str, str]) -> None:
        """Say which modules of a model are its embeddings and its head, by name, with the settings that they get."""
        self._named = settings

    def _check_target(self, bits: Any) -> None:
        """Refuse `bits="auto"` without a target, and a target without it."""
        if (bits == AUTO) == (self.target is None):
            raise ValueError(
                f'bits="{AUTO}" needs target_bits or target_size, and they need bits="{AUTO}": got bits {bits!r}, target_bits '
                f"{self.target_bits!r}, target_size {self.target_size!r}"
            )

    def overridden(self, module: str) -> bool:
        """Whether a module, by its name, gets a setting of its own."""
        return module in self._named or any(re.search(pattern, module) for pattern in self.overrides)

    def codec_of(self, module: str) -> Codec | None:
        """The codec that a module gets when it is quantized, by its name; None if it is not to be packed."""
        if module in self._named:
            return self.codec_with_setting(self._named[module])
        for pattern, setting in self.overrides.items():
            if re.search(pattern, module):
                return None if setting is None else self.codec_with_setting(setting)
        return self.codec

    def codec_with_setting(self, setting: str) -> Codec:
        """The codec of a named setting, with this config's rotation and, in its own format's family, its details."""
        details = self._details() if SETTINGS[setting][0] is type(self.codec) else {}
        return codec_of_setting(setting, self.hadamard_block, self.hadamard_seed, **details)

    @abstractmethod
    def _details(self) -> dict[str, Any]:
        """The fields of the codec that all of its settings share."""

    def describe(self) -> str:
        """The name of the setting and its details: `"stream-2.0, windows of 14 bits"`."""
        if self.target is not None:
            return f"{self.method}, bits by layer for {self.target}"
        described = ", ".join([self.codec.format, *self.codec.details(), *self._vocabulary()])
        return f"{described}, other settings for some layers" if self.overrides else described

    def _vocabulary(self) -> list[str]:
        """The settings of the embeddings and of the head, in words."""
        parts = {"embeddings": self.embeddings, "output head": self.head}
        return [f"{part} in {setting}" for part, setting in parts.items() if setting is not None]

    def get_loading_attributes(self) -> dict[str, Any]:
        """Fields that a config passed to `from_pretrained` may set for a model that is already packed."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-serializable. `dequantize` and `tokenizer` concern this process only and are not saved."""
        fields = {name: copy.deepcopy(value) for name, value in self.__dict__.items() if name not in _NOT_SAVED}
        for name in _OPTIONAL:
            if fields[name] is None:
                del fields[name]
        fields["calibration"] = self.calibration.to_dict() if self.calibration else None
        # Their order matters, and Transformers sorts dictionaries when saving them.
        fields["overrides"] = [list(pair) for pair in self.overrides.items()]
        return fields

    def decoding_fields(self) -> dict[str, Any]:
        """The saved fields without records of how the model was made. Files of weights hold a copy."""
        return {name: value for name, value in self.to_dict().items() if name not in _RECORDS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a config.json holds.

        Raises:
            ValueError: a field is unknown or has an invalid value, or it is `dequantize`, which only a caller may set.
        """
        if config_dict.get("dequantize"):  # it multiplies the memory that loading takes
            raise ValueError(
                f"{cls.__name__}: dequantize is for callers and may not stand in config.json: remove it there, and pass "
                f"quantization_config={cls.__name__}(dequantize=True) to from_pretrained"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


class PcdvqConfig(PackedConfig):
    """Polar coordinate decoupled vector quantization (arXiv 2506.05432).

    Args:
        bits: 2.0 (2^14 directions, 4 magnitudes per 8 weights), 2.25 (2^16 directions), or `"auto"`, see `target_bits`.
        magnitude: the paper's `"norm"` (default; better text after calibration) or the `"projection"` onto the chosen
            direction (2 % less squared error of the weights).
        codebook: id of the shipped codebook; None takes the one for `bits`.
        codebook_sha256: set by the quantizer: hash of the codebook's contents, checked on load.

    The other fields are described in `PackedConfig`. The rotation is part of the method and always on.
    """

    method = "pcdvq"
    paper = "https://arxiv.org/abs/2506.05432"
    format_fields = ("bits",)

    def __init__(
        self,
        bits: float | str = 2.25,
        magnitude: str = "norm",
        codebook: str | None = None,
        codebook_sha256: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        with named("PcdvqConfig"):
            self._check_target(bits)
            codec = self._codec_with(bits, magnitude, codebook)
            if bits == AUTO and codebook is not None:
                raise ValueError(f"codebook {codebook!r} is for one number of bits, but bits is {bits!r}")
            self.codebook_sha256 = None if bits == AUTO else codebook_hash(codec.codebook)
        self.magnitude = codec.magnitude
        self.bits: float | str = AUTO if bits == AUTO else codec.bits
        self.codebook: str | None = None if bits == AUTO else codec.codebook
        if codebook_sha256 not in (None, self.codebook_sha256):
            raise ValueError(
                f"PcdvqConfig: the model was packed with a codebook {self.codebook!r} of SHA-256 {codebook_sha256}, "
                f"but the installed one has {self.codebook_sha256}; it would decode to different weights"
            )

    def _codec_with(self, bits: float | str, magnitude: str, codebook: str | None) -> Any:
        codecs = _codecs_by("bits", self.method)
        bits = min(codecs) if bits == AUTO else bits
        fields = {"bits": bits, "magnitude": magnitude, "codebook": codebook}
        return codecs[one_of("bits", bits, tuple(codecs))].of(self.hadamard_block, self.hadamard_seed, **fields)

    @property
    def codec(self) -> Codec:
        return self._codec_with(self.bits, self.magnitude, self.codebook)

    def _details(self) -> dict[str, Any]:
        return {"magnitude": self.magnitude}


class CcqConfig(PackedConfig):
    """Convolutional code quantization (arXiv 2507.07145): its published layouts, and `"stream"`.

    Args:
        layout: `"2.75"`, `"2.5"` or `"2.0625"`, the published layouts, named by bits per weight, or `"stream"`: ours,
            much better at the same bits (`codecs/stream.py`).
        hadamard: rotate the inputs (default; far better at these bits). False is the published form.
        bits: bits per weight. A choice for `"stream"` only: 2.0 (default), 2.25, 2.5, 3.0, 4.0, or `"auto"`, see
            `target_bits`.
        window_bits: for `"stream"` only: 12 (default) to 16. Each additional bit more than doubles the encoding time,
            for about 1 % less squared error.

    The other fields are described in `PackedConfig`.
    """

    method = "ccq"
    paper = "https://arxiv.org/abs/2507.07145"
    format_fields = ("bits", "layout")

    def __init__(
        self,
        layout: str = "2.5",
        hadamard: bool = True,
        bits: float | str | None = None,
        window_bits: int | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        with named("CcqConfig"):
            self.layout = one_of("layout", layout, tuple(_codecs_by("layout", self.method)))
            self.hadamard = one_of("hadamard", hadamard, (False, True))
            self._check_target(bits)
            if bits == AUTO and not (layout == "stream" and hadamard):
                raise ValueError(
                    f'bits="{AUTO}" chooses among the rates of layout "stream" with its rotation: got layout {layout!r}, '
                    f"hadamard {hadamard!r}"
                )
            codec = self._codec_with(bits, window_bits)
        self.bits: float | str = AUTO if bits == AUTO else codec.bits
        self.window_bits = codec.parameters().get("window_bits")

    def _codec_with(self, bits: float | str | None, window_bits: int | None) -> Codec:
        bits = min(STREAM_BITS) if bits == AUTO else bits
        block = self.hadamard_block if self.hadamard else 0
        fields = {"layout": self.layout, "bits": bits, "window_bits": window_bits}
        return _codecs_by("layout", self.method)[self.layout].of(block, self.hadamard_seed, **fields)

    @property
    def codec(self) -> Codec:
        return self._codec_with(self.bits, self.window_bits)

    def _details(self) -> dict[str, Any]:
        return {} if self.window_bits is None else {"window_bits": self.window_bits}


CONFIGS: dict[str, type[PackedConfig]] = {config.method: config for config in (PcdvqConfig, CcqConfig)}


def config_of_setting(setting: str, **fields: Any) -> PackedConfig:
    """The config of a named setting, with further fields.

    Raises:
        ValueError: the setting is unknown or available in overrides only, or a field has an invalid value.
    """
    names = tuple(name for name, (codec, _) in SETTINGS.items() if codec.method in CONFIGS)
    with named("config"):
        codec, own = SETTINGS[one_of("setting", setting, names)]
    return CONFIGS[codec.method](**{**own, **fields})
