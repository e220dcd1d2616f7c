"""Names of the same module in different classes, and in files.

`layers.0.mlp` in a base model is `model.layers.0.mlp` in one with a head, and `model.language_model.layers.0.mlp` in one
that reads images too. Some classes open and save the files of another one: Transformers renames what they read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key


def name_in_files(model: nn.Module, module: str) -> str:
    """The name under which `save_pretrained` writes a packed module of this model."""
    conversions = getattr(model, "_weight_conversions", None) or []
    return _renamed(
        module, [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, PrefixChange)]
    )


def renaming_of(model: nn.Module) -> Callable[[str], str]:
    """What gives a module in the files that a model is loaded from the name that Transformers looks for in that model."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return lambda module: _renamed(module, renamings)


def _renamed(module: str, renamings: list[WeightRenaming]) -> str:
    # They are patterns for parameters.
    return rename_source_key(f"{module}.weight", renamings, [])[0].removesuffix(".weight")


def matched_names(
    stored: Iterable[str], known: Iterable[str], base_prefix: str = "", rename: Callable[[str], str] = str
) -> dict[str, str]:
    """Find stored modules among the modules of a model.

    A name is looked for as `rename` makes it, then as it is, both also with `base_prefix` added or removed, then as the
    end of another name or with another name as its end, at the dots.

    Returns:
        Stored names by the names that are known; a stored name that nothing matches is left out.

    Raises:
        ValueError: a stored name matches several modules, or several stored names match one.
    """
    known = dict.fromkeys(known)
    by_end: dict[str, list[str]] = {}
    for name in known:
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    found: dict[str, str] = {}
    for name in stored:
        spellings = (
            spelling
            for spelled in (rename(name), name)
            for spelling in (spelled, f"{base_prefix}.{spelled}", spelled.removeprefix(f"{base_prefix}."))
        )
        candidates = [spelling for spelling in spellings if spelling in known][:1]
        candidates = candidates or by_end.get(name, []) or [end for end in _ends(name) if end in known]
        if len(candidates) > 1:
            raise ValueError(
                f"the file's {name} may be {' or '.join(candidates[:4])} of this model; open the file with the class that "
                "saved it"
            )
        for module in candidates:
            if module in found:
                raise ValueError(f"the file's {found[module]} and {name} may both be {module} of this model")
            found[module] = name
    return found


def _ends(name: str) -> list[str]:
    """`a.b.c` -> `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
