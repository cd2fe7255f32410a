"""What each part of the recipe is worth: training without any of them, then with one more at a time, on several seeds.

Under ``storage/name`` appear the trials, each a run ``<variant>-<seed>``, ablation.json (all that is known of them),
ablation.md (the table) and ablation.png. All trials see the same split; the seed decides the rest.
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from motor_ray.archive.labels import Labels
from motor_ray.config import RunSettings
from motor_ray.distributed.study import GOAL, SCORES, Study, Trial, open_study, study_at
from motor_ray.distributed.trials import run_trials
from motor_ray.errors import ConfigError
from motor_ray.motors.study_figures import VariantScores, ablation_figure
from motor_ray.storage import join, write_bytes

Changes = dict[str, dict[str, Any]]

PARTS: dict[str, Changes] = {
    "CLAHE": {"preprocess": {"clahe": False}},
    "noise and blur": {"augment": {"poisson_probability": 0.0, "blur_sigma_max": 0.0}},
    "focal and GIoU": {"loss": {"heatmap": "bce", "giou_weight": 0.0}},
}
"""The parts of the recipe in the order in which they are added, and the settings that leave each out."""

COLUMNS = (*SCORES, "tomogram F2")


class Estimate(NamedTuple):
    """A score of several trials."""

    mean: float

    deviation: float | None
    """Standard deviation over the trials; None for a single one."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.deviation is not None else "")


class Row(NamedTuple):
    """A line of the table."""

    variant: str
    trials: int
    done: int
    scores: dict[str, Estimate | None]

    gain: Estimate | None
    """How much better than the line before, in mAP@0.5, seed by seed."""


def ablate(
    manifest: pa.Table,
    labels: Labels,
    settings: RunSettings,
    storage: str,
    name: str,
    *,
    seeds: int,
    workers: tuple[int, int],
    resume: bool,
) -> dict[str, Any]:
    """Train every variant of `settings` with `seeds` seeds; returns the table, and which trials failed and why.

    A study that was stopped goes on with `resume`; trials that are done are not repeated. Raises ConfigError if
    `settings` lack one of the parts, RunError as `train` does.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: expected 1 or more")
    study = Study(study_at(storage, name), "ablation", manifest, labels, settings, workers)
    study, planned = open_study(study, ablation_trials(settings, seeds), resume=resume)
    trials = run_trials(study, planned, halving=False)
    rows = table_rows(trials)
    write_bytes(join(study.uri, "ablation.md"), markdown(rows, trials).encode())
    figure = [VariantScores(row.variant, *points(trials, row.variant)) for row in rows]
    ablation_figure(join(study.uri, "ablation.png"), figure, GOAL)
    return {
        "study": study.uri,
        "trials": len(trials),
        "failed": {trial.name: trial.reason for trial in trials if trial.status == "failed"},
        "unread": sum(trial.unread for trial in trials),
        "variants": [as_json(row) for row in rows],
    }


def variants(settings: RunSettings) -> dict[str, Changes]:
    """What to change in `settings` for each variant, from none of the PARTS to all of them, which changes nothing.

    Raises ConfigError if a part is not in `settings` to begin with.
    """
    for part, without in PARTS.items():
        if _merged([without]) == {group: _now(settings, group, values) for group, values in without.items()}:
            names = ", ".join(f"{group}.{name}" for group, values in without.items() for name in values)
            raise ConfigError(f"the settings are without {part} already ({names}), so adding it changes nothing")
    titles = ["plain", *(f"+ {part}" for part in PARTS)]
    return {title: _merged(list(PARTS.values())[added:]) for added, title in enumerate(titles)}


def ablation_trials(settings: RunSettings, seeds: int) -> list[Trial]:
    """The trials: seed by seed, so that the table is whole early."""
    ways = variants(settings)
    first = settings.train.seed
    return [
        Trial(name=f"{slug(variant)}-{seed}", variant=variant, changes=changes | {"train": {"seed": seed}})
        for seed in range(first, first + seeds)
        for variant, changes in ways.items()
    ]


def slug(variant: str) -> str:
    """A variant's name as part of a folder's: "+ noise and blur" is "noise-and-blur"."""
    return "-".join(re.findall(r"[a-z0-9]+", variant.lower()))


def table_rows(trials: Sequence[Trial]) -> list[Row]:
    """A line per variant, in the order of `trials`; what failed is left out of the means."""
    rows: list[Row] = []
    before: dict[int, float] = {}
    for variant in dict.fromkeys(trial.variant for trial in trials):
        own = [trial for trial in trials if trial.variant == variant]
        done = [trial for trial in own if trial.status == "done"]
        scores = {name: estimate(trial.scores.get(name) for trial in done) for name in COLUMNS}
        now = dict(zip(*points(trials, variant), strict=True))
        gain = estimate(now[seed] - before[seed] for seed in now.keys() & before.keys())
        rows.append(Row(variant, len(own), len(done), scores, gain))
        before = now
    return rows


def points(trials: Iterable[Trial], variant: str) -> tuple[list[int], list[float]]:
    """Seeds and mAP@0.5 of the trials of a variant that have one."""
    own = [trial for trial in trials if trial.variant == variant and trial.status == "done"]
    defined = [(trial.changes["train"]["seed"], trial.scores[GOAL]) for trial in own]
    known = [(seed, score) for seed, score in defined if score is not None]
    return [seed for seed, _ in known], [score for _, score in known]


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and standard deviation of the values that are defined; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Estimate(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def markdown(rows: Sequence[Row], trials: Iterable[Trial]) -> str:
    """The table, and below it what failed."""
    columns = ["variant", *COLUMNS, f"Δ {GOAL}", "trials"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [*(row.scores[name] for name in COLUMNS), row.gain]
        shown = ["-" if cell is None else str(cell) for cell in cells[:-1]]
        gain = "-" if row.gain is None else f"{'+' if row.gain.mean >= 0 else ''}{row.gain}"
        count = str(row.done) if row.done == row.trials else f"{row.done} of {row.trials}"
        lines.append(f"| {' | '.join([row.variant, *shown, gain, count])} |")
    lines += [
        "",
        "Mean ± standard deviation over seeds; the split is the same. mAP, precision and recall on validation slices, "
        "of the best epoch, F2 on whole validation tomograms. Δ is the difference to the line above, seed by seed.",
    ]
    lines += [f"\n{trial.name} failed: {trial.reason}" for trial in trials if trial.status == "failed"]
    return "\n".join(lines) + "\n"


def as_json(row: Row) -> dict[str, Any]:
    """A line of the table for programs."""

    def plain(one: Estimate | None) -> dict[str, float | None] | None:
        return None if one is None else {"mean": one.mean, "standard_deviation": one.deviation}

    scores = {name: plain(one) for name, one in row.scores.items()}
    return {
        "variant": row.variant,
        "trials": row.trials,
        "done": row.done,
        **scores,
        f"gain in {GOAL}": plain(row.gain),
    }


def _merged(parts: Iterable[Changes]) -> Changes:
    merged: Changes = {}
    for part in parts:
        for group, values in part.items():
            merged[group] = merged.get(group, {}) | values
    return merged


def _now(settings: RunSettings, group: str, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(getattr(settings, group), name) for name in names}
