"""Names of the same module in different classes: `layers.0.mlp` in a base model is `model.layers.0.mlp` in one with a head."""

from __future__ import annotations

from collections.abc import Iterable


def matched_names(stored: Iterable[str], known: Iterable[str], base_prefix: str = "") -> dict[str, str]:
    """Find stored modules among the modules of a model.

    A name is looked for as it is, then with `base_prefix` added or removed, then as the end of another name or with
    another name as its end, at the dots.

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
        prefixed = (name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}."))
        candidates = [spelling for spelling in prefixed if spelling in known][:1]
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
