"""How fast ik_llama.cpp generates, for benchmarks/bench_cpu.py; runs in an environment with `ik-llama-cpp-python`.

    python speed_llamacpp.py MODEL.gguf THREADS PROMPT_TOKENS NEW_TOKENS

For every line on standard input it generates once and prints the seconds, prompt included, so that the caller can
alternate. Tokens are given, not sampled: a model of random weights would end early.
"""

import math
import sys
import time

from ik_llama_cpp import IkLlama
from ik_llama_cpp import _ctypes_api as api
from ik_llama_cpp._internals import make_batch_range, make_batch_single


def decode(context, batch):
    failed = context.decode(batch)
    api.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama_decode returned {failed}")


def generate(context, prompt_tokens, new_tokens):
    context.kv_cache_clear()
    decode(context, make_batch_range(list(range(prompt_tokens)), pos_start=0, logits_last=True))
    for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):  # the prompt gave the first
        if not math.isfinite(context.get_logits(-1)[0]):
            raise RuntimeError("the logits are not finite: the weights are damaged")
        decode(context, make_batch_single(1, position))


def main():
    file, threads, prompt_tokens, new_tokens = sys.argv[1], *map(int, sys.argv[2:])
    # Its warning about flash attention does not concern so short a context.
    model = IkLlama(file, n_ctx=256, n_threads=threads, flash_attn=False, verbose=False)
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        generate(model._context, prompt_tokens, new_tokens)
        print(time.perf_counter() - started, flush=True)


main()
