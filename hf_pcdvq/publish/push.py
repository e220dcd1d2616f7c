"""Publishing a packed model on the Hugging Face Hub: `push_to_hub` for one in memory, `push_folder` for a saved one.

A push is refused before anything is sent if the folder is damaged, if its card states figures that were not measured,
or if the repository contains another model. The files to send are staged in a temporary folder, as links and a few
generated files, so the model's own folder is never modified. They go in one commit, unless there are hundreds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..calibration.report import NAME as REPORT
from ..evaluation.record import NAME as EVALUATION
from ..evaluation.record import EvaluationRecord, read_record
from ..evaluation.speed import NAME as SPEED
from ..files.companions import copy_companions, missing_companions
from ..files.marks import MODULE
from ..files.provenance import Provenance, hub_name, inherited_metadata
from ..files.records import package_versions, write_text
from ..files.scratch import scratch_folder
from .card import model_card, unmeasured_figures
from .errors import PushError, told_plainly
from .integrity import check_folder
from .loader_stub import add_loader_stub, remove_loader_stub
from .remote_model import refuse_other_model
from .selection import CARD, select_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Files of the previous model that must not remain if a push does not replace them.
_REPLACED = [
    "model*.safetensors*",
    "pytorch_model*.bin*",
    f"{REPORT}.*",
    f"{EVALUATION}.*",
    f"{SPEED}.json",
    f"{MODULE}.py",
]
_GENERATED = "<!-- Written by hf_pcdvq from the files beside it"


@dataclass(frozen=True)
class Publication:
    """The content of a push.

    Attributes:
        files: sizes in bytes by name in the repository.
        left_out: files of the folder that are not sent.
        card: the model card.
    """

    files: dict[str, int]
    left_out: tuple[str, ...]
    card: ModelCard


def push_to_hub(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    force: bool = False,
    commit_message: str | None = None,
    max_shard_size: str = "5GB",
    evaluation: str | Path | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
    loader_stub: bool = True,
    trust_remote_code: bool = False,
    work_dir: str | Path | None = None,
) -> CommitInfo:
    """Publish a packed model: weights, tokenizer, generation config, report, and a model card with the measurements.

    Args:
        model: quantized with `quantize_model` or while loading.
        tokenizer: its tokenizer, with the chat template if there is one, or its processor.
        repo_id: `"namespace/name"`; created if it does not exist.
        private: make a new repository private. None takes the default of the namespace.
        revision: branch to push to; created if it does not exist. None is the main branch.
        create_pr: open a pull request instead of changing the branch.
        token: access token; None takes the one that `hf auth login` stored.
        force: replace whatever model the repository contains.
        commit_message: None takes a default.
        max_shard_size: largest file, as for `save_pretrained`.
        evaluation: an `evaluation.json` that `hf-pcdvq eval` wrote for this model, or the folder that contains it.
        base_model: name of the original on the Hub; None takes the model that was quantized, if it is on the Hub.
        metadata: further YAML metadata for the card, such as `license`, `language` and further `tags`.
        loader_stub: add a module with which `trust_remote_code=True` loads the model without `import hf_pcdvq`, and to
            config.json what makes loading fail in one line without either. A model with code of its own gets no module,
            and a warning.
        trust_remote_code: run Python code that comes with the model, which checking it needs if its architecture is
            not in Transformers.
        work_dir: folder for the files until they are sent; they are deleted afterwards. None takes the system's
            temporary folder.

    Returns:
        The commit, with `commit_url` and, for a pull request, `pr_url`.

    Raises:
        ValueError: the model is not packed, its files are damaged, one of them is a link to something else, the card
            states figures that were not measured, or the repository contains another model.
        OSError: the files cannot be saved, or the evaluation does not exist.
        PushError: the Hub or the network failed; the message says what to do.
    """
    if getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"{type(model).__name__} is not packed; quantize it first")
    record = None if evaluation is None else read_record(Path(evaluation))
    with scratch_folder(work_dir) as folder:
        try:
            _save(model, tokenizer, folder, max_shard_size, record)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the files to push could not be saved in {folder}: {error}. Free some space, or pass another work_dir"
            ) from error
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            force=force,
            commit_message=commit_message,
            base_model=base_model,
            metadata=metadata,
            loader_stub=loader_stub,
            trust_remote_code=trust_remote_code,
        )


def _save(
    model: PreTrainedModel, tokenizer: Any, folder: Path, max_shard_size: str, evaluation: EvaluationRecord | None
) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    if model.name_or_path and Path(model.name_or_path).is_dir():
        missing = copy_companions(model.name_or_path, folder, model.config)
    else:
        missing = missing_companions(folder, model.config)
    for sentence in missing:
        logger.warning("%s", sentence)
    report = model.hf_quantizer.report
    if report is not None:
        report.write(folder)
    _provenance(model).write(folder)
    if evaluation is not None:
        evaluation.write(folder)


def _provenance(model: PreTrainedModel) -> Provenance:
    """The provenance of a model in memory: that of the packed folder it was loaded from, or a new one."""
    source = Path(model.name_or_path)
    local = bool(model.name_or_path) and source.is_dir()
    if model.hf_quantizer.pre_quantized:
        return Provenance.read(source) if local else Provenance()
    inherited = inherited_metadata(str(source)) if local else {}
    commit = getattr(model.config, "_commit_hash", None)
    return Provenance(hub_name(model.name_or_path), commit, None, package_versions(), inherited)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    force: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
    loader_stub: bool = True,
    include: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> CommitInfo:
    """Publish a packed model saved in a folder, with its tokenizer. An interrupted push resumes when it is repeated.

    Only files that a model needs are sent, see `selection.select_files`; `include` adds others, by their paths in the
    folder. The other arguments, return value and errors as for `push_to_hub`.
    """
    if create_pr and revision is not None:
        raise ValueError("create_pr opens a pull request against the main branch; omit the revision")
    _check_repo_id(repo_id)
    metadata = dict(metadata or {})
    with told_plainly(repo_id):
        inherited = {} if "license" in metadata else _inherited(folder, base_model, token)
    options: dict[str, Any] = {"loader_stub": loader_stub, "include": include, "trust_remote_code": trust_remote_code}
    with _staged(folder, repo_id, base_model, {**inherited, **metadata}, **options) as (staging, publication):
        if publication.card.data.get("license") is None:
            logger.warning(
                "the card of %s states no licence: pass one with --license, or metadata={'license': ...}", repo_id
            )
        api = HfApi(token=token)
        with told_plainly(repo_id):
            parent = _prepared_branch(api, repo_id, private, revision, create_pr, publication.card, staging, force)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                commit_message=commit_message or f"Upload {repo_id.split('/')[1]}, packed with hf_pcdvq",
                revision=revision,
                create_pr=create_pr,
                parent_commit=None if create_pr else parent,
                delete_patterns=_REPLACED,
            )


def planned(folder: Path, repo_id: str, **options: Any) -> Publication:
    """What `push_folder` would send, after all checks that need no network.

    Args:
        options: `base_model`, `metadata`, `loader_stub`, `include` and `trust_remote_code` of `push_folder`. The
            original's card is not looked up, so the licence is missing unless it was recorded during quantization, or
            is in `metadata`.

    Raises:
        ValueError, FileNotFoundError: see `push_to_hub`.
    """
    _check_repo_id(repo_id)
    with _staged(folder, repo_id, **options) as (_, publication):
        return publication


def _check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"the repository needs a namespace, as in your-name/{repo_id}")


def _inherited(folder: Path, base_model: str | None, token: str | bool | None) -> dict[str, Any]:
    """Licence and language from the original's card on the Hub, unless they were recorded during quantization."""
    provenance = Provenance.read(folder)
    original = base_model or provenance.original
    if provenance.inherited or original is None:
        return {}
    try:
        return inherited_metadata(original, token=token)
    except RepositoryNotFoundError:
        logger.warning("the original, %s, is not accessible on the Hub, so its licence is unknown", original)
        return {}


# ------------------------------------------------------------------------------------------------------- what is sent


@contextmanager
def _staged(
    folder: Path,
    repo_id: str,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
    loader_stub: bool = True,
    include: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Iterator[tuple[Path, Publication]]:
    """Check the model, and stage everything that is sent in a temporary folder."""
    count = check_folder(folder, trust_remote_code)
    chosen, left_out = select_files(folder, include, trust_remote_code)
    with scratch_folder() as staging:
        for name in chosen:
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((folder / name).resolve())
        if loader_stub:
            obstacle = add_loader_stub(staging)
            if obstacle is not None:
                logger.warning("%s", obstacle)
        else:
            remove_loader_stub(staging)
        has_stub = (staging / f"{MODULE}.py").exists()
        generated = model_card(count, repo_id, base_model=base_model, metadata=metadata, loader_stub=has_stub)
        card = _card(folder / CARD, generated)
        write_text(staging / CARD, str(card))
        yield staging, Publication(_sizes(staging), tuple(left_out), card)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _card(file: Path, generated: ModelCard) -> ModelCard:
    """The user's own card if there is one, which may only state measured figures; otherwise the generated card."""
    if not file.is_file() or _GENERATED in file.read_text(encoding="utf-8"):
        return generated
    own = ModelCard.load(file)
    unknown = unmeasured_figures(own, generated)
    if unknown:
        raise ValueError(
            f"{file} states figures that no measurement beside it contains: {', '.join(unknown)}. Measure them with "
            "hf-pcdvq eval, remove them, or delete the file to have a card generated"
        )
    return own


# --------------------------------------------------------------------------------------------------- where it is sent


def _prepared_branch(
    api: HfApi,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    card: ModelCard,
    staging: Path,
    force: bool,
) -> str | None:
    """Create repository and branch, or check that they may be changed. Returns the head of the branch."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise PushError(
                f"{repo_id} does not exist, or the token has no access to it; push without create_pr"
            ) from None
        api.create_repo(repo_id, private=private)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} already exists and is public. Make it private in its settings on the Hub, then push again"
        )
    if create_pr:
        return None
    if revision is not None:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
            return api.model_info(repo_id, revision=revision).sha  # a new branch has nothing to lose
    if not force:
        refuse_other_model(api, info, staging, card)
    return info.sha
