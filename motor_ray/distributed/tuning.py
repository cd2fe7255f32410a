"""Search for better settings: the width of the targets, the weights of the loss, and the learning rate if asked.

Under ``storage/name`` appear the trials, each a run ``trial-NNN``, tuning.json (all that is known of them), tuning.md,
tuning.png and best.yaml, the settings of the best one. Trials that do worse than others at the same epoch are stopped
early (ASHA, arXiv 1810.05934).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import yaml
from scipy.stats import qmc

from motor_ray.archive.labels import Labels
from motor_ray.config import RunSettings
from motor_ray.distributed.study import GOAL, Study, Trial, changed, open_study, study_at
from motor_ray.distributed.trials import run_trials
from motor_ray.errors import ConfigError
from motor_ray.motors.study_figures import Searched, tuning_figure
from motor_ray.storage import join, write_bytes

SIGMA = (1.0, 4.0)
"""Heatmap cells. Narrower peaks fall between the cells, wider ones run into one another's motors."""

WEIGHTS = ("size_weight", "offset_weight", "giou_weight", "presence_weight")
"""What the parts of the loss weigh beside the heatmap, whose own weight stays: only ratios matter."""

WEIGHT_FACTOR = 10.0
LEARNING_RATE_FACTOR = 4.0
"""So many times less, and more, than the settings say."""

DIGITS = 3


class Range(NamedTuple):
    """Where a setting is searched."""

    group: str
    name: str
    low: float
    high: float
    logarithmic: bool

    @property
    def title(self) -> str:
        """The setting as in YAML and flags."""
        return f"{self.group}.{self.name}"

    def at(self, share: float) -> float:
        """The value at that share of the way from `low` to `high`, to three digits."""
        if self.logarithmic:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.{DIGITS}g}")


def tune(
    manifest: pa.Table,
    labels: Labels,
    settings: RunSettings,
    storage: str,
    name: str,
    *,
    trials: int,
    learning_rate: bool,
    workers: tuple[int, int],
    resume: bool,
) -> dict[str, Any]:
    """Try `trials` settings, `settings` themselves first; returns which was best, and which failed and why.

    A study that was stopped goes on with `resume`, also with more `trials`; those that are done are not repeated.
    Raises RunError as `train` does.
    """
    if trials < 2:
        raise ConfigError(f"--trials {trials}: expected 2 or more, of which the first has the settings as they are")
    space = search_space(settings, learning_rate=learning_rate)
    study = Study(study_at(storage, name), "tuning", manifest, labels, settings, workers)
    study, planned = open_study(study, tuning_trials(space, trials, settings.train.seed), resume=resume)
    ended = run_trials(study, planned, halving=True)
    best = best_trial(ended)
    write_bytes(join(study.uri, "tuning.md"), markdown(ended, space, settings).encode())
    tuning_figure(join(study.uri, "tuning.png"), [searched(ended, one, settings) for one in space], GOAL)
    if best:
        write_bytes(join(study.uri, "best.yaml"), as_yaml(changed(settings, best.changes)).encode())
    return {
        "study": study.uri,
        "trials": len(ended),
        "stopped": sum(trial.status == "stopped" for trial in ended),
        "failed": {trial.name: trial.reason for trial in ended if trial.status == "failed"},
        "unread": sum(trial.unread for trial in ended),
        "best": best and {"trial": best.name, "changes": best.changes, **best.scores},
        "config": best and join(study.uri, "best.yaml"),
    }


def search_space(settings: RunSettings, *, learning_rate: bool) -> list[Range]:
    """What is searched, and where. A weight of 0 switches a part of the loss off, and is left so."""
    space = [Range("targets", "sigma", *SIGMA, False)]
    weights = {name: weight for name in WEIGHTS if (weight := getattr(settings.loss, name))}
    space += [Range("loss", name, one / WEIGHT_FACTOR, one * WEIGHT_FACTOR, True) for name, one in weights.items()]
    if learning_rate:
        rate = settings.train.learning_rate
        space.append(Range("train", "learning_rate", rate / LEARNING_RATE_FACTOR, rate * LEARNING_RATE_FACTOR, True))
    return space


def tuning_trials(space: Sequence[Range], trials: int, seed: int) -> list[Trial]:
    """The settings as they are, then points spread evenly over `space`: the same for the same seed, however many.

    The points are Halton's: no two trials are near one another, as they may be if drawn independently.
    """
    points = qmc.Halton(len(space), rng=seed).random(trials - 1)
    drawn: list[dict[str, dict[str, float]]] = [{}]
    for point in points:
        changes: dict[str, dict[str, float]] = {}
        for one, share in zip(space, point, strict=True):
            changes.setdefault(one.group, {})[one.name] = one.at(share)
        drawn.append(changes)
    names = [f"trial-{number:03d}" for number in range(trials)]
    return [Trial(name=name, variant=name, changes=changes) for name, changes in zip(names, drawn, strict=True)]


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The trial that is done and has the highest score; None if there is none."""
    done = [trial for trial in trials if trial.status == "done" and trial.scores.get(GOAL) is not None]
    return max(done, key=lambda trial: trial.scores[GOAL] or 0.0, default=None)


def value_of(trial: Trial, one: Range, settings: RunSettings) -> float:
    """The value of a searched setting in a trial."""
    return float(trial.changes.get(one.group, {}).get(one.name, getattr(getattr(settings, one.group), one.name)))


def searched(trials: Sequence[Trial], one: Range, settings: RunSettings) -> Searched:
    """What the figure shows of a setting."""
    told = [(trial, score) for trial in trials if (score := trial.scores.get(GOAL)) is not None]
    return Searched(
        one.title,
        [value_of(trial, one, settings) for trial, _ in told],
        [score for _, score in told],
        [trial.status == "done" for trial, _ in told],
        range=(one.low, one.high),
        logarithmic=one.logarithmic,
        given=getattr(getattr(settings, one.group), one.name),
    )


def markdown(trials: Sequence[Trial], space: Sequence[Range], settings: RunSettings) -> str:
    """All trials, the best first."""
    columns = ["trial", *(one.title for one in space), "mAP@0.5", "mAP@0.7", "mAP@0.9", "tomogram F2", "epochs", ""]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for trial in sorted(trials, key=lambda one: _rank(one), reverse=True):
        values = [f"{value_of(trial, one, settings):g}" for one in space]
        scores = [_shown(trial.scores, name) for name in ("mAP@0.5", "mAP@0.7", "mAP@0.9", "tomogram F2")]
        lines.append(f"| {' | '.join([trial.name, *values, *scores, str(trial.epochs), trial.status])} |")
    lines += [
        "",
        "mAP of the best epoch, on validation slices; F2 on whole validation tomograms. trial-000 has the settings as "
        "given; 'stopped': others were better by then.",
    ]
    lines += [f"\n{trial.name} failed: {trial.reason}" for trial in trials if trial.status == "failed"]
    return "\n".join(lines) + "\n"


def as_yaml(settings: RunSettings) -> str:
    """All settings as a file for --config."""
    return str(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


def _rank(trial: Trial) -> tuple[bool, float]:
    return trial.status == "done", trial.scores.get(GOAL) or 0.0


def _shown(scores: Mapping[str, float | None], name: str) -> str:
    value = scores.get(name)
    return "-" if value is None else f"{value:.3f}"
