"""llama.cpp beside our models, for benchmarks/bench_cpu.py: a GGUF file of random blocks, run in another environment."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig

PACKAGE = "ik-llama-cpp-python"  # the one with wheels for current CPUs
TYPES = {
    "Q2_K": GGMLQuantizationType.Q2_K,
    "IQ2_XXS": GGMLQuantizationType.IQ2_XXS,
    "IQ2_S": GGMLQuantizationType.IQ2_S,
}
HEAD = GGMLQuantizationType.Q6_K  # as llama.cpp's own two-bit files have it
# Where the float16 scales of a block are; all else may have any bits.
SCALES = {"Q2_K": (80, 82), "IQ2_XXS": (0,), "IQ2_S": (0,), "Q6_K": (208,)}
# The layers of a block: name in the file, outputs, inputs, as attributes of the sizes below.
LAYERS = (
    ("attn_q", "hidden", "hidden"),
    ("attn_k", "keys", "hidden"),
    ("attn_v", "keys", "hidden"),
    ("attn_output", "hidden", "hidden"),
    ("ffn_gate", "inner", "hidden"),
    ("ffn_up", "inner", "hidden"),
    ("ffn_down", "hidden", "inner"),
)


def environment(work: Path) -> Path:
    """The Python of an environment with llama.cpp, which is created if it does not exist.

    Raises:
        subprocess.CalledProcessError: there is no wheel for this platform.
    """
    folder = work / "llama-environment"
    stamp, python = folder / ".installed", folder / "bin" / "python"
    if not stamp.is_file():
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", PACKAGE]
        subprocess.run(install, check=True)
        stamp.touch()
    return python


def random_blocks(type: GGMLQuantizationType, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Bytes `[rows, bytes of a row]`: random codes with scales small enough that activations stay finite.

    Raises:
        ValueError: rows are not whole blocks.
    """
    block, size = GGML_QUANT_SIZES[type]
    if columns % block:
        raise ValueError(f"{type.name} has blocks of {block} weights, and rows of {columns} are not whole blocks")
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for start in SCALES[type.name]:
        data[..., start : start + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write_gguf(file: Path, config: LlamaConfig, type_name: str) -> None:
    """A model of this shape with random blocks, without a vocabulary."""
    writer, generator = GGUFWriter(file, "llama"), np.random.default_rng(0)
    heads = config.num_attention_heads
    sizes = {"hidden": config.hidden_size, "inner": config.intermediate_size}
    sizes["keys"] = config.hidden_size // heads * config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, type: GGMLQuantizationType, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(type, rows, columns, generator), raw_dtype=type)

    ones = np.ones(config.hidden_size, np.float32)
    add("token_embd", TYPES["Q2_K"], config.vocab_size, config.hidden_size)
    add("output", HEAD, config.vocab_size, config.hidden_size)
    writer.add_tensor("output_norm.weight", ones)
    for number in range(config.num_hidden_layers):
        for name, outputs, inputs in LAYERS:
            add(f"blk.{number}.{name}", TYPES[type_name], sizes[outputs], sizes[inputs])
        writer.add_tensor(f"blk.{number}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{number}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A running llama.cpp, which generates when it is called."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def __call__(self) -> float:
        """Generate; returns the seconds. Raises RuntimeError if the process has ended."""
        print(file=self._process.stdin, flush=True)
        return float(self.answer())

    def answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with exit code {self._process.wait()}")
        return line


@contextmanager
def running(work: Path, file: Path, threads: int, prompt_tokens: int, new_tokens: int) -> Iterator[Llama]:
    """llama.cpp with a model loaded; its messages go to a log in `work`."""
    script = Path(__file__).resolve().parent / "peers" / "speed_llamacpp.py"
    command = [environment(work), script, file, threads, prompt_tokens, new_tokens]
    with (work / "llama.log").open("w") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(list(map(str, command)), **pipes)
        try:
            llama = Llama(process)
            llama.answer()
            yield llama
        finally:
            process.kill()
            process.wait()


def version(work: Path) -> str:
    """Name and version of the package."""
    show = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run([environment(work), "-c", show, PACKAGE], check=True, stdout=subprocess.PIPE, text=True)
    return f"{PACKAGE} {done.stdout.strip()}"
