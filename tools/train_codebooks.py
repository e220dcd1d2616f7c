#!/usr/bin/env python3
"""Train the PCDVQ codebooks and write them as the data files that the wheel contains.

Directions: spherical k-means on normally distributed 8-vectors in the folded domain (absolute values; where an odd
number of signs is negative, the coordinate with the smallest |v_j| p_j is negated). Magnitudes: Lloyd-Max on the norms
and on the projections. The published files are part of the format: run this only to create a codebook with a new id.

    python tools/train_codebooks.py --out codebooks                 # about 3 minutes on 2 cores
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hf_pcdvq_kernels.constants import codebook_digest
from safetensors.torch import save_file
from tqdm import trange

from hf_pcdvq.codecs.directions import nearest_direction
from hf_pcdvq.codecs.polar import VECTOR, nearest_level

NORM = 127


def folded_kmeans(count: int, samples: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """`count` non-negative unit patterns, float32 `[count, 8]`; every step draws fresh samples to avoid overfitting."""
    patterns = torch.randn(count, VECTOR, generator=generator).abs()
    patterns /= patterns.norm(dim=1, keepdim=True)
    progress = trange(steps, desc=f"{count} patterns")
    for step in progress:
        # Few samples are enough while the patterns still move; the last third of the steps uses all of them.
        vectors = torch.randn(
            max(samples // 8, min(samples, samples * 3 * step // (2 * steps))), VECTOR, generator=generator
        )
        vectors /= vectors.norm(dim=1, keepdim=True)
        index, _, cosine = nearest_direction(vectors, patterns)
        folded = vectors.abs()
        odd = (vectors < 0).sum(1) % 2 == 1
        position = (folded * patterns[index]).argmin(1)
        folded[odd, position[odd]] *= -1
        sums = torch.zeros(count, VECTOR, dtype=torch.float64).index_add_(0, index.long(), folded.double())
        sums.clamp_(min=0)
        patterns = (sums / sums.norm(dim=1, keepdim=True)).float()
        if not torch.isfinite(patterns).all():
            raise RuntimeError("a pattern attracted no sample; raise --samples")
        progress.set_postfix(cosine=f"{cosine.mean():.6f}")
    return patterns


def lloyd_max(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` ascending levels that minimize the squared error over `values`."""
    levels = torch.quantile(values[: 1 << 20], (torch.arange(count) + 0.5) / count)
    for _ in range(500):
        index = nearest_level(values, levels).long()
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values.double())
        levels = (sums / torch.bincount(index, minlength=count)).float()
    return levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data files")
    parser.add_argument(
        "--samples", type=int, default=1 << 19, help="vectors in the last steps (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="k-means steps (default: %(default)s)")
    parser.add_argument(
        "--restarts",
        type=int,
        default=2,
        help="number of trainings, of which the best is kept (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    for name, count in (("pcdvq-a14-v1", 128), ("pcdvq-a16-v1", 512)):
        generator = torch.Generator().manual_seed(arguments.seed)
        vectors = torch.randn(4 * arguments.samples, VECTOR, generator=generator)
        trained = []
        for _ in range(arguments.restarts):
            unit = folded_kmeans(count, arguments.samples, arguments.steps, generator)
            patterns = (unit * NORM).round().to(torch.int8)
            rounded = patterns.float() / patterns.float().norm(dim=1, keepdim=True)
            _, _, projection = nearest_direction(vectors, rounded)
            trained.append((projection.square().mean().item(), patterns, projection))
        _, patterns, projection = max(trained, key=lambda entry: entry[0])
        tensors = {
            "patterns": patterns,
            "levels_norm": lloyd_max(vectors.norm(dim=1), 4) / NORM,
            "levels_projection": lloyd_max(projection, 4) / NORM,
        }
        save_file(tensors, arguments.out / f"{name}.safetensors", metadata={"id": name, "seed": str(arguments.seed)})
        print(f"{name}  sha256 {codebook_digest(tensors)}")


if __name__ == "__main__":
    main()
