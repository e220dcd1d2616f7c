"""What each of two processes does for `test_processes.py`: it quantizes and recovers models
together with the other. In the end one of them dies. The tests do the same in one
process, with the functions here.

torchrun --nproc-per-node 2 sharing_worker.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path

import moe_models
import torch
from conftest import byte_tokenizer
from hf_pcdvq_kernels import set_backend
from packed_pairs import pair, tensors, windows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_pcdvq import Calibration, Recovery, quantize_model, recover
from hf_pcdvq.calibration.run import CalibratedRun
from hf_pcdvq.calibration.store import BlockStore
from hf_pcdvq.config import config_of_setting
from hf_pcdvq.processes import Processes
from hf_pcdvq.streaming.quantize import quantize_checkpoint
from hf_pcdvq_cli import main as command

TOKENS = torch.randint(2, 250, (20, 16), generator=torch.Generator().manual_seed(0))
RINGS = {r"layers\.1\.self_attn\.v_proj": "stream-2.0", "o_proj": "ccq-2.5"}
# Model, setting, overrides, and fields of a calibration or None to round. 18 windows are two shares. Where embeddings and head
# are tied, both are packed.
CASES = {
    "dense": ("llama", "pcdvq-2.25", RINGS, {"correction": "own"}),
    "experts": ("mixtral", "pcdvq-2.0", {}, {"expert_tokens": 60}),
    "rounded": ("llama", "pcdvq-2.0", RINGS, None),
    "rounded experts": ("mixtral", "pcdvq-2.0", {}, None),
    "tied": ("llama tied", "stream-2.0", {}, {}),
    "rounded tied": ("llama tied", "stream-2.0", {}, None),
}
RECOVERY = Recovery(steps=4, batch=4, learning_rate=0.01, evaluations=2)


def llama(tied=False):
    """Gate and up projections have more rows together than one part."""
    sizes = {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 258}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=tied)).bfloat16()


def save_models(folder):
    models = {"llama": llama(), "llama tied": llama(tied=True), "mixtral": moe_models.model("mixtral")}
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="100KB")
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(" ".join(f"{number} of many small words" for number in range(150)))


def config_of(case):
    model, setting, overrides, fields = CASES[case]
    calibration = None if fields is None else Calibration(samples=18, length=16, holdout=2, **fields)
    embeddings = "int8" if model == "llama tied" else None
    return config_of_setting(setting, calibration=calibration, overrides=overrides, embeddings=embeddings)


def streamed(folder, case, out, **options):
    model = AutoModelForCausalLM.from_pretrained(folder / CASES[case][0], device_map="meta")
    scratch = Path(f"{out} activations {os.getpid()}")
    for made in (out, scratch):
        made.mkdir(exist_ok=True)
    return quantize_checkpoint(model, None, config_of(case), out, scratch, TOKENS, progress=False, **options)


def in_memory(folder, case, **options):
    model = AutoModelForCausalLM.from_pretrained(folder / CASES[case][0])
    return quantize_model(model, None, config_of(case), TOKENS, progress=False, **options)


def refusal(folder, processes, dataset=TOKENS, work_dir=None, **fields):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    settings = {"samples": 18, "length": 16, "holdout": 2, **fields}
    try:
        config = config_of_setting("pcdvq-2.0", calibration=settings)
        options = {"progress": False, "work_dir": work_dir, "processes": processes}
        quantize_model(model, byte_tokenizer(), config, dataset, **options)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "was not refused"


def recovered(folder, work_dir=None):
    packed, teacher = pair(folder, "pcdvq-2.0")
    options = {"held_out": windows(2, seed=1), "settings": RECOVERY, "progress": False, "work_dir": work_dir}
    report = recover(packed, teacher, None, windows(10), **options)
    return {"model": tensors(packed), "losses": report.losses}


def command_line(folder, out):
    options = ["--dataset", folder / "text.txt", "--samples", "18", "--length", "16", "--setting", "pcdvq-2.0"]
    return [str(word) for word in ("quantize", folder / "llama", "--out", out, *options)]


def run_command(folder, out):
    command(command_line(folder, folder / out), standalone_mode=False)


def resumed(folder, case, processes):
    """Run a case again without its second block, and return the numbers of the blocks that are kept now."""
    if processes.rank == 0:
        (folder / f"{case} work" / f"block-{2 if case == 'rounded' else 1:04d}.safetensors").unlink()
    saved, save = [], BlockStore.save
    BlockStore.save = lambda self, number, result: saved.append(number) or save(self, number, result)
    streamed(folder, case, folder / f"{case} resumed", work_dir=folder / f"{case} work", processes=processes)
    BlockStore.save = save
    return saved


def die_at_the_second_block(rank):
    run_block = CalibratedRun._run_block

    def killed(self, number, block):
        if number == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run_block(self, number, block)

    CalibratedRun._run_block = killed


def main(folder):
    processes, found = Processes(), {}
    rank = processes.rank
    for case in CASES:
        out = folder / case
        quantized = streamed(folder, case, out, work_dir=folder / f"{case} work", processes=processes)
        found["files", case] = {file.name: file.read_bytes() for file in out.iterdir()}
        report = quantized.compare(out)
        found[case] = report and [block.output_error for block in report.blocks]
        found["compared", case] = report and (report.comparison is not None, report.comparison_failure)
    found["resumed"] = {case: resumed(folder, case, processes) for case in ("dense", "rounded")}
    # All of them go on after what is refused.
    (folder / "a file").touch()
    refused = {
        "fisher": {"fisher_groups": 2},
        "tuned": {"tune_steps": 3},
        "few": {"samples": 8},
        "missing": {"dataset": "missing.txt"},
        "work": {"work_dir": folder / "a file"},
        "unwritten": {"dataset": None},
        "settings": {"damp_percent": 0.01 * (1 + rank)},
        "kept": {"damp_percent": 0.01 * (1 + rank), "work_dir": folder / "differing work"},
        "one kept": {"work_dir": folder / "differing work" if rank else None},
    }
    found["refused"] = {what: refusal(folder, processes, **fields) for what, fields in refused.items()}
    found["in memory"] = in_memory(folder, "dense", processes=processes).state_dict()
    if rank == 0:  # as a program does that trains in several processes and quantizes the result in one
        found["alone"] = in_memory(folder, "dense").state_dict()
    found["recovered"] = recovered(folder / "llama", folder / "state")
    torch.save(found, folder / f"{rank}.pt")
    run_command(folder, "command")
    die_at_the_second_block(rank)
    run_command(folder, "killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_backend("reference")  # so that nothing is compiled
    main(Path(sys.argv[1]))
