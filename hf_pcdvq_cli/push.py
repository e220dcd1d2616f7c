"""`hf-pcdvq push`, `hf-pcdvq check` and `hf-pcdvq card`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import Command, echo_json, json_option, loader_stub_option, note, saved_folder

if TYPE_CHECKING:
    from hf_pcdvq.publish.push import Publication

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _card_options(command: Callable) -> Callable:
    """Options for what a card says and no file in the folder states."""
    for option in (
        loader_stub_option,
        click.option(
            "--language",
            multiple=True,
            metavar="CODE",
            help="Language of the model; may be repeated. [default: the original's]",
        ),
        click.option(
            "--license", metavar="ID", help="Licence id on the Hub: apache-2.0, ... [default: the original's]"
        ),
        click.option(
            "--base-model",
            metavar="NAME",
            help="The original on the Hub. [default: the one recorded by quantize, if it is on the Hub]",
        ),
    ):
        command = option(command)
    return command


def _trust_option(command: Callable) -> Callable:
    return click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")(
        command
    )


def _card_arguments(
    base_model: str | None, license: str | None, language: tuple[str, ...], loader_stub: bool
) -> dict:
    metadata: dict[str, Any] = {"license": license} if license else {}
    if language:
        metadata["language"] = list(language)
    return {"base_model": base_model, "metadata": metadata, "loader_stub": loader_stub}


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Push to this branch, which is created if necessary. [default: main]"
)
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--token", help="Access token. [default: the one that `hf auth login` stored]")
@click.option("--dry-run", is_flag=True, help="Only check the model, and list what would be sent. Needs no network.")
@click.option("--force", is_flag=True, help="Replace whatever model REPO contains.")
@click.option(
    "--include", multiple=True, metavar="FILE", help="Also send this file, by its path in DIR. May be repeated."
)
@_trust_option
@_card_options
def push(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    dry_run: bool,
    force: bool,
    include: tuple[str, ...],
    trust_remote_code: bool,
    **card: Any,
) -> None:
    """Publish the packed model in DIR on the Hugging Face Hub as REPO, with a model card.

    Only files that a model needs are sent; --dry-run names those that stay behind, and --include adds to them. The card
    states the measurements saved with the model: quantization_report.json, evaluation.json and speed.json. The push is
    refused if DIR is damaged, if your own README.md states other figures, or if REPO contains another model. An
    interrupted push resumes when it is started again.

    \b
    Example:
      hf-pcdvq push qwen-2bit me/Qwen3-0.6B-2bit --dry-run
      hf-pcdvq push qwen-2bit me/Qwen3-0.6B-2bit --private
    """
    from hf_pcdvq.publish.push import planned, push_folder

    if create_pr and revision:
        raise click.UsageError("--create-pr opens a pull request against the main branch; omit --revision")
    options = {**_card_arguments(**card), "include": include, "trust_remote_code": trust_remote_code}
    if dry_run:
        _show(planned(folder, repo, **options), repo)
        return
    commit = push_folder(
        folder,
        repo,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        token=token,
        force=force,
        **options,
    )
    click.echo(commit.pr_url or commit.commit_url)


def _show(publication: Publication, repo: str) -> None:
    from rich.table import Table

    from hf_pcdvq.files.size import readable_size
    from hf_pcdvq.files.text import visible

    from .tables import as_is, show

    table = Table(title=f"Would be pushed to {repo}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    for name, size in publication.files.items():
        table.add_row(as_is(name), readable_size(size))
    table.add_section()
    table.add_row("total", readable_size(sum(publication.files.values())), style="bold")
    show(table)
    if publication.left_out:
        note(f"Left out: {visible(', '.join(publication.left_out))}")
    if publication.card.data.get("license") is None:
        note("The licence is unknown; a push looks it up on the Hub if the original is there, or pass --license")


@click.command(cls=Command)
@click.argument("model")
@json_option
@_trust_option
def check(model: str, as_json: bool, trust_remote_code: bool) -> None:
    """Check the integrity of the packed MODEL. Reads all its files, but makes no model of them.

    Every tensor that config.json requires must be there in the right shape, no shard may be truncated, tensors and
    settings must have the hashes with which they were saved, all scales must be finite, and the tokenizer must match
    the model.

    \b
    Example:
      hf-pcdvq check qwen-2bit
    """
    from hf_pcdvq.files.size import readable_size
    from hf_pcdvq.publish.integrity import check_folder

    count = check_folder(saved_folder(model), trust_remote_code)
    if as_json:
        echo_json(count.to_dict())
        return
    click.echo(f"{model} is complete: {len(count.layers)} packed layers, {readable_size(count.file_bytes)}")


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("repo", metavar="REPO")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file. [default: print it]"
)
@_trust_option
@_card_options
def card(folder: Path, repo: str, out: Path | None, trust_remote_code: bool, **options: Any) -> None:
    """Write the model card that the packed model in DIR would have if it were published as REPO.

    \b
    Example:
      hf-pcdvq card qwen-2bit me/Qwen3-0.6B-2bit --base-model Qwen/Qwen3-0.6B --license apache-2.0
    """
    from hf_pcdvq.files.records import write_text
    from hf_pcdvq.publish.push import planned

    text = str(planned(folder, repo, **_card_arguments(**options), trust_remote_code=trust_remote_code).card)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)
