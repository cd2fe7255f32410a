"""How good a detector is on whole tomograms: the same tables, linking and metrics for every contestant.

A detector is a function from images to looks; what it says of an archive is written as a run of `motor-ray detect`,
without Ray, so that whatever reads such runs reads these.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.bench.accuracy_archives import Archive
from motor_ray.config import EvaluateSettings, RunSettings
from motor_ray.detector.rescore import train_rescorer
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.samples import sample_plan, with_labelled_spacing
from motor_ray.distributed.scoring import Looking, ScoreFrames
from motor_ray.errors import UnfinishedError
from motor_ray.motors.calibrate import best_threshold
from motor_ray.motors.evaluate import boxes_on_slices
from motor_ray.motors.link import Rescore, detections_of, link_slabs, slices_of
from motor_ray.motors.metrics import best_motors, count_tomograms
from motor_ray.motors.neighbourhood import Neighbourhoods, neighbourhoods
from motor_ray.motors.slice_metrics import mean_average_precision
from motor_ray.refining import candidates, out_of_fold
from motor_ray.results import evaluate_run, run_settings
from motor_ray.slab_plan import first_look
from motor_ray.storage import read_table, write_json, write_table
from motor_ray.tables import FAILURES, SLABS
from motor_ray.views import box_edges

Floats = NDArray[np.float64]

RECALL = 0.9
"""At which false positives are counted."""

ALARMS = "false_positives_at_recall"
"""What their number is called among scores."""


class Scorer(ScoreFrames):
    """ScoreFrames with any detector in it."""

    def __init__(self, settings: RunSettings, look: Looking) -> None:
        self._begin(settings, look, None)


def look_over(archive: Archive, look: Looking, settings: RunSettings) -> pa.Table:
    """The SLABS of a first look at an archive. Raises UnfinishedError if a slice could not be looked at."""
    plan = plan_of(archive, settings)
    load, score = LoadSlab(settings, contrasts=settings.detect.contrasts), Scorer(settings, look)
    slabs = pa.concat_tables([score(load(plan.slice(place, 1))) for place in range(len(plan))])
    statuses = set(slabs["slices"].combine_chunks().flatten().field("status").to_pylist())
    if statuses != {"ok"}:
        first = archive.manifest["tomo_id"][0]
        raise UnfinishedError(
            f"archive of {first}: slices are {', '.join(sorted(statuses - {'ok'}))}; the benchmark needs all"
        )
    return slabs.cast(SLABS)


def plan_of(archive: Archive, settings: RunSettings) -> pa.Table:
    """The PLAN of a first look at an archive, after which the benchmark takes no second one."""
    return pa.concat_tables(first_look(archive.manifest, settings))


def link_run(
    archive: Archive, slabs: pa.Table, settings: RunSettings, out: Path, rescore: Rescore | None = None
) -> None:
    """Link what was seen on the slices of an archive; written to the folder `out` as a finished run.

    Motors have scores by `rescore`, if it is given.
    """
    tables = {
        "tomograms": archive.manifest,
        "plan": plan_of(archive, settings),
        "slabs/all": slabs,
        "motors": link_slabs(slabs, archive.manifest, settings.link, rescore),
        "failures": FAILURES.empty_table(),
    }
    for name, table in tables.items():
        write_table(table, str(out / f"{name}.parquet"))
    write_json(str(out / "run.json"), {"status": "done", "settings": settings.model_dump(mode="json")})


def scores_of(calibration: Path, test: Path, labels: tuple[Labels, Labels], unseen: Iterable[float]) -> dict[str, Any]:
    """All scores of a detector on the test, at the threshold that is best on others, or that its settings give.

    `calibration` and `test` are finished runs, `labels` those of the two archives, `unseen` the voxel spacings that
    training did not see: F2 is told for those alone as well.
    """
    settings = with_threshold(calibration, labels[0])
    threshold = settings.threshold_or_usual
    said = evaluate_run(str(test), labels[1], settings)
    tomograms, motors = said["tomograms"], said["motors"]
    best = best_table(test, labels[1])
    strange = labels[1].tomograms.loc[labels[1].tomograms["voxel_spacing_angstrom"].isin(list(unseen)), "tomo_id"]
    far = count_tomograms(best[best["tomo_id"].isin(strange)], threshold, settings.radius_angstrom)
    return {
        **average_precisions(test, labels[1]),
        **{name: tomograms[name] for name in ("f2", "precision", "recall")},
        "f2_unseen_spacings": far.f_beta(2),
        "localisation_error_angstrom": motors["localisation_error_angstrom_median"],
        ALARMS: alarms(test, labels[1]),
        "threshold": threshold,
    }


def with_threshold(run: Path, labels: Labels) -> EvaluateSettings:
    """Settings with the threshold that has the best F2 on the finished run, unless the run's settings give another."""
    settings = run_settings(str(run)).evaluate
    if settings.threshold is not None:
        return settings
    threshold = best_threshold(best_table(run, labels), settings.radius_angstrom)
    return settings.model_copy(update={"threshold": threshold})


def average_precisions(run: Path, labels: Labels) -> dict[str, float | None]:
    """MAP on the labelled slices of a run: all that show a motor, and as many that clearly show none.

    These are chosen as training chooses its own. Between the two lie slices on which a motor is seen, but fades; to
    call a box there wrong would judge the labels' reach rather than the detector.
    """
    settings = run_settings(str(run))
    every = settings.train.model_copy(update={"slices_per_motor": 1000})
    manifest = with_labelled_spacing(read_table(str(run / "tomograms.parquet")), labels)
    plan = sample_plan(manifest, labels, settings.model_copy(update={"train": every}), settings.train.split_seed)
    chosen = {(row["tomo_id"], row["zs"][0]) for row in plan.to_pylist()}
    slices = slices_of(read_table(str(run / "slabs")))
    found: list[tuple[Floats, Floats]] = []
    truth: list[Floats] = []
    for row in manifest.to_pylist():
        own = slices.filter(pc.equal(slices["tomo_id"], row["tomo_id"]))
        own = own.filter(pa.array([(row["tomo_id"], z) in chosen for z in own["z"].to_pylist()], pa.bool_()))
        detections, spacing = detections_of(own), row["voxel_spacing_angstrom"]
        cuts = np.searchsorted(detections.slice_index, np.arange(1, len(own)))
        found += list(zip(np.split(detections.boxes, cuts), np.split(detections.scores, cuts), strict=True))[: len(own)]
        edges, reach = box_edges((row["size_y"], row["size_x"]), spacing, settings), settings.targets.reach_angstrom
        truth += boxes_on_slices(own["z"].to_numpy(), labels.motors_of(row["tomo_id"]), edges, reach / spacing)
    return mean_average_precision(found, truth)


def motors_of(run: Path) -> pd.DataFrame:
    """The MOTORS of a run."""
    motors: pd.DataFrame = read_table(str(run / "motors.parquet")).to_pandas()
    return motors


def best_table(run: Path, labels: Labels) -> pd.DataFrame:
    """One row per tomogram, see `best_motors`."""
    return best_motors(motors_of(run), labels.motors, labels.tomograms)


def alarms(run: Path, labels: Labels) -> float | None:
    """The `false_positives` of a finished run at RECALL, within the radius of its settings."""
    radius = run_settings(str(run)).evaluate.radius_angstrom
    return false_positives(motors_of(run), best_table(run, labels), RECALL, radius)


def false_positives(motors: pd.DataFrame, best: pd.DataFrame, recall: float, radius_angstrom: float) -> float | None:
    """Motors found in each tomogram without one, on average, at the highest threshold with that recall of tomograms.

    `motors` are a run's, `best` is the table of `best_motors`. None if no threshold gives it, or if there is none of
    either kind of tomogram.
    """
    empty = best.loc[~best["has_motor"], "tomo_id"]
    near = best["has_motor"] & (best["distance_angstrom"] <= radius_angstrom)
    hits = np.sort(best.loc[near, "score"].to_numpy(dtype=float))[::-1]
    wanted = int(np.ceil(recall * best["has_motor"].sum()))
    if not wanted or len(hits) < wanted or empty.empty:
        return None
    said = motors["tomo_id"].isin(empty) & (motors["score"] >= hits[wanted - 1])
    return float(said.sum() / len(empty))


def learn_rescoring(run: Path, archive: Archive, seed: int) -> Rescore:
    """A head learned from a finished run with features, as `motor-ray rescore` learns it.

    The run's own motors get the scores of heads that did not see their tomograms, so that a threshold may be learned
    from them as well.
    """
    there = candidates(str(run), archive.labels, EvaluateSettings().radius_angstrom)

    def train(around: Neighbourhoods, is_motor: NDArray[np.bool_]) -> Callable[[Neighbourhoods], Floats]:
        head = train_rescorer(*around, is_motor, seed=seed)
        return lambda others: head.score(*others)

    judged = there.motors.assign(score=out_of_fold(there, train, seed)).groupby("tomo_id")["score"]
    own = {name: scores.tolist() for name, scores in judged}
    settings, slabs = run_settings(str(run)), read_table(str(run / "slabs"))
    motors = link_slabs(slabs, archive.manifest, settings.link, lambda linked: own[linked.tomo_id])
    write_table(motors, str(run / "motors.parquet"))
    head = train(there.around, there.is_motor)
    return lambda linked: head(neighbourhoods(linked)).tolist()
