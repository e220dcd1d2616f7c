"""What a recovery did to a model. `provenance.json` beside the saved model keeps it, and its card states it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..evaluation.metrics import Evaluation
from ..files.provenance import Provenance, Recovered, hub_name
from ..files.text import without_place


@dataclass(frozen=True)
class RecoveryReport:
    """A finished recovery.

    Attributes:
        settings: the options, JSON-clean.
        teacher: name or folder of the original; None if unknown.
        text: what was trained on, in words.
        held_out: what it was judged on, in words.
        windows, length: number of different windows that were trained on, and tokens per window.
        steps: steps that were done; fewer than the settings ask for if held-out text no longer improved.
        best_step: the step whose result is kept; 0 if nothing was better than the model before.
        parameters: how many numbers were trained.
        seconds: duration of the training, that of interrupted runs included.
        seconds_per_step: median duration of a step, without evaluations; None if a finished run was only taken up again.
        device: name of the device.
        before, after: compared with the original on the held-out text.
        losses: training loss of every step, KL(original || student) in nats per prediction.
        evaluations: pairs of a step and the mean KL on held-out text after it.
    """

    settings: dict[str, Any]
    teacher: str | None
    text: str
    held_out: str
    windows: int
    length: int
    steps: int
    best_step: int
    parameters: int
    seconds: float
    seconds_per_step: float | None
    device: str
    before: Evaluation
    after: Evaluation
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def over_adapted(self) -> bool:
        """Whether the model predicts the held-out text better than its original, which it was to imitate: it has learnt the
        text rather than the original."""
        return self.record().over_adapted

    def notes(self) -> list[str]:
        """What a user has to know, a sentence each."""
        notes = []
        if not self.best_step:
            notes.append(
                "recovery did not improve the model on held-out text, so it is unchanged; try a lower learning rate, or "
                "other text"
            )
        if self.over_adapted:
            notes.append(
                f"over-adapted: on held-out text the model's perplexity is {self.after.perplexity_packed:.2f}, below the "
                f"original's {self.after.perplexity_original:.2f}; it has learnt the domain of the text rather than the "
                "original. Train on other text, or in fewer steps"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean."""
        return {**asdict(self), "over_adapted": self.over_adapted}

    def record(self, command: str | None = None) -> Recovered:
        """What `provenance.json` keeps; of files on this machine only their names, because it is published."""
        return Recovered(
            teacher=hub_name(self.teacher),
            text=without_place(self.text),
            held_out=without_place(self.held_out),
            windows=self.windows,
            length=self.length,
            held_out_windows=self.after.windows,
            held_out_length=self.after.context_length,
            steps=self.steps,
            best_step=self.best_step,
            batch=self.settings["batch"],
            learning_rate=self.settings["learning_rate"],
            seconds=self.seconds,
            device=self.device,
            perplexity_original=self.after.perplexity_original,
            perplexity_before=self.before.perplexity_packed,
            perplexity_after=self.after.perplexity_packed,
            kl_before=self.before.kl_mean,
            kl_after=self.after.kl_mean,
            command=command,
        )

    def write(self, folder: str | Path, command: str | None = None, base: str | Path | None = None) -> None:
        """Add the recovery to the `provenance.json` of a saved model.

        Args:
            folder: of the saved model.
            command: the command line; None if the model was recovered from Python.
            base: folder of the model that was recovered, whose provenance (original, licence, ...) is taken over; None
                adds to what is in `folder`.

        Raises:
            ValueError: there is a record of a recovery already, which this one would replace.
        """
        folder = Path(folder)
        base = folder if base is None else Path(base)
        refuse_recovered(base)
        replace(Provenance.read(base), recovery=self.record(command)).write(folder)


def refuse_recovered(folder: Path) -> None:
    """Refuse a model that was recovered already: only one recovery is recorded, with the figures before it.

    Raises:
        ValueError: its provenance says so.
    """
    if Provenance.read(folder).recovery is not None:
        raise ValueError(
            f"the model in {folder} was recovered already, and one recovery is recorded; recover the packed model that it "
            "was made from, in more steps"
        )
