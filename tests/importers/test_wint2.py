"""A WINT2 checkpoint, written as FastDeploy writes it, becomes a model that agrees with a naive decoder."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from moe_models import EXPERTS, ernie, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_pcdvq.modules import QuantExperts
from hf_pcdvq_cli import main

HIDDEN, MIDDLE = 192, 128
WINT2_LAYER = 2  # layer 0 is dense, the experts of layer 1 are in bfloat16


def tiny_ernie():
    return ernie(num_hidden_layers=3, hidden_size=HIDDEN, moe_intermediate_size=MIDDLE, head_dim=48)


def random_wint2(inputs, outputs, generator):
    """One expert's matrix in WINT2, as tensors by name."""

    def byte(*shape):
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).to(torch.uint8)

    def number(low, high):
        return low + (high - low) * torch.rand(outputs, generator=generator)

    return {
        "quant_weight": byte(inputs // 4, outputs),
        "weight_scale": byte(math.ceil(inputs / 128), outputs),
        "super_scales": number(0.0002, 0.0004),
        "code_scale": number(100, 125),
        "code_zp": number(0, 900),
    }


def naive_decode(tensors):
    """The matrix `[inputs, outputs]`, weight by weight."""
    words, outputs = tensors["quant_weight"].shape
    code_scale, code_zero = tensors["code_scale"].numpy(), tensors["code_zp"].numpy()
    rows = []
    for k in range(4 * words):
        row = []
        for n in range(outputs):
            byte = tensors["quant_weight"][k // 4, n].item()
            # In float32, as in the engine: a code may be close to the boundary between two integers.
            code = math.floor(np.float32(byte) * code_scale[n] + code_zero[n] + np.float32(0.5))
            value = ((code >> (9, 6, 3, 0)[k % 4]) & 0x3F) - 32
            group = k // 64
            pair = tensors["weight_scale"][group // 2, n].item()
            nibble = pair >> 4 if group % 2 == 0 else pair & 15
            row.append(value * nibble * tensors["super_scales"][n].item())
        rows.append(row)
    return torch.tensor(rows)


def paddle_name(name):
    return name.replace("model.", "ernie.", 1).replace(".gate.moe_statics.", ".moe_statics.")


def paddle_tensors(model):
    """Everything but the experts, as stored by Paddle: matrices transposed, some of them fused."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            fused = name.rsplit(".", 2)[0]
            parts = [state[f"{fused}.{part}_proj.weight"] for part in "qkv"]
            tensors[paddle_name(f"{fused}.qkv_proj.weight")] = torch.cat(parts).T.contiguous()
        elif name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
            fused = name.rsplit(".", 2)[0]
            parts = [state[f"{fused}.{part}_proj.weight"] for part in ("gate", "up")]
            tensors[paddle_name(f"{fused}.up_gate_proj.weight")] = torch.cat(parts).T.contiguous()
        elif tensor.ndim == 2 and "embed" not in name and "moe_statics" not in name:
            tensors[paddle_name(name)] = tensor.T.contiguous()
        else:
            tensors[paddle_name(name)] = tensor.contiguous()
    return tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a WINT2 checkpoint in two files, and the dense model that it represents."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            ernie(num_hidden_layers=3, hidden_size=HIDDEN, moe_intermediate_size=MIDDLE, head_dim=48)
            .to(torch.bfloat16)
            .eval()
        )
    for layer in model.model.layers[1:]:
        layer.mlp.gate.moe_statics.e_score_correction_bias.data.normal_(generator=generator)
    tensors = paddle_tensors(model)
    for number in (1, WINT2_LAYER):
        experts = model.model.layers[number].mlp.experts
        for expert in range(EXPERTS):
            for stack, theirs, inputs in (
                ("gate_up_proj", "up_gate_proj", HIDDEN),
                ("down_proj", "down_proj", MIDDLE),
            ):
                matrix = getattr(experts, stack).data[expert]
                name = f"ernie.layers.{number}.mlp.experts.{expert}.{theirs}"
                if number == WINT2_LAYER:
                    packed = random_wint2(inputs, len(matrix), generator)
                    tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
                    matrix.copy_(naive_decode(packed).T)
                else:
                    tensors[f"{name}.weight"] = matrix.T.contiguous()
    folder = tmp_path_factory.mktemp("wint2")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors")
        index |= dict.fromkeys(part, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model.config.save_pretrained(folder)
    return folder, model


def run(*arguments):
    return CliRunner().invoke(main, ["import-wint2", *map(str, arguments)])


def changed(checkpoint, tmp_path, change):
    """A copy of the checkpoint in one file, with something about its tensors changed."""
    tensors = {
        name: tensor for part in "01" for name, tensor in load_file(checkpoint / f"part{part}.safetensors").items()
    }
    change(tensors)
    folder = tmp_path / "changed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


def test_the_model_computes_what_the_naive_decoder_says(checkpoint, tmp_path):
    folder, dense = checkpoint
    done = run(folder, "--out", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert isinstance(packed.model.layers[WINT2_LAYER].mlp.experts, QuantExperts)
    assert type(packed.model.layers[1].mlp.experts) is type(dense.model.layers[1].mlp.experts)
    decoded = packed.model.layers[WINT2_LAYER].mlp.experts.dequantize(torch.bfloat16)
    expected = dense.model.layers[WINT2_LAYER].mlp.experts
    for stack in ("gate_up_proj", "down_proj"):
        # One product is rounded to float32, the naive one to float64, then both to bfloat16.
        torch.testing.assert_close(getattr(decoded, stack), getattr(expected, stack), rtol=2**-7, atol=0)
        getattr(decoded, stack).data.copy_(getattr(expected, stack))
    packed.model.layers[WINT2_LAYER].mlp.experts = decoded.float()
    whole = tiny_ernie().eval()
    whole.load_state_dict(dense.state_dict())  # not dense.float(), whose rotary frequencies were rounded
    assert torch.equal(logits(packed), logits(whole))


def test_importing_packs_nothing_anew(checkpoint, tmp_path):
    folder, _ = checkpoint
    run(folder, "--out", tmp_path / "packed")
    files = (tmp_path / "packed").glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    source = {name: tensor for part in "01" for name, tensor in load_file(folder / f"part{part}.safetensors").items()}
    name = f"layers.{WINT2_LAYER}.mlp.experts"
    codes = source[f"ernie.{name}.3.down_proj.quant_weight"]
    assert torch.equal(stored[f"model.{name}.down_proj"][3], codes.T)
    assert torch.equal(
        stored[f"model.{name}.gate_up_proj_scale"][5], source[f"ernie.{name}.5.up_gate_proj.super_scales"]
    )


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


EXPERT = f"ernie.layers.{WINT2_LAYER}.mlp.experts.4.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (drop(f"{EXPERT}.code_zp"), f"{EXPERT[6:]}.code_zp is missing"),
        (replace(f"{EXPERT}.quant_weight", torch.zeros(8, 192, dtype=torch.uint8)), r"uint8 \[8, 192\]; expected uint8 .*\[32, 192\]"),
        (replace(f"{EXPERT}.quant_weight", torch.zeros(32, 192)), r"float32 \[32, 192\]; expected uint8"),
        (drop("ernie.layers.0.self_attn.o_proj.weight"), r"layers.0.self_attn.o_proj.weight is missing: expected a floating"),
        (replace("ernie.layers.0.self_attn.o_proj.weight", torch.zeros(192, 192, dtype=torch.int8)), "o_proj.weight .* int8 .*expected floating"),
    ),
)  # fmt: skip
def test_what_is_missing_or_of_another_type_is_named(checkpoint, tmp_path, change, message):
    folder = changed(checkpoint[0], tmp_path, change)
    failed = run(folder, "--out", tmp_path / "packed")
    assert failed.exit_code == 1 and not (tmp_path / "packed").exists()
    with pytest.raises(Exception, match=message):
        raise RuntimeError(failed.stderr.replace("\n", " "))


def test_experts_in_four_bits_are_refused(checkpoint, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if "layers.1.mlp.experts.0.down_proj" in key]:
            del tensors[key]
        tensors["ernie.layers.1.mlp.experts.0.down_proj.quant_weight_4"] = torch.zeros(2, 2, dtype=torch.int8)

    failed = run(changed(checkpoint[0], tmp_path, change), "--out", tmp_path / "packed")
    assert failed.exit_code == 1
    text = " ".join(failed.stderr.split())
    assert "layers.1.mlp.experts.0.down_proj.weight is missing" in text and "down_proj.quant_weight_4" in text


def test_another_checkpoint_is_refused(tiny_model_dir, tmp_path):
    failed = run(tiny_model_dir, "--out", tmp_path / "packed")
    assert failed.exit_code == 1 and "expected a WINT2 checkpoint" in failed.stderr


def test_what_there_is_no_place_for_is_named(checkpoint, tmp_path):
    folder = changed(checkpoint[0], tmp_path, replace("ernie.mtp_block.0.weight", torch.zeros(3)))
    done = run(folder, "--out", tmp_path / "packed")
    assert done.exit_code == 0 and "ernie.mtp_block.0.weight" in done.stderr


def test_tokenizer_and_generation_config_come_along_and_credentials_do_not(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint[0], tmp_path / "source")
    kept = ["tokenizer.model", "tokenizer_config.json", "tokenization_mine.py", "generation_config.json", "LICENSE"]
    for name in [*kept, "token.txt", "my_tokens.json", "LICENSE.key"]:
        (source / name).write_text("{}")
    done = run(source, "--out", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    found = {file.name for file in (tmp_path / "packed").iterdir() if "safetensors" not in file.name}
    assert found == {"config.json", *kept}
