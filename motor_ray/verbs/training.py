"""Verbs that train detectors: one, or many that differ in a few settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from motor_ray.config import RunSettings
from motor_ray.errors import ConfigError
from motor_ray.verbs.flags import PretrainFlags, PseudoFlags, Result, TrainFlags, Unprefixed, all_settings

if TYPE_CHECKING:
    import pyarrow as pa

    from motor_ray.archive.labels import Labels


class Data(NamedTuple):
    """What is trained on, and how."""

    manifest: "pa.Table"
    labels: "Labels"
    settings: RunSettings

    unusable: list[str]
    """Why tomograms of the archive cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every verb is told that leaves a run behind."""

    archive: str
    """Folder or s3:// prefix that holds the tomograms."""

    storage: str
    """Folder or s3:// prefix for runs."""

    config: str | None = None
    """YAML file of settings; flags win over it."""


@dataclass(frozen=True, kw_only=True)
class OnLabels(Run):
    """What every verb that trains is told."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    settings: Annotated[TrainFlags, Unprefixed] = TrainFlags()

    def read(self) -> Data:
        """The tomograms, their labels and the settings."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.archive.manifest import find_tomograms

        settings = all_settings(self)
        manifest, failures = find_tomograms(self.archive, settings.archive)
        return Data(manifest, read_labels(self.labels, settings.archive), settings, failures["error"].to_pylist())


@dataclass(frozen=True, kw_only=True)
class GoesOn(Run):
    """What every verb is told whose work can be gone on with."""

    resume: bool = False
    """Go on with what is there of this name; what is done is not repeated."""

    or_resume: bool = False
    """As --resume if there is something of this name, else as without: for schedulers that start a job again."""

    def goes_on(self, name: str, record: str) -> bool:
        """Whether to go on with STORAGE/`name`, which is there if it has the file `record`."""
        from motor_ray.storage import exists, join

        return self.resume or (self.or_resume and exists(join(self.storage, name, record)))


@dataclass(frozen=True, kw_only=True)
class Resumable(GoesOn, OnLabels):
    """What every verb is told that trains on labels and can be gone on with."""


@dataclass(frozen=True, kw_only=True)
class Train(Resumable):
    """Train a detector on labelled tomograms."""

    name: str
    """Name of this run: checkpoints and metrics go to STORAGE/NAME."""

    workers: str = "1"
    """Processes that train together, one GPU each where there are GPUs; or MIN:MAX, as many as the cluster has room
    for, more or fewer as nodes come and go."""

    def run(self) -> Result:
        """Train."""
        from motor_ray.distributed.training import train

        workers = workers_from(self.workers)
        data = self.read()
        run = train(
            data.manifest,
            data.labels,
            data.settings,
            self.storage,
            self.name,
            workers=workers,
            resume=self.goes_on(self.name, "run.json"),
        )
        names = ("model", "epochs", "seconds", "tomograms", "slices", "best", "validation", "unread", "failed_looks")
        lost = run["unread"] or run["failed_looks"] or data.unusable
        return {name: run[name] for name in names} | {"unusable": data.unusable}, bool(lost)


@dataclass(frozen=True, kw_only=True)
class Ablate(Resumable):
    """Train with and without each part of the recipe, several times: what is each worth?"""

    name: str
    """Name of the study: its trials are runs STORAGE/NAME/VARIANT-SEED, beside ablation.json, .md and .png."""

    seeds: int = 3
    """Trainings of each variant, from other initial weights but on the same tomograms."""

    workers: str = "1"
    """Processes that train one trial together, or MIN:MAX; trials run beside one another where there is room."""

    def run(self) -> Result:
        """Train all of them."""
        from motor_ray.distributed.ablation import ablate

        workers = workers_from(self.workers)
        data = self.read()
        study = ablate(
            data.manifest,
            data.labels,
            data.settings,
            self.storage,
            self.name,
            seeds=self.seeds,
            workers=workers,
            resume=self.goes_on(self.name, "ablation.json"),
        )
        return study | {"unusable": data.unusable}, bool(study["failed"] or study["unread"] or data.unusable)


@dataclass(frozen=True, kw_only=True)
class Tune(Resumable):
    """Search the width of the targets and the weights of the loss for the best detector."""

    name: str
    """Name of the study: its trials are runs STORAGE/NAME/trial-NNN, beside tuning.json, .md, .png and best.yaml."""

    trials: int = 16
    """Settings to try, the given ones first; more of them may be asked for with --resume."""

    learning_rate: bool = False
    """Search the learning rate, too."""

    workers: str = "1"
    """Processes that train one trial together, or MIN:MAX; trials run beside one another where there is room."""

    def run(self) -> Result:
        """Search."""
        from motor_ray.distributed.tuning import tune

        workers = workers_from(self.workers)
        data = self.read()
        study = tune(
            data.manifest,
            data.labels,
            data.settings,
            self.storage,
            self.name,
            trials=self.trials,
            learning_rate=self.learning_rate,
            workers=workers,
            resume=self.goes_on(self.name, "tuning.json"),
        )
        return study | {"unusable": data.unusable}, bool(study["failed"] or study["unread"] or data.unusable)


@dataclass(frozen=True, kw_only=True)
class Pretrain(GoesOn):
    """Teach a backbone what slices look like, without labels, for `train --model.pretrained`."""

    name: str
    """Name of this run: STORAGE/NAME/best/backbone.safetensors is what comes of it."""

    workers: str = "1"
    """Processes that train together, or MIN:MAX, as for `train`."""

    settings: Annotated[PretrainFlags, Unprefixed] = PretrainFlags()

    def run(self) -> Result:
        """Pre-train."""
        from motor_ray.archive.manifest import find_tomograms
        from motor_ray.distributed.pretraining import pretrain

        workers = workers_from(self.workers)
        settings = all_settings(self)
        manifest, failures = find_tomograms(self.archive, settings.archive)
        resume = self.goes_on(self.name, "run.json")
        run = pretrain(manifest, failures, settings, self.storage, self.name, workers=workers, resume=resume)
        names = ("backbone", "epochs", "seconds", "tomograms", "slices", "best", "unread")
        unusable = failures["error"].to_pylist()
        return {name: run[name] for name in names} | {"unusable": unusable}, bool(run["unread"] or unusable)


@dataclass(frozen=True, kw_only=True)
class PseudoLabel(OnLabels):
    """Teach a detector what it is sure of on unlabelled tomograms, round by round."""

    name: str
    """Name of this run: its rounds are STORAGE/NAME/round-N, beside pseudo.json and report.md. The same command goes
    on where it stopped."""

    unlabelled: str | None = None
    """Folder or s3:// prefix of unlabelled tomograms; those of --archive that the labels do not mention when not
    given."""

    rounds: int = 2
    """Rounds of detecting, choosing and training; more may be asked for later."""

    model: str | None = None
    """Checkpoint to start with, in place of one that is trained on the labels alone."""

    workers: str = "1"
    """Processes that train together, or MIN:MAX, as for `train`."""

    settings: Annotated[PseudoFlags, Unprefixed] = PseudoFlags()

    def run(self) -> Result:
        """Label and train."""
        from motor_ray.archive.manifest import find_tomograms
        from motor_ray.distributed.pseudo import pseudo_label
        from motor_ray.tables import FAILURES

        workers = workers_from(self.workers)
        data = self.read()
        others, failures = None, FAILURES.empty_table()
        if self.unlabelled:
            others, failures = find_tomograms(self.unlabelled, data.settings.archive)
        run = pseudo_label(
            data.manifest,
            data.labels,
            others,
            failures,
            data.settings,
            self.storage,
            self.name,
            rounds=self.rounds,
            workers=workers,
            model=self.model,
        )
        unusable = [*data.unusable, *failures["error"].to_pylist()]
        lost = unusable or any(one["failures"] for one in run["rounds"])
        return {"model": run["model"], "rounds": run["rounds"], "unusable": unusable}, bool(lost)


def workers_from(text: str) -> tuple[int, int]:
    """The fewest and the most workers that ``--workers`` allows: "4" is (4, 4), "2:8" is (2, 8).

    Raises ConfigError if it is neither.
    """
    least, _, most = text.partition(":")
    try:
        workers = (int(least), int(most if ":" in text else least))
    except ValueError:
        workers = (0, 0)
    if not 1 <= workers[0] <= workers[1]:
        raise ConfigError(f"--workers {text}: expected a number such as 4, or the fewest and the most, such as 2:8")
    return workers
