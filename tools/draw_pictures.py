#!/usr/bin/env python3
"""Draw the two pictures of docs/how_it_works.md from the codecs themselves.

python tools/draw_pictures.py        # writes docs/images/polar.png and docs/images/windows.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from hf_pcdvq_kernels.reference.stream import values as stream_values
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from hf_pcdvq.codecs.codebook import load_codebook

OUT = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, ORANGE, GRAY = "#1f77b4", "#d95f02", "#777777"


def figure(width: float, height: float) -> Figure:
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def draw_polar(file: Path) -> None:
    """PCDVQ: direction and magnitude quantized separately, signs folded away, levels of the magnitude."""
    made = figure(14, 4.8)
    plane, folded, levels = made.subplots(1, 3)
    _directions(plane)
    _folding(folded)
    _levels(levels)
    made.savefig(file, dpi=110)


def _directions(axes: Axes) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 2, generator=generator)
    axes.scatter(*points.T, s=4, color=GRAY, alpha=0.35, label="vectors, rotated and scaled")
    angles = [math.pi / 8 * (number + 0.5) for number in range(16)]
    for radius in (0.7, 1.3, 1.9, 2.6):
        axes.add_patch(Circle((0, 0), radius, fill=False, color=BLUE, linewidth=0.4))
        axes.plot(
            [radius * math.cos(angle) for angle in angles],
            [radius * math.sin(angle) for angle in angles],
            "o",
            color=BLUE,
            markersize=3,
        )
    for angle in angles:
        axes.plot([0, 3 * math.cos(angle)], [0, 3 * math.sin(angle)], color=BLUE, linewidth=0.4)
    vector, code = (0.95, 1.9), (1.9 * math.cos(angles[2]), 1.9 * math.sin(angles[2]))
    for tip, color, label in ((vector, "black", "a vector v"), (code, ORANGE, "its code: nearest ray, nearest ring")):
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": color, "linewidth": 2})
        axes.plot([], [], color=color, label=label)
    axes.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), aspect="equal", xticks=[], yticks=[])
    axes.set_title("Direction and magnitude by themselves\n(drawn in 2 dimensions; the codec has 8)")
    axes.legend(loc="lower left", fontsize="small")


def _folding(axes: Axes) -> None:
    for angle in (math.radians(degrees) for degrees in (12, 35, 55, 78)):
        x, y = math.cos(angle), math.sin(angle)
        for across, up in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
            stored = across == up == 1
            style = {"color": ORANGE if stored else BLUE, "linewidth": 1, "alpha": 1 if stored else 0.5}
            axes.annotate("", (across * x, up * y), (0, 0), arrowprops={"arrowstyle": "->", **style})
    for color, label in ((ORANGE, "stored: patterns without a sign"), (BLUE, "the same, signs flipped")):
        axes.plot([], [], color=color, label=label)
    axes.axhline(0, color=GRAY, linewidth=0.5)
    axes.axvline(0, color=GRAY, linewidth=0.5)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.5, 1.2), aspect="equal", xticks=[], yticks=[])
    axes.set_title("Signs are bits, not table entries\n512 patterns × 2$^7$ signs = 2$^{16}$ directions out of 4 KiB")
    axes.legend(loc="lower center", fontsize="small")


def _levels(axes: Axes) -> None:
    length = torch.linspace(0, 6, 400)
    # Chi distribution with 8 degrees of freedom: lengths of normally distributed 8-vectors.
    density = length**7 * torch.exp(-(length**2) / 2) / (2**3 * math.gamma(4))
    axes.plot(length, density, color=GRAY, label="length of 8 normal numbers")
    book = load_codebook("pcdvq-a16-v1")
    for number, level in enumerate(sorted((book["levels_norm"] * 127).tolist())):
        axes.axvline(level, color=ORANGE, label="the 4 levels of the codebook" if number == 0 else None)
        axes.text(level + 0.05, 0.62, f"{level:.2f}", color=ORANGE, fontsize="small")
    axes.set(xlabel="magnitude |v|", ylabel="density", ylim=(0, 0.68), xlim=(0, 6))
    axes.set_title("2 bits are enough for the magnitude\n(Lloyd–Max levels)")
    axes.legend(loc="center right", fontsize="small")


def draw_windows(file: Path) -> None:
    """CCQ: overlapping windows in a word, windows over a ring, and the values that a hash maps them to."""
    made = figure(14, 7.5)
    grid = made.add_gridspec(2, 2, width_ratios=(1.7, 1), height_ratios=(1, 1.5))
    upper, lower, values = (made.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    _word(upper)
    _ring(lower)
    _values(values)
    made.savefig(file, dpi=110)


def _bits(axes: Axes, count: int, seed: int) -> None:
    bits = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    for place, bit in enumerate(bits):
        box = FancyBboxPatch((place + 0.06, 0.05), 0.88, 0.9, boxstyle="square,pad=0", fill=False)
        axes.add_patch(box)
        axes.text(place + 0.5, 0.5, bit, ha="center", va="center", family="monospace")


def _window(axes: Axes, start: float, length: int, row: int, label: str, color: str = BLUE) -> None:
    low = -0.55 - 0.62 * row
    place = (start + 0.08, low)
    axes.add_patch(FancyBboxPatch(place, length - 0.16, 0.42, boxstyle="round,pad=0.02", color=color, alpha=0.35))
    axes.text(start + length / 2, low + 0.21, label, ha="center", va="center", fontsize="small")


def _word(axes: Axes) -> None:
    _bits(axes, 16, 1)
    for number, shift in enumerate((13, 11, 9, 6, 4, 2, 0)):
        _window(axes, 16 - 3 - shift, 3, number % 3, f"weight {number} = window − 4")
    axes.set(xlim=(-0.3, 16.3), ylim=(-2.0, 1.1))
    axes.set_title("CCQ 2.5: seven weights in a word of 16 bits, as overlapping windows of 3; shift, mask, subtract")
    axes.axis("off")


def _ring(axes: Axes) -> None:
    count, length = 24, 12
    _bits(axes, count, 2)
    for number in range(6):
        start = 2 * number
        _window(axes, start, length, number, f"weight {number + 5}: 12 bits, 2 of them new")
        _window(axes, start + length - 2, 2, number, "", ORANGE)
    axes.text(count + 0.2, 0.5, "…", va="center")
    axes.set(xlim=(-0.3, count + 0.8), ylim=(-4.3, 1.1))
    axes.set_title("CCQ stream: windows of 12 bits over a ring of 256 weights; after the last bit comes the first")
    axes.axis("off")


def _values(axes: Axes) -> None:
    values = stream_values(12, torch.device("cpu")).float()
    axes.hist(values.tolist(), bins=60, density=True, color=BLUE, alpha=0.5, label="values of all 4096 windows")
    spread = values.std().item()
    places = torch.linspace(-512, 512, 300)
    normal = torch.exp(-(places**2) / (2 * spread**2)) / (spread * math.sqrt(2 * math.pi))
    axes.plot(places, normal, color=ORANGE, label=f"normal, standard deviation {spread:.0f}")
    axes.set(xlabel="sum of the bytes of window × 0x8A7050F1", yticks=[])
    axes.set_title("A hash makes the values near to normal")
    axes.legend(loc="upper right", fontsize="x-small")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    draw_polar(OUT / "polar.png")
    draw_windows(OUT / "windows.png")
    print(f"wrote {OUT / 'polar.png'} and {OUT / 'windows.png'}")


if __name__ == "__main__":
    main()
