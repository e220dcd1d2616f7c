"""Packed tensors of random bits, and the ops that read them."""

import torch
from hf_pcdvq_kernels.formats import stream_layout

SETTINGS = ["pcdvq 2.0", "pcdvq 2.25", "ccq 2.75", "ccq 2.5", "ccq 2.0625", "stream 2.0", "stream 2.25", "stream 3.0"]


def random_packed(setting, rows, columns, seed=0):
    """Packed tensors of random bits: every bit pattern is a valid code."""
    generator = torch.Generator().manual_seed(seed)

    def bits(dtype, *shape):
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)

    def positive(*shape):
        return torch.rand(shape, generator=generator) + 0.1

    method, layout = setting.split()
    if method == "stream":
        words = stream_layout(float(layout), 14).words(rows)
        return [bits(torch.int32, words, columns), positive(rows) / 148, float(layout), 14]
    if method == "pcdvq":
        split = layout == "2.25"
        patterns = torch.randint(0, 100, (512 if split else 128, 8), generator=generator).to(torch.int8)
        magnitude = bits(torch.uint8, rows, columns // 32) if split else None
        return [bits(torch.int16, rows, columns // 8), magnitude, positive(rows), patterns, positive(4) / 127]
    if layout == "2.0625":
        local = bits(torch.uint8, rows, (columns // 64 + 1) // 2)
        code = positive(rows) * 100, positive(rows) * 50
        return [bits(torch.uint8, rows, columns // 4), positive(rows), local, *code, layout]
    words = (torch.uint8, 22) if layout == "2.75" else (torch.int16, 10)
    return [bits(words[0], rows, columns // 64 * words[1]), positive(rows) / 100, None, None, None, layout]


def op_pair(setting):
    method = setting.split()[0]
    return getattr(torch.ops.hf_pcdvq_kernels, f"{method}_dequantize"), getattr(
        torch.ops.hf_pcdvq_kernels, f"{method}_matmul"
    )


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()
