"""The bytes of an allocation: what every group takes at every setting, and what the model may take."""

from __future__ import annotations

from torch import nn

from ..codecs import Codec
from ..config import PackedConfig
from ..modules import dense_weights
from .filesize import file_bytes
from .groups import Group
from .patterns import patterns_of
from .rates import fits, own_settings, packed_bytes, shared_settings

Choice = dict[str, str]  # the name of a setting, by that of a group


class Budget:
    """The settings to choose from, and their bytes in a model.

    Args:
        model: dense.
        prefix: name of its list of decoder blocks.
        names: the modules to pack. Those that are in no group get the uniform setting, or what an override says.
        groups: what settings are chosen for.
        config: with a target.

    Attributes:
        settings: to choose from, by increasing bits: the method's own, and if these do not reach the target, those that
            belong to no method.
        smallest: the first of them.
        base: the uniform setting: the largest of the method's own that the whole model can have within the target.
        ceiling: the most bytes that `total` may be.
        weights: number of all weights to pack.

    Raises:
        ValueError: the target is below the smallest settings or above the largest, or there are no groups.
    """

    def __init__(self, model: nn.Module, prefix: str, names: list[str], groups: list[Group], config: PackedConfig):
        if not groups:
            raise ValueError(
                f"{type(model).__name__} has no layers to choose bits for: overrides match them all, or none is in a "
                "decoder block"
            )
        self._model, self._prefix, self._names, self._groups, self._config = model, prefix, names, groups, config
        self._modules = {name: model.get_submodule(name) for name in names}
        self._in_group = {name for group in groups for name in group.modules}
        self.weights = sum(
            weight.numel() for module in self._modules.values() for weight in dense_weights(module).values()
        )
        own = own_settings(config)
        self.settings: dict[str, Codec] = {**own, **shared_settings(config)}
        self.smallest, largest = list(own)[0], list(own)[-1]
        size, bits = config.target.size, config.target.bits
        self.ceiling = int(bits * self.weights / 8) if size is None else size
        self._check_range()
        if self.total(self.uniform(largest)) >= self.ceiling:
            self.settings = own
        self.base = [name for name in own if self.total(self.uniform(name)) <= self.ceiling][-1]

    def total(self, config: PackedConfig) -> int:
        """What counts: bytes of the packed layers, or if the target is a size, of the whole file."""
        if self._config.target.size is not None:
            return file_bytes(self._model, self._names, config)
        return self.packed(config)

    def packed(self, config: PackedConfig) -> int:
        """Bytes of all packed layers."""
        return sum(packed_bytes(config.codec_of(name), module) for name, module in self._modules.items())

    def allowed(self, group: Group) -> list[str]:
        """The settings that all modules of a group can have."""
        return [
            name
            for name, codec in self.settings.items()
            if name == self.smallest or all(fits(codec, self._modules[module]) for module in group.modules)
        ]

    def nbytes(self, group: Group, setting: str) -> int:
        """Bytes of a group at a setting."""
        return sum(packed_bytes(self.settings[setting], self._modules[name]) for name in group.modules)

    def uniform(self, setting: str) -> PackedConfig:
        """The config with one setting for the whole model; modules that cannot have it get the smallest."""
        return self.chosen(setting, {group.name: self.uniform_setting(group, setting) for group in self._groups})

    def uniform_setting(self, group: Group, setting: str) -> str:
        return setting if setting in self.allowed(group) else self.smallest

    def chosen(self, base: str, choice: Choice) -> PackedConfig:
        """The config with these settings: what the user's overrides match stays as it is."""
        names: dict[str, list[str]] = {}
        for group in self._groups:
            if choice[group.name] != base:
                names.setdefault(choice[group.name], []).extend(group.modules)
        overrides = dict(self._config.overrides)
        for setting, modules in names.items():
            overrides.update(dict.fromkeys(patterns_of(modules, self._prefix), setting))
        for name, module in self._modules.items():  # outside the blocks
            if name not in self._in_group and not self._config.overridden(name) and not self._can_have(module, base):
                overrides[rf"^{name}$".replace(".", r"\.")] = self.smallest
        return self._config.settled(base, overrides)

    def _can_have(self, module: nn.Module, setting: str) -> bool:
        return setting == self.smallest or fits(self.settings[setting], module)

    def _check_range(self) -> None:
        low, high = self.total(self.uniform(self.smallest)), self.total(self._largest())
        if low <= self.ceiling <= high:
            return
        target = self._config.target
        if target.size is None:
            wanted = f"target_bits {target.bits:g}"
            span = f"{8 * low / self.weights:.4f} to {8 * high / self.weights:.4f} bits per packed weight"
        else:
            wanted, span = f"target_size {target.size:,}", f"{low:,} to {high:,} bytes"
        raise ValueError(
            f"{wanted} is out of range: {type(self._model).__name__} can take {span}, from {self.smallest} to "
            f"{list(self.settings)[-1]}"
        )

    def _largest(self) -> PackedConfig:
        """Every group at the largest setting that it can have."""
        return self.chosen(self.smallest, {group.name: self.allowed(group)[-1] for group in self._groups})
