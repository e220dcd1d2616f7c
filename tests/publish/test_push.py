"""What a push sends and rejects, and how it handles failures of the Hub, the network and the disk."""

import json
import resource
import shutil
import tempfile

import huggingface_hub.constants
import pytest
import torch
from command_line import contents, run
from fake_hub import READ_TOKEN, WRITE_TOKEN, Fault
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pcdvq import PcdvqConfig, push_to_hub
from hf_pcdvq.files.provenance import Provenance
from hf_pcdvq.publish.errors import PushError
from hf_pcdvq.publish.push import push_folder

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"


def same_logits(folder, files, tmp_path):
    """Whether a repository's files contain the same model as a folder."""
    (tmp_path / "there").mkdir()
    for name, content in files.items():
        (tmp_path / "there" / name).write_bytes(content)
    with torch.inference_mode():
        models = [AutoModelForCausalLM.from_pretrained(place) for place in (folder, tmp_path / "there")]
        first, second = (model(torch.arange(2, 40)[None]).logits for model in models)
    return torch.equal(first, second)


# -------------------------------------------------------------------------------------------------------- what is sent


def test_dry_run_lists_what_a_push_sends_and_touches_no_network(packed, hub):
    (packed / ".secret.json").write_text("secret")
    (packed / "notes.pdf").write_text("mine")
    before = contents(packed)
    result = run("push", packed, REPO, "--dry-run")
    assert result.exit_code == 0, result.output
    assert hub.requests == []
    assert contents(packed) == before
    push_folder(packed, REPO)
    sent = hub.repos[REPO].files()
    assert ".secret.json" not in sent and "notes.pdf" not in sent
    assert ".secret.json, notes.pdf" in result.stderr
    for name in sent.keys() - {".gitattributes"}:
        assert f" {name} " in result.stdout
    assert {"evaluation.json", "quantization_report.png", "modeling_hf_pcdvq.py", "README.md"} <= sent.keys()


def test_model_in_memory_goes_with_tokenizer_report_and_card(calibrated, evaluated_once, hub, tmp_path):
    model, tokenizer = calibrated
    evaluation = evaluated_once / "evaluation.json"
    commit = push_to_hub(
        model, tokenizer, REPO, evaluation=evaluation, base_model="org/tiny", metadata={"license": "mit"}
    )
    files = hub.repos[REPO].files()
    assert commit.oid == hub.repos[REPO].branches["main"]
    assert {
        "chat_template.jinja",
        "generation_config.json",
        "quantization_report.md",
        "tokenizer.json",
    } <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (
        "org/tiny",
        "quantized",
        "mit",
    )
    assert same_logits(evaluated_once, files, tmp_path)


def test_packed_model_that_was_loaded_again_keeps_its_original(packed, hub, tmp_path):
    Provenance("org/tiny", "abc", "hf-pcdvq quantize org/tiny", {}, {"license": "mit"}).write(packed)
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    push_to_hub(loaded, AutoTokenizer.from_pretrained(packed), REPO)
    card = ModelCard(hub.repos[REPO].files()["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit")


@pytest.mark.parametrize("xet", [False, True])
def test_pull_request_and_branch_leave_main_as_it_is(packed, hub, monkeypatch, xet):
    """Both ways in which huggingface_hub uploads a folder; with Xet, the stand-in receives commits only."""
    hub.lfs = not xet
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet)
    hub.create(REPO)
    commit = push_folder(packed, REPO, create_pr=True)
    repo = hub.repos[REPO]
    assert commit.pr_url.endswith(f"{REPO}/discussions/1")
    push_folder(packed, REPO, revision="2bit")
    assert set(repo.files()) == {".gitattributes"}
    assert "config.json" in repo.files("refs/pr/1") and repo.files("refs/pr/1") == repo.files("2bit")


def test_second_push_replaces_everything_of_the_first(packed, hub, tmp_path):
    """Otherwise shards and measurements of the previous model would remain next to the new one."""
    push_folder(packed, REPO)
    assert "model.safetensors.index.json" in hub.repos[REPO].files()
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(again)
    AutoTokenizer.from_pretrained(packed).save_pretrained(again)
    push_folder(again, REPO)
    files = hub.repos[REPO].files()
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert not [name for name in files if "evaluation" in name or "report" in name]
    assert len(hub.repos[REPO].commits) == 3
    push_folder(again, REPO)
    assert len(hub.repos[REPO].commits) == 3  # nothing has changed


# ---------------------------------------------------------------------------------------------------- what is rejected


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    """Creates packed variants of the tiny model."""

    def make(config=None, **sizes):
        dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        if sizes:
            dense.config.update(sizes)
            dense = type(dense)(dense.config)
        folder = tmp_path / "other"
        dense.save_pretrained(tmp_path / "source")
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "source", quantization_config=config or PcdvqConfig()
        )
        packed.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
        return folder

    return make


def test_repo_with_another_model_is_replaced_only_by_force(packed, other, tiny_model_dir, hub):
    push_folder(other(PcdvqConfig(bits=2.0)), REPO)
    held = hub.repos[REPO].files()
    result = run("push", packed, REPO)
    assert result.exit_code == 1
    assert f"{REPO} contains another model (bits 2.0, here 2.25)" in result.stderr
    assert hub.repos[REPO].files() == held
    assert run("push", packed, REPO, "--force").exit_code == 0
    assert json.loads(hub.repos[REPO].files()["config.json"])["quantization_config"]["bits"] == 2.25
    hub.create("me/dense", files={file.name: file.read_bytes() for file in tiny_model_dir.iterdir()})
    with pytest.raises(ValueError, match="contains another model .one that is not quantized"):
        push_folder(packed, "me/dense")
    hub.create("me/gguf", files={"model.gguf": b"GGUF"})
    with pytest.raises(ValueError, match="contains another model .weights without a config.json"):
        push_folder(packed, "me/gguf")


def test_other_size_and_other_original_are_other_models(packed, other, hub):
    push_folder(other(num_hidden_layers=1), REPO)
    with pytest.raises(ValueError, match="num_hidden_layers 1, here 2"):
        push_folder(packed, REPO)
    push_folder(packed, "me/from-a", base_model="org/a", metadata={"license": "mit"})
    with pytest.raises(ValueError, match="made from org/a, here from org/b"):
        push_folder(packed, "me/from-a", base_model="org/b", metadata={"license": "mit"})
    push_folder(packed, "me/from-a", base_model="org/a", metadata={"license": "apache-2.0"})


def test_what_was_asked_to_be_private_does_not_go_to_a_public_repo(packed, hub):
    hub.create(REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        push_folder(packed, REPO, private=True)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_damaged_folder_is_refused_before_anything_is_sent(packed, hub):
    shard = sorted(packed.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    result = run("push", packed, REPO)
    assert result.exit_code == 1
    assert f"{shard} is truncated" in result.stderr
    (packed / "tokenizer_config.json").unlink()
    shard.write_bytes(whole)
    assert "has no tokenizer" in run("push", packed, REPO).stderr
    assert hub.requests == []


def test_own_card_may_state_only_what_was_measured(packed, hub):
    metrics = json.loads((packed / "evaluation.json").read_text())["metrics"]
    measured = (
        f"---\nlicense: mit\n---\n# Mine\nSince 2024, `2.5` in code. Perplexity {metrics['perplexity_packed']:.1f}."
    )
    (packed / "README.md").write_text(f"{measured} Llama-3.1-like, 97.3 % of the original, 81 tokens/s.")
    result = run("push", packed, REPO)
    assert result.exit_code == 1
    assert "states figures that no measurement beside it contains: 97.3 %, 81 tokens/s." in result.stderr
    assert hub.requests == []
    (packed / "README.md").write_text(measured)
    push_folder(packed, REPO)
    assert b"# Mine" in hub.repos[REPO].files()["README.md"]


def test_wrong_names_and_options_are_refused_at_once(packed, calibrated, hub, tmp_path):
    with pytest.raises(ValueError, match="the repository needs a namespace, as in your-name/tiny"):
        push_folder(packed, "tiny")
    assert run("push", packed, REPO, "--create-pr", "--revision", "main").exit_code == 2
    with pytest.raises(PushError, match="does not exist.*push without create_pr"):
        push_folder(packed, REPO, create_pr=True)
    with pytest.raises(FileNotFoundError, match="there is no .*evaluation.json; `hf-pcdvq eval` writes it"):
        push_to_hub(*calibrated, REPO, evaluation=tmp_path)
    assert hub.repos == {}


# ------------------------------------------------------------------------------------------------ when something fails


def test_upload_that_is_cut_leaves_nothing_half_and_the_next_push_completes_it(packed, hub, tmp_path):
    # The first file gets through, the next is interrupted on every retry.
    hub.faults = [Fault("PUT", "/lfs/", None, times=99, skip=1)]
    result = run("push", packed, REPO)
    assert result.exit_code == 1
    assert result.stderr.count("Error: ") == 1
    assert f"the push to {REPO} did not finish: the connection failed" in result.stderr
    assert "push again: files that were uploaded are not sent a second time" in result.stderr
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    (sent,) = hub.blobs
    hub.faults = []
    push_folder(packed, REPO)
    assert hub.requests.count(f"PUT /lfs/{sent}") == 1
    assert len(hub.repos[REPO].commits) == 2
    assert same_logits(packed, hub.repos[REPO].files(), tmp_path)


def test_commit_that_is_cut_is_made_by_the_next_push(packed, hub):
    hub.faults = [Fault("POST", "/commit/", None, times=99)]
    with pytest.raises(PushError, match="the connection failed"):
        push_folder(packed, REPO)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.faults = []
    uploads = sum(request.startswith("PUT") for request in hub.requests)
    push_folder(packed, REPO)
    assert sum(request.startswith("PUT") for request in hub.requests) == uploads
    assert "config.json" in hub.repos[REPO].files()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/api/repos/create", 401), "the Hub did not accept the token, or there is none: log in with"),
        (Fault("POST", "/api/repos/create", 403), "the token has no permission to write there: log in with"),
        (
            Fault("POST", "/api/repos/create", 409, message="name taken"),
            "or its name is taken: wait, then push again",
        ),
        (Fault("POST", "/commit/", 403), "the token has no permission to write there"),
        (Fault("POST", "/commit/", 409, message="locked"), "(status 409, it says: locked)"),
        (Fault("POST", "/commit/", 412), "the branch has changed since this push began"),
        (Fault("POST", "/preupload/", 404), "the repository does not exist, or the token has no access to it"),
        (Fault("POST", "/preupload/", 503, times=99), "the Hub has a problem (status 503"),
    ],
    ids=lambda value: f"{value.status}-{value.path.split('/')[-1] or value.path}" if isinstance(value, Fault) else "",
)
def test_refusal_of_the_hub_ends_in_one_clear_message(packed, hub, fault, message, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    hub.faults = [fault]
    before = contents(packed)
    result = run("push", packed, REPO)
    assert result.exit_code == 1
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.stderr
    assert f"the push to {REPO} did not finish: " in result.stderr
    assert message in result.stderr
    assert contents(packed) == before and list(scratch.iterdir()) == []
    assert all(set(repo.files()) == {".gitattributes"} for repo in hub.repos.values())


def test_tokens_that_may_not_write(packed, hub):
    for token, message in (
        (READ_TOKEN, "the token has no permission to write there"),
        ("hf_wrong", "did not accept the token"),
    ):
        result = run("push", packed, REPO, "--token", token)
        assert message in result.stderr
        assert result.exit_code == 1
    assert run("push", packed, REPO, "--token", WRITE_TOKEN).exit_code == 0


def test_unreachable_hub(packed, hub):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(PushError, match="the connection failed .*Connection refused.*push again"):
        push_folder(packed, REPO)


@pytest.mark.parametrize("kilobytes", [1, 40])  # at config.json, and in the middle of a shard
def test_full_disk_ends_in_one_clear_message_and_leaves_nothing(calibrated, hub, tmp_path, kilobytes):
    """A file size limit fails like a full disk, with an error from write(), and needs no privileges."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            push_to_hub(*calibrated, REPO, work_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"the files to push could not be saved in {tmp_path}" in str(caught.value)
    assert "File too large" in str(caught.value) and "Free some space, or pass another work_dir" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert hub.requests == []


def test_report_of_another_model_is_refused(packed, other, hub):
    folder = other(PcdvqConfig(bits=2.0))
    shutil.copy(packed / "quantization_report.json", folder)
    with pytest.raises(ValueError, match="quantization_report.json belongs to another model"):
        push_folder(folder, REPO)
    assert hub.requests == []
