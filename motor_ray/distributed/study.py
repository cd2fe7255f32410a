"""A study: what its trials have in common, and the file in which all that is known of them is written down.

A trial is a training run like any other, ``STUDY/<trial>``, with a few settings of its own. Resuming takes nothing but
the file and the runs.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from motor_ray.archive.labels import Labels, split_labelled
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_differences, settings_from
from motor_ray.distributed.samples import with_labelled_spacing
from motor_ray.distributed.training import check_name, new_model, plan_part, read_metrics
from motor_ray.distributed.training_loop import rank_of
from motor_ray.errors import RunError
from motor_ray.progress import Show
from motor_ray.storage import absolute, exists, join, read_json, write_json
from motor_ray.tables import table_hash

GOAL = "mAP@0.5"
"""The score by which trials are compared."""

SCORES = ("mAP@0.5", "mAP@0.7", "mAP@0.9", "precision", "recall")
"""What is told of a trial's best model on the validation slices."""

TOMOGRAM_SCORES = {"tomogram F2": "f2", "tomogram precision": "precision", "tomogram recall": "recall"}
"""What is told of it on whole validation tomograms, and what `evaluate` calls it."""


class Trial(BaseModel):
    """A run of a study, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    variant: str
    """Trials of one variant differ in the seed only."""

    changes: dict[str, dict[str, Any]]
    """Its settings, where they are not the study's, by group."""

    status: Literal["waiting", "done", "stopped", "failed"] = "waiting"
    """'stopped': given up early, because others were better by then."""

    reason: str | None = None
    """Why it failed."""

    epochs: int = 0
    scores: dict[str, float | None] = {}
    unread: int = 0
    """Slices that could not be read."""


class Study(NamedTuple):
    """What the trials of a study have in common."""

    uri: str
    kind: Literal["ablation", "tuning"]
    manifest: pa.Table
    labels: Labels
    settings: RunSettings
    workers: tuple[int, int]

    frames: str = ""
    """Name of the decoded frames that trials on the same slices share."""

    @property
    def record(self) -> str:
        """Where the trials are written down."""
        return join(self.uri, f"{self.kind}.json")

    @property
    def data_hash(self) -> str:
        """Equal for the same tomograms and labels."""
        return table_hash(self.manifest, pa.Table.from_pandas(self.labels.motors, preserve_index=False))


def open_study(study: Study, planned: Sequence[Trial], *, resume: bool) -> tuple[Study, list[Trial]]:
    """The study, named, and its trials with what is known of them; those that failed wait for another try.

    Raises RunError if there is a study of this name and `resume` is not asked for, or the other way round, or if it is
    another one; LabelsError or CheckpointError if no trial could start.
    """
    if not resume:
        if exists(study.uri):
            raise RunError(f"{study.uri}: is there already; give another --name, or --resume to go on with it")
        require_trainable(study, planned)
        return study._replace(frames=uuid.uuid4().hex[:12]), list(planned)
    if not exists(study.record):
        raise RunError(f"{study.uri}: there is no {study.kind} to resume; leave --resume away to start one")
    there = read_json(study.record)
    if differences := settings_differences(there["settings"], study.settings.model_dump(mode="json")):
        raise RunError(f"{study.uri}: was started with other settings: {'; '.join(differences)}; resume with the same")
    if there["data_hash"] != study.data_hash:
        raise RunError(f"{study.uri}: was started with other labels or tomograms; resume with the same")
    known = {trial.name: trial for trial in map(Trial.model_validate, there["trials"])}
    asked = {trial.name: trial.changes for trial in planned}
    if lost := [name for name, trial in known.items() if asked.get(name) != trial.changes]:
        raise RunError(
            f"{study.uri}: has {len(known)} trials, of which {len(lost)} are not among those asked for, such as "
            f"{lost[0]}; resume with the same options, or more trials"
        )
    trials = [known.get(trial.name, trial) for trial in planned]
    again = {"status": "waiting", "reason": None}
    trials = [trial.model_copy(update=again) if trial.status == "failed" else trial for trial in trials]
    return study._replace(frames=there["frames"]), trials


def require_trainable(study: Study, planned: Iterable[Trial]) -> None:
    """Raises now what would otherwise stop every trial: wrong values, labels that do not fit, weights that lack."""
    for trial in planned:
        changed(study.settings, trial.changes)
    manifest = with_labelled_spacing(study.manifest, study.labels)
    split = split_labelled(manifest["tomo_id"].to_pylist(), study.labels, study.settings.train.split_seed)
    for part in ("train", "validation"):
        plan_part(manifest, study.labels, study.settings, split[part], part)
    new_model(study.settings)


def study_at(storage: str, name: str) -> str:
    """The folder of a study. Raises RunError for a name that cannot be a folder's."""
    check_name(name)
    return join(absolute(storage), name)


def outcome(trial: Trial, run_uri: str) -> Trial:
    """`trial` with what its run says of itself; a run that is not done was stopped."""
    run = read_json(join(run_uri, "run.json"))
    if run["status"] == "done":
        tomograms = (run["validation"] or {}).get("tomograms", {})
        scores = {name: run["best"][name] for name in SCORES}
        scores |= {name: tomograms.get(key) for name, key in TOMOGRAM_SCORES.items()}
        found = {"status": "done", "epochs": run["epochs"], "scores": scores, "unread": run["unread"]}
    else:
        lines = read_metrics(run_uri)
        best = max(lines, key=rank_of)
        scores = {name: best[name] for name in SCORES} | dict.fromkeys(TOMOGRAM_SCORES)
        found = {"status": "stopped", "epochs": lines[-1]["epoch"] + 1, "scores": scores}
    return trial.model_copy(update=found | {"reason": None})


def changed(settings: RunSettings, changes: Mapping[str, Mapping[str, Any]]) -> RunSettings:
    """`settings` with the values of `changes`, by group. Raises ConfigError for values that cannot be."""
    values = settings.model_dump(mode="json")
    return settings_from(values | {group: values[group] | dict(some) for group, some in changes.items()})


class Record:
    """The trials and what is known of them, written down whenever one ends."""

    def __init__(self, study: Study, trials: Iterable[Trial], show: Show) -> None:
        self.study, self.show = study, show
        self.trials = {trial.name: trial for trial in trials}
        self.best = {trial.name: trial.scores.get(GOAL) or 0.0 for trial in self.trials.values() if trial.scores}
        self.running: set[str] = set()
        self.console = Console(stderr=True)

    def save(self) -> None:
        """Write them down, and show how many are done."""
        content = {
            "settings": self.study.settings.model_dump(mode="json"),
            "data_hash": self.study.data_hash,
            "frames": self.study.frames,
            "trials": [trial.model_dump(mode="json") for trial in self.trials.values()],
        }
        write_json(self.study.record, content)
        self.draw()

    def started(self, name: str) -> None:
        """A trial runs."""
        self.running.add(name)
        self.draw()

    def reported(self, name: str, best: float) -> None:
        """A trial is that good by now."""
        self.best[name] = best
        self.draw()

    def ended(self, name: str) -> None:
        """A trial is done, or was stopped."""
        trial = self.trials[name]
        self._settle(outcome(trial, join(self.study.uri, name)) if trial.status == "waiting" else trial)

    def fail(self, name: str, reason: str) -> None:
        """A trial failed."""
        self._settle(self.trials[name].model_copy(update={"status": "failed", "reason": reason}))

    def _settle(self, trial: Trial) -> None:
        """Write down what came of a trial, unless that is known from before: then it was only told again."""
        self.running.discard(trial.name)
        if self.trials[trial.name].status == "waiting":
            self.trials[trial.name] = trial
            self.save()
            if not self.console.is_terminal:
                text = trial.reason or f"{GOAL} {trial.scores[GOAL] or 0.0:.3f} after {trial.epochs} epochs"
                self.console.print(
                    f"{self.study.kind}: {trial.name} {trial.status}, {text}", highlight=False, soft_wrap=True
                )

    def draw(self) -> None:
        """Show how far the study is."""
        ended = sum(trial.status != "waiting" for trial in self.trials.values())
        text = f"{len(self.running)} running"
        if self.best:
            name = max(self.best, key=lambda one: self.best[one])
            text += f", best {GOAL} {self.best[name]:.3f} ({name})"
        self.show(ended, text)
