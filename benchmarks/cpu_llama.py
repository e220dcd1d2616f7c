"""llama.cpp beside our models, for benchmarks/bench_cpu.py: a GGUF file of random blocks, run in another environment."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGUFWriter
from transformers import LlamaConfig

PACKAGE = "ik-llama-cpp-python"  # the one with wheels for current CPUs
BLOCK = 256  # weights


class Blocks(NamedTuple):
    """A type of GGUF files: its number, and how rows are stored. All bits but those of scales may have any value.

    Attributes:
        size: bytes of a block.
        scales: where in a block there are scales, in float16.
        row_scale: whether a row begins with a scale, in float32.
    """

    number: int
    size: int
    scales: tuple[int, ...]
    row_scale: bool = False


Q2_K = Blocks(10, 84, (80, 82))
TYPES = {"Q2_K": Q2_K, "IQ2_XXS": Blocks(16, 66, (0,)), "IQ2_KT": Blocks(153, 68, (), True)}
HEAD = Blocks(14, 210, (208,))  # Q6_K, as llama.cpp's own two-bit files have it
SCALE = 1e-4  # small enough that activations stay finite
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


def random_rows(type: Blocks, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Random codes, int8 `[rows, bytes of a row]`.

    Raises:
        ValueError: rows are not whole blocks.
    """
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} weights are not whole blocks of {BLOCK}")
    blocks = generator.integers(0, 256, (rows, columns // BLOCK, type.size), dtype=np.uint8)
    for start in type.scales:
        blocks[..., start : start + 2] = np.frombuffer(np.float16(SCALE).tobytes(), np.uint8)
    row_scale = np.full((rows, int(type.row_scale)), SCALE, np.float32).view(np.uint8)
    return np.concatenate([row_scale, blocks.reshape(rows, -1)], 1).view(np.int8)


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

    def add(name: str, type: Blocks, rows: int, columns: int) -> None:
        # Given as signed bytes, whose shape and type the writer does not try to understand.
        data = random_rows(type, rows, columns, generator)
        writer.add_tensor(f"{name}.weight", data, raw_shape=(rows, columns), raw_dtype=type.number)  # type: ignore

    ones = np.ones(config.hidden_size, np.float32)
    add("token_embd", Q2_K, config.vocab_size, config.hidden_size)
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
