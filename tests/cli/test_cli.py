"""The console script as a user sees it: results, rejections, exit codes, and what is left on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import contents, fail, run, succeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_pcdvq.importers.gguf
from hf_pcdvq import PcdvqConfig

# Without calibration, which takes longer and is tested in test_cli_calibration.py.
ROUND = ("quantize", "--no-calibration")


@pytest.fixture(scope="module")
def packed_once(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "packed"
    succeed(*ROUND, tiny_model_dir, "--out", folder)
    return folder


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A dense model that the test may modify."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------- quantize


def test_quantized_folder_is_the_model_that_from_pretrained_makes(tiny_model_dir, packed_once):
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig())
    loaded = AutoModelForCausalLM.from_pretrained(packed_once)
    assert loaded.config.quantization_config.method == "pcdvq"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(packed_once)("ab") == AutoTokenizer.from_pretrained(tiny_model_dir)("ab")
    assert [path.name for path in packed_once.parent.iterdir()] == ["packed"]


def test_quantize_prints_sizes_bits_and_what_was_left(tiny_model_dir, tmp_path):
    shown = succeed(*ROUND, tiny_model_dir, "--out", tmp_path / "deep" / "packed", "--setting", "pcdvq-2.0").stdout
    assert "lm_head.weight" in shown
    assert "2.23" in shown  # bits per packed weight: 2, plus scales for rows of 128 and 192
    before = (tiny_model_dir / "model.safetensors").stat().st_size
    after = (tmp_path / "deep" / "packed" / "model.safetensors").stat().st_size
    assert f"{before / 1024:.1f} KiB -> {after / 1024:.1f} KiB" in shown


def test_embeddings_and_head_are_packed_where_they_are_asked_for(tiny_model_dir, tmp_path):
    options = ("--embeddings", "int8", "--head", "ccq-2.75")
    succeed(*ROUND, tiny_model_dir, "--out", tmp_path / "packed", *options)
    shown = json.loads(succeed("inspect", tmp_path / "packed", "--json").stdout)
    bits = {layer["name"]: layer["bits_per_weight"] for layer in shown["layers"]}
    assert bits["model.embed_tokens"] == 8.25 and bits["lm_head"] == 3.0  # scales for rows of 128 included
    assert shown["left_unpacked"] == {} and shown["bytes"]["embeddings"] == shown["bytes"]["head"] == 0
    fail(2, "head must be one of", *ROUND, tiny_model_dir, "--out", tmp_path / "no", "--head", "int9")


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--setting", "pcdvq-2.0", "--magnitude", "projection"], {"bits": 2.0, "magnitude": "projection"}),
        (["--setting", "ccq-2.75-published"], {"layout": "2.75", "hadamard": False}),
        (["--setting", "stream-2.5", "--window-bits", "13"], {"layout": "stream", "bits": 2.5, "window_bits": 13}),
    ],
)
def test_options_reach_the_config(tiny_model_dir, tmp_path, options, fields):
    succeed(*ROUND, tiny_model_dir, "--out", tmp_path / "packed", *options)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert {name: config[name] for name in fields} == fields


def test_skip_dtype_and_shard_size_are_obeyed(tiny_model_dir, tmp_path):
    options = ["--skip", "down_proj", "--skip", r"layers\.1\.", "--dtype", "float32", "--max-shard-size", "200KB"]
    succeed(*ROUND, tiny_model_dir, "--out", tmp_path / "packed", *options)
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32


def test_model_without_tokenizer_is_saved_with_a_warning(model_dir, tmp_path):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    result = succeed(*ROUND, model_dir, "--out", tmp_path / "packed")
    assert "Warning: no tokenizer was found" in result.stderr
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    assert not (tmp_path / "packed" / "tokenizer.json").exists()


def test_tokenizer_that_comes_up_without_its_files_is_not_saved(model_dir, tmp_path):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    result = succeed(*ROUND, model_dir, "--out", tmp_path / "packed")
    assert "no tokenizer was found with the model, so none is saved: the tokenizer there has special" in result.stderr
    assert not (tmp_path / "packed" / "tokenizer.json").exists()


def test_gguf_file_is_decoded_first_and_nothing_of_it_stays(tiny_model_dir, packed_once, tmp_path, monkeypatch):
    calls = []

    def decode(folder, gguf_file, out, dtype, revision):
        calls.append((folder, gguf_file, dtype, revision))
        shutil.copytree(tiny_model_dir, out, dirs_exist_ok=True)

    monkeypatch.setattr(hf_pcdvq.importers.gguf, "dense_from_gguf", decode)
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.gguf").write_bytes(b"x" * 3000)
    result = succeed(*ROUND, source, "--gguf-file", "model.gguf", "--out", tmp_path / "packed")
    assert calls == [(str(source), "model.gguf", torch.bfloat16, None)]
    assert "2.9 KiB -> " in result.stdout
    result, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "packed", packed_once))
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]
    assert not [name for name, data in contents(tmp_path / "packed").items() if b".gguf-" in data]


# -------------------------------------------------------------------------------------- what quantize does not overwrite


def test_folder_that_is_not_empty_is_left_alone(tiny_model_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fail(1, "is not empty", *ROUND, tiny_model_dir, "--out", tmp_path)
    fail(1, "contains no config.json", *ROUND, tiny_model_dir, "--out", tmp_path, "--force")
    assert contents(tmp_path) == {Path("notes.txt"): b"mine"}


def test_force_replaces_a_saved_model_whole(tiny_model_dir, packed_once, tmp_path):
    out = shutil.copytree(packed_once, tmp_path / "packed")
    (out / "model-00002-of-00002.safetensors").write_text("of an older model")
    before = contents(out)
    fail(1, "is not empty", *ROUND, tiny_model_dir, "--out", out, "--setting", "pcdvq-2.0")
    assert contents(out) == before
    succeed(*ROUND, tiny_model_dir, "--out", out, "--setting", "pcdvq-2.0", "--force")
    assert not (out / "model-00002-of-00002.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_force_does_not_delete_a_git_repository(tiny_model_dir, packed_once, tmp_path):
    out = shutil.copytree(packed_once, tmp_path / "packed")
    (out / ".git").mkdir()
    fail(1, "is a git repository", *ROUND, tiny_model_dir, "--out", out, "--force")
    assert (out / ".git").is_dir()


def test_empty_folder_is_filled(tiny_model_dir, tmp_path):
    (tmp_path / "packed").mkdir()
    succeed(*ROUND, tiny_model_dir, "--out", tmp_path / "packed")
    assert (tmp_path / "packed" / "config.json").is_file()


def test_source_folder_and_those_above_it_are_refused(model_dir, tmp_path):
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(model_dir)
    for out in (model_dir, tmp_path, tmp_path / "link", model_dir / ".." / "model"):
        fail(1, "is or contains the source model's folder", *ROUND, model_dir, "--out", out, "--force")
    fail(1, "is or contains the source model's folder", *ROUND, tmp_path / "link", "--out", model_dir, "--force")
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_quantize_leaves_no_folder(tiny_model_dir, tmp_path, monkeypatch, interruption):
    def half_saved(model, folder, **options):
        (Path(folder) / "config.json").write_text("{}")
        raise interruption

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half_saved)
    result = run(*ROUND, tiny_model_dir, "--out", tmp_path / "packed")
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupted_replacement_leaves_the_old_model(tiny_model_dir, packed_once, tmp_path, monkeypatch):
    out = shutil.copytree(packed_once, tmp_path / "packed")
    before = contents(out)

    def disk_full(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", disk_full)
    fail(1, "Error: disk full", *ROUND, tiny_model_dir, "--out", out, "--force")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_old_model_is_put_back_if_the_new_one_cannot_take_its_place(
    tiny_model_dir, packed_once, tmp_path, monkeypatch
):
    out = shutil.copytree(packed_once, tmp_path / "packed")
    before = contents(out)
    rename = Path.rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise OSError("busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    fail(1, "Error: busy", *ROUND, tiny_model_dir, "--out", out, "--force")
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"packed", ".packed.calibration"}  # finished blocks


# ------------------------------------------------------------------------------------------------------ quantize: errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--setting", "ccq-2.5", "--window-bits", "12"], "window_bits 12 needs layout 'stream'"),
        (["--setting", "stream-2.0", "--magnitude", "norm"], "--magnitude does not belong to the setting stream-2.0"),
        (["--setting", "pcdvq-2.0", "--window-bits", "12"], "--window-bits does not belong to the setting pcdvq-2.0"),
        (["--setting", "stream-2"], "setting must be one of 'pcdvq-2.0', "),
        (["--setting", "int8"], "got 'int8'"),
        (["--max-shard-size", "5 apples"], "not a size like 5GB"),
    ],
)
def test_wrong_usage_ends_with_code_2(tiny_model_dir, tmp_path, options, message):
    fail(2, message, "quantize", tiny_model_dir, "--out", tmp_path / "packed", *options)
    assert list(tmp_path.iterdir()) == []


def test_missing_out_is_wrong_usage(tiny_model_dir):
    fail(2, "--out", "quantize", tiny_model_dir)


def test_packed_model_is_not_quantized_again(packed_once, tmp_path):
    fail(1, "already quantized with pcdvq", *ROUND, packed_once, "--out", tmp_path / "again")
    assert list(tmp_path.iterdir()) == []


def test_missing_source_and_a_file_as_source_are_named(tiny_model_dir, tmp_path):
    fail(1, f"folder {tmp_path / 'none'} does not exist", *ROUND, tmp_path / "none", "--out", tmp_path / "packed")
    file = tiny_model_dir / "model.safetensors"
    fail(1, f"{file} is a file", *ROUND, file, "--out", tmp_path / "packed")


def test_damaged_weight_is_named_and_debug_shows_where_it_failed(model_dir, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model_dir / "model.safetensors")
    tensors[name][3, 4] = torch.nan
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    fail(1, f"{name}: the weight holds infinite or NaN", *ROUND, model_dir, "--out", tmp_path / "packed")
    result = run(*ROUND, model_dir, "--out", tmp_path / "packed", "--debug")
    assert isinstance(result.exception, ValueError)  # the interpreter prints its traceback
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".packed.calibration"}  # the block before it


# -------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_json_adds_up_to_the_file(packed_once):
    record = json.loads(succeed("inspect", packed_once, "--json").stdout)
    assert sum(record["bytes"].values()) == (packed_once / "model.safetensors").stat().st_size
    assert len(record["layers"]) == 14
    assert record["quantization_config"]["bits"] == 2.25


def test_inspect_shows_layers_and_what_was_left(packed_once):
    shown = succeed("inspect", packed_once).stdout
    assert "pcdvq-2.25" in shown
    assert "2.500" in shown  # bits for a row of 128: 2.25, plus a float32 scale
    assert "lm_head.weight" in shown


def test_inspect_counts_a_dense_model(tiny_model_dir):
    assert "not packed" in succeed("inspect", tiny_model_dir).stdout


def test_inspect_of_a_missing_or_empty_folder(tmp_path):
    fail(1, "does not exist", "inspect", tmp_path / "none")
    fail(1, "config.json is missing", "inspect", tmp_path)


# ------------------------------------------------------------------------------------------------------------- generate


def test_generate_continues_the_prompt_like_the_model(packed_once):
    tokenizer = AutoTokenizer.from_pretrained(packed_once)
    model = AutoModelForCausalLM.from_pretrained(packed_once)
    for flag, prompt in (("--no-chat", "abc"), ("--chat", "user: abc\nassistant: ")):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=flag == "--no-chat").input_ids
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        result = succeed("generate", packed_once, "--prompt", "abc", "--max-new-tokens", 8, flag)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert (
            "\x04" in text or flag == "--no-chat"
        )  # what a model writes may steer the terminal, so it is shown escaped
        assert result.stdout == text.replace("\x04", r"\x04") + "\n"
        assert "8 tokens in" in result.stderr


def test_seed_makes_sampling_repeatable(packed_once):
    options = ["--prompt", "abc", "--max-new-tokens", 8]
    first, again, other = (succeed("generate", packed_once, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert succeed("generate", packed_once, *options).stdout != first


def test_chat_is_the_default_only_with_a_template(packed_once, tmp_path):
    options = ["--prompt", "abc", "--max-new-tokens", 4]
    assert (
        succeed("generate", packed_once, *options).stdout
        == succeed("generate", packed_once, *options, "--chat").stdout
    )
    bare = shutil.copytree(packed_once, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert (
        succeed("generate", bare, *options).stdout == succeed("generate", packed_once, *options, "--no-chat").stdout
    )
    fail(1, "no chat template", "generate", bare, *options, "--chat")


# ---------------------------------------------------------------------------------------------------- the script itself


def test_installed_script_reports_an_error_in_one_line(tmp_path):
    script = Path(sys.executable).with_name("hf-pcdvq")
    done = subprocess.run([script, "inspect", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"Error: {tmp_path}/config.json is missing; expected a model saved with save_pretrained in {tmp_path}\n"
    )
    done = subprocess.run([script, "inspect", tmp_path, "--debug"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval", "compare", "generate"])
def test_every_command_explains_itself_with_an_example(command):
    assert command in succeed("--help").stdout
    assert f"  hf-pcdvq {command} " in succeed(command, "--help").stdout
