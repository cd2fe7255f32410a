"""What a checkpoint learns after training, from a finished run of it on labelled tomograms.

Joins the detector's files, runs and labels, which know nothing of one another.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.config import EvaluateSettings
from motor_ray.detector.description import (
    CALIBRATION,
    RESCORED_CALIBRATION,
    RESCORER,
    describe_checkpoint,
    rescorer_hash,
)
from motor_ray.errors import MetricError, RunError
from motor_ray.motors.calibrate import best_threshold, calibrate
from motor_ray.motors.calibration import Calibration, Method, Origin, origin_of
from motor_ray.motors.evaluate import need_all
from motor_ray.motors.link import link_tomograms
from motor_ray.motors.matching import match_all, spacings_of
from motor_ray.motors.metrics import average_precision, best_motors, count_tomograms
from motor_ray.motors.neighbourhood import Neighbourhoods, neighbourhoods, stacked
from motor_ray.motors.reliability import reliability_figure
from motor_ray.results import Row, finished_run, run_settings
from motor_ray.storage import exists, join, read_table, remove, write_bytes, write_json


def calibrate_run(
    detections: str,
    labels: Labels,
    settings: EvaluateSettings,
    method: Method,
    quantile: float,
    *,
    model: str | None,
    picture: str,
) -> dict[str, Any]:
    """Learn from which score on a tomogram has a motor; what `motor-ray calibrate` prints.

    `settings` has the radius, and the threshold of the method ``fixed``. The calibration goes into the checkpoint
    `model`, if one is given, and a reliability plot to the file `picture`.

    Raises RunError if there is no finished run, or if it is another model's; MetricError if a tomogram is not labelled
    or all of them are of one kind. Then nothing is written.
    """
    run = finished_run(detections)
    check_model(detections, run, model)
    origin = origin_of(run_settings(detections), run["model_sha256"], run.get("rescorer_sha256"))
    best = labelled_answers(detections, labels)
    if model and origin.rescorer_sha256:
        check_head(detections, model, origin.rescorer_sha256, best["tomo_id"])
    usual = settings.threshold_or_usual
    try:
        learned = calibrate(best, method, settings.radius_angstrom, threshold=usual, quantile=quantile, origin=origin)
    except MetricError as error:
        raise MetricError(f"{detections}: {error}") from None
    reliability_figure(picture, best, learned)
    written = join(model, RESCORED_CALIBRATION if origin.rescorer_sha256 else CALIBRATION) if model else None
    if written:
        write_json(written, learned.model_dump(mode="json"))
    return {"written": written, "picture": picture, **shown(learned)}


def shown(calibration: Calibration) -> Row:
    """A calibration as JSON, but for the origin of the scores."""
    return calibration.model_dump(mode="json", exclude={*Origin._fields})


def check_model(detections: str, run: Row, model: str | None) -> None:
    """Raises RunError if the run under `detections` is not one of the checkpoint `model` alone, if that is given."""
    if model is None:
        return
    if (several := len(run.get("models", []))) > 1:
        raise RunError(
            f"{detections}: {several} models answered together, and of several nothing is kept in a checkpoint; "
            "motor-ray calibrate without --model tells a threshold, which --evaluate.threshold takes"
        )
    ours, theirs = describe_checkpoint(model).sha256, run["model_sha256"]
    if ours != theirs:
        raise RunError(
            f"{detections}: was made by the model {theirs[:12]}, and {model} is {ours[:12]}; scores differ between "
            "models, so give the --model that the run was made with, or detect anew with this one"
        )


def check_head(detections: str, model: str, rescorer_sha256: str, tomo_ids: pd.Series) -> None:
    """Raises RunError if the head with that hash is not in the checkpoint `model`, or learned from these tomograms."""
    from motor_ray.detector.rescore import learned_from  # torch takes 3 s to import

    if rescorer_hash(model) != rescorer_sha256:
        raise RunError(
            f"{detections}: its motors were judged by another head than {model} has now; give its motor-ray detect "
            "command again, which judges them anew, and then calibrate"
        )
    known = tomo_ids[tomo_ids.isin(learned_from(model))]
    if len(known):
        raise RunError(
            f"{detections}: the scores of {len(known)} tomograms, such as {known.iloc[0]}, are by a head that learned "
            "from these very tomograms, so a threshold would flatter; motor-ray rescore has kept one already, from "
            "scores of heads that did not know them. Give a run on other labelled tomograms, or none"
        )


def labelled_answers(detections: str, labels: Labels) -> pd.DataFrame:
    """The best motor of each tomogram of a run, as `best_motors` has it; MetricError if one is not labelled."""
    looked_at = set(read_table(join(detections, "tomograms.parquet"), columns=["tomo_id"])["tomo_id"].to_pylist())
    need_all(looked_at, set(labels.tomograms["tomo_id"]), "labels")
    motors = read_table(join(detections, "motors.parquet")).to_pandas()
    tomograms = labels.tomograms[labels.tomograms["tomo_id"].isin(looked_at)]
    return best_motors(motors, labels.motors, tomograms)


FOLDS = 5
"""Parts of the tomograms, each of which is judged by a head that was trained on the others."""


class Candidates(NamedTuple):
    """What a run linked in labelled tomograms, and what of it is true."""

    motors: pd.DataFrame
    """``tomo_id, z, y, x, score``, one row each."""

    around: Neighbourhoods
    is_motor: NDArray[np.bool_]

    truth_motors: pd.DataFrame
    truth_tomograms: pd.DataFrame
    """Of the tomograms that were looked at."""


Train = Callable[[Neighbourhoods, NDArray[np.bool_]], Callable[[Neighbourhoods], NDArray[np.float64]]]
"""Makes of some candidates what scores others."""


def rescore_run(
    detections: str, labels: Labels, settings: EvaluateSettings, *, model: str, force: bool, seed: int = 420
) -> Row:
    """Learn to tell motors from what was taken for one; what `motor-ray rescore` prints.

    Scores before and after are those of tomograms that each head was not trained on. The head that goes into the
    checkpoint `model` is trained on all of them, and goes there only if average precision grew and F2 did not fall; or
    with `force`. With it goes a calibration that is learned from the scores after, unless all tomograms have motors.

    Raises RunError if there is no finished run with features, or if it is another model's; MetricError if a tomogram is
    not labelled, or if too few tomograms have candidates of either kind.
    """
    from motor_ray.detector.rescore import rescorer_file, train_rescorer  # torch takes 3 s to import

    run = finished_run(detections)
    check_model(detections, run, model)
    there = candidates(detections, labels, settings.radius_angstrom)

    def train(around: Neighbourhoods, is_motor: NDArray[np.bool_]) -> Callable[[Neighbourhoods], NDArray[np.float64]]:
        head = train_rescorer(*around, is_motor, seed=seed)
        return lambda others: head.score(*others)

    judged = out_of_fold(there, train, seed)
    scores = there.motors["score"].to_numpy(dtype=np.float64)
    before, after = (worth(there, some, settings.radius_angstrom) for some in (scores, judged))
    told = {"candidates": len(scores), "motors": int(there.is_motor.sum()), "before": before, "after": after}
    better = after["average_precision"] > before["average_precision"] and after["f2"] >= before["f2"]
    if not (better or force):
        return {"written": None, "better": better, **told}
    head = train_rescorer(*there.around, there.is_motor, seed=seed)
    data = rescorer_file(head, run["model_sha256"], told, there.truth_tomograms["tomo_id"])
    origin = origin_of(run_settings(detections), run["model_sha256"], hashlib.sha256(data).hexdigest())
    best = best_motors(there.motors.assign(score=judged), there.truth_motors, there.truth_tomograms)
    learned = None if best["has_motor"].all() else calibrate(best, "fitted", settings.radius_angstrom, origin=origin)
    write_bytes(join(model, RESCORER), data)
    if learned:
        write_json(join(model, RESCORED_CALIBRATION), learned.model_dump(mode="json"))
    elif exists(join(model, RESCORED_CALIBRATION)):  # another head's
        remove(join(model, RESCORED_CALIBRATION))
    return {"written": join(model, RESCORER), "better": better, **told}


def candidates(detections: str, labels: Labels, radius_angstrom: float) -> Candidates:
    """What the finished run under `detections` linked, and which of it lies within the radius of a true motor.

    Raises MetricError if a tomogram is not labelled, RunError if detections have no features.
    """
    manifest, slabs = (read_table(join(detections, name)) for name in ("tomograms.parquet", "slabs"))
    looked_at = set(manifest["tomo_id"].to_pylist())
    need_all(looked_at, set(labels.tomograms["tomo_id"]), "labels")
    linked = [one for one in link_tomograms(slabs, manifest, run_settings(detections).link) if one.candidates]
    if not linked:
        raise MetricError(f"{detections}: nothing was found in any tomogram, so there is nothing to learn from")
    rows = [(one.tomo_id, *found.motor[:3], found.motor.score) for one in linked for found in one.candidates]
    motors = pd.DataFrame(rows, columns=["tomo_id", "z", "y", "x", "score"])
    tomograms = labels.tomograms[labels.tomograms["tomo_id"].isin(looked_at)]
    truth = labels.motors[labels.motors["tomo_id"].isin(looked_at)]
    is_motor = np.zeros(len(motors), dtype=bool)
    is_motor[match_all(motors, truth, spacings_of(tomograms), radius_angstrom).found] = True
    return Candidates(motors, stacked([neighbourhoods(one) for one in linked]), is_motor, truth, tomograms)


def out_of_fold(there: Candidates, train: Train, seed: int) -> NDArray[np.float64]:
    """``(n,)`` scores of candidates by heads that saw no candidate of their tomograms."""
    fold_of = folds(there.motors["tomo_id"], there.is_motor, seed)
    scores = np.empty(len(fold_of))
    for fold in range(FOLDS):
        own = fold_of == fold
        judge = train(_some(there.around, ~own), there.is_motor[~own])
        scores[own] = judge(_some(there.around, own))
    return scores


def folds(tomo_ids: pd.Series, is_motor: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Which of FOLDS parts each candidate is in: those of a tomogram together, motors in each.

    Raises MetricError if fewer than FOLDS tomograms have a candidate that is a motor, or one that is none.
    """
    kinds = pd.DataFrame({"motor": is_motor, "other": ~is_motor}).groupby(tomo_ids.to_numpy()).any()
    few = kinds.sum().min()
    if few < FOLDS:
        raise MetricError(
            f"{int(kinds['motor'].sum())} tomograms have a candidate that is a motor and {int(kinds['other'].sum())} "
            f"one that is none; re-scoring is learned from at least {FOLDS} of either. Detect in more tomograms, and "
            "with a lower --detect.score-threshold for more candidates that are none"
        )
    shuffled = kinds.sample(frac=1, random_state=seed).sort_values(["motor", "other"], kind="stable").index
    fold_of = pd.Series(np.arange(len(shuffled)) % FOLDS, index=shuffled)
    return np.asarray(fold_of[tomo_ids].to_numpy())


def worth(there: Candidates, scores: NDArray[np.float64], radius_angstrom: float) -> dict[str, float]:
    """Average precision of candidates with these `scores`, and F2 of tomograms at the best threshold."""
    best = best_motors(there.motors.assign(score=scores), there.truth_motors, there.truth_tomograms)
    threshold = best_threshold(best, radius_angstrom)
    return {
        "average_precision": average_precision(scores, there.is_motor, len(there.truth_motors)) or 0.0,
        "f2": count_tomograms(best, threshold, radius_angstrom).f_beta(2) or 0.0,
        "best_threshold": threshold,
    }


def _some(around: Neighbourhoods, rows: NDArray[np.bool_]) -> Neighbourhoods:
    return Neighbourhoods(*(part[rows] for part in around))
