"""Which weights of the files a layer of vLLM consists of. Does not import vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .coding import Coding


def packed_as(
    layer: str, codings: Mapping[str, Coding], merged: Mapping[str, Sequence[str]]
) -> tuple[Coding, int] | None:
    """How the weights of a layer are packed, and how many of them the files hold; None if they are not packed.

    Args:
        layer: name of the layer.
        codings: of the packed modules, by name.
        merged: vLLM's `packed_modules_mapping`: for the last part of the names of merged layers, those of what they merge.

    Raises:
        ValueError: some of its weights are packed and some are not, or they have different codecs.
    """
    if layer in codings:
        return codings[layer], 1
    parent, _, last = layer.rpartition(".")
    names = [f"{parent}.{name}" if parent else name for name in merged.get(last, ())]
    found = [codings.get(name) for name in names]
    if not any(found):
        return None
    if any(coding != found[0] for coding in found):
        described = ", ".join(
            f"{name}: {coding.format if coding else 'not packed'}" for name, coding in zip(names, found)
        )
        raise ValueError(
            f"{layer}: vLLM merges weights that are packed in different ways ({described}); quantize the model with the "
            "same setting for them"
        )
    return found[0], len(found)
