"""Memory use while loading: experts are packed one at a time, whatever the size of the stack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

# The process's own memory, without file-backed pages, which the system reclaims when needed.
LOADER = """
import json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from hf_pcdvq import PcdvqConfig

def owned():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while watching:
        peaks.append(owned())
        time.sleep(0.002)

before, peaks, watching = owned(), [], True
watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=CONFIG)
watching = False
watcher.join()
print(json.dumps({"peak": max(peaks) - before, "packed": model.get_memory_footprint()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what a process owns")
def test_half_a_gigabyte_of_experts_is_packed_in_little_more_than_it_takes_packed(tmp_path):
    config = MixtralConfig(
        hidden_size=1024, intermediate_size=2560, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        num_local_experts=32, vocab_size=258,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    assert sum(tensor.nbytes for tensor in experts.parameters()) > 0.5e9
    model.save_pretrained(tmp_path)
    del model, experts
    # Fastest to encode, and largest when packed.
    code = LOADER.replace("CONFIG", 'PcdvqConfig(overrides={"experts": "int8"})')
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["packed"] > 0.25e9
    assert found["peak"] < found["packed"] + 300e6, (
        found
    )  # the loader reads ahead; all experts at once would be 500 more
