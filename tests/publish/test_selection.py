"""Which files of a folder a push sends: what a model needs, and nothing else."""

import json

import pytest
from command_line import run

from hf_pcdvq.publish.push import planned, push_folder
from hf_pcdvq.publish.selection import select_files

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"


@pytest.mark.parametrize(
    "name",
    [
        "credentials.json",
        "token.txt",
        "NOTICE.pem",
        "LICENSE.key",
        "notes.md",
        "optimizer.safetensors.bak",
        "train.py",
        "secret.jinja",
        ".env",
        ".cache/token.json",
        "backup/config.json",
        "additional_chat_templates/keys.txt",
    ],
)
def test_other_files_stay_behind(packed, name):
    (packed / name).parent.mkdir(exist_ok=True)
    (packed / name).write_text("{}")
    publication = planned(packed, REPO)
    assert name not in publication.files and name in publication.left_out


def test_everything_that_a_model_needs_goes(packed):
    needed = {file.relative_to(packed).as_posix() for file in packed.iterdir()}
    for name in ("processor_config.json", "preprocessor_config.json", "NOTICE", "LICENSE.txt"):
        (packed / name).write_text("{}")
        needed.add(name)
    (packed / "additional_chat_templates").mkdir()
    (packed / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    chosen, left_out = select_files(packed)
    assert set(chosen) == {*needed, "additional_chat_templates/tools.jinja"} and left_out == []


def test_code_goes_if_the_settings_refer_to_it(packed):
    for name, text in (
        ("processing_tiny.py", "from .images_tiny import Images\n"),
        ("images_tiny.py", "class Images: pass\n"),
        ("other.py", ""),
    ):
        (packed / name).write_text(text)
    auto_map = {"AutoProcessor": "processing_tiny.TinyProcessor", "AutoModel": "org/else--other.Model"}
    (packed / "processor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    chosen, left_out = select_files(packed)
    assert {"processing_tiny.py", "images_tiny.py"} <= set(chosen)
    assert left_out == ["other.py"]
    (packed / "processor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="processor_config.json: expected an object, found list"):
        select_files(packed)


def test_include_sends_a_file_by_name(packed, hub):
    (packed / "1_Pooling").mkdir()
    (packed / "1_Pooling/config.json").write_text("{}")
    result = run("push", packed, REPO, "--include", "1_Pooling/config.json")
    assert result.exit_code == 0, result.output
    assert "1_Pooling/config.json" in hub.repos[REPO].files()
    with pytest.raises(FileNotFoundError, match="has no file 'modules.json' to include"):
        planned(packed, REPO, include=["modules.json"])


@pytest.mark.parametrize("name", ["NOTICE", "tokenizer.json", "README.md", "evaluation.json"])
def test_link_that_leaves_the_folder_is_refused_before_anything_is_sent(packed, hub, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(
        (packed / name).read_bytes() if (packed / name).exists() else b"---\nlicense: mit\n---\nsecret"
    )
    (packed / name).unlink(missing_ok=True)
    (packed / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link to {secret}, which is not one of the model's files"):
        push_folder(packed, REPO)
    assert hub.requests == []


def test_links_within_the_folder_are_judged_by_where_they_lead(packed):
    (packed / "credentials.json").write_text("secret")
    (packed / "NOTICE").symlink_to("credentials.json")
    with pytest.raises(ValueError, match="NOTICE is a link to .*credentials.json"):
        select_files(packed)
    (packed / "NOTICE").unlink()
    (packed / "LICENSE").write_text("MIT")
    (packed / "NOTICE").symlink_to("LICENSE")
    chosen, _ = select_files(packed)
    assert {"NOTICE", "LICENSE"} <= set(chosen)
    moved = packed.rename(packed.with_name("moved"))  # the folder itself may be a link
    packed.symlink_to(moved)
    assert select_files(packed)[0] == chosen
