"""How good motors are: the official F2, and precision, recall, F1 and F2 of tomograms and of single motors.

Knows tables of positions, not files, settings or slices (those are in slice_metrics.py). A value that is not
defined, such as the precision of no detections, is None: NaN is not JSON, and 0 would be a claim.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from motor_ray.errors import MetricError
from motor_ray.motors.matching import outcomes, spacings_of

AXES = ["Motor axis 0", "Motor axis 1", "Motor axis 2"]
"""The official tables' z, y and x."""

CURVE = tuple(round(0.05 * step, 2) for step in range(21))
"""Thresholds of the curve that is reported."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Hits, false alarms and misses, and what follows from them."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float | None:
        """Share of the detections that are right; None without detections."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """Share of the motors that are found; None without motors."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    def f_beta(self, beta: float) -> float | None:
        """Recall weighs `beta` times as much as precision; None if there was nothing to find and nothing found."""
        hits = (1 + beta**2) * self.true_positives
        return _ratio(hits, hits + beta**2 * self.false_negatives + self.false_positives)

    def as_dict(self) -> dict[str, float | int | None]:
        """Everything, as JSON takes it."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f_beta(1),
            "f2": self.f_beta(2),
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
        }


def average_precision(scores: Floats, is_right: NDArray[np.bool_], there: int) -> float | None:
    """Mean precision at each of the motors that are `there`, as ``(n,)`` answers are taken best first; those that no
    answer is right about count 0, and equal scores are taken wrong answers first. None if there is no motor.
    """
    order = np.lexsort((is_right, -scores))
    hits = is_right[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return _ratio(float(precision[hits].sum()), there)


def official_counts(solution: pd.DataFrame, submission: pd.DataFrame, radius_angstrom: float = 1000.0) -> Counts:
    """What the official metric counts, one answer per tomogram.

    `solution` has the columns ``tomo_id``, the three AXES in voxels and ``Voxel spacing`` in angstrom,
    `submission` the same without the spacing. -1 on any axis says "no motor". Where both say motor, a distance up
    to the radius is a hit; farther away counts as one miss and no false alarm. A false alarm needs a tomogram
    without motor.

    Raises MetricError if a column is missing, an id occurs twice, the ids do not match one to one, or a number is
    not finite.
    """
    truth = _checked(solution, [*AXES, "Voxel spacing"], "solution")
    answer = _checked(submission, AXES, "submission")
    if odd := sorted(map(str, truth.index.symmetric_difference(answer.index))):
        raise MetricError(
            f"{len(odd)} tomograms are in only one of solution and submission, such as {', '.join(odd[:3])}; "
            "the ids must match one to one"
        )
    answer = answer.loc[truth.index]
    spacing = truth["Voxel spacing"].to_numpy()
    if (spacing <= 0).any():
        raise MetricError(f"solution: 'Voxel spacing' must be positive, got {spacing.min():g}")
    true, said = ((table[AXES] != -1).all(axis=1).to_numpy() for table in (truth, answer))
    voxels = np.linalg.norm(truth[AXES].to_numpy() - answer[AXES].to_numpy(), axis=1)
    hits = int((true & said & (voxels <= radius_angstrom / spacing)).sum())
    return Counts(hits, int((said & ~true).sum()), int(true.sum()) - hits)


def official_f_beta(
    solution: pd.DataFrame, submission: pd.DataFrame, *, beta: float = 2.0, radius_angstrom: float = 1000.0
) -> float:
    """The official score of a submission in [0, 1]; see `official_counts` for the rules. Nothing to score gives 0.

    Source: the metric of "BYU - Locating Bacterial Flagellar Motors 2025".

    >>> ids = {"tomo_id": ["a", "b", "c", "d"]}
    >>> true, said = [-1, 250, 100, 200], [100, 251, 600, -1]
    >>> solution = pd.DataFrame(ids | {axis: true for axis in AXES} | {"Voxel spacing": 10.0})
    >>> submission = pd.DataFrame(ids | {axis: said for axis in AXES})
    >>> official_f_beta(solution, submission)
    0.35714285714285715
    """
    return official_counts(solution, submission, radius_angstrom).f_beta(beta) or 0.0


def best_motors(motors: pd.DataFrame, truth_motors: pd.DataFrame, truth_tomograms: pd.DataFrame) -> pd.DataFrame:
    """One row per row of `truth_tomograms`: its best motor, as the official metric takes one answer per tomogram.

    `motors` has ``tomo_id, z, y, x, score``, `truth_motors` ``tomo_id, z, y, x`` and `truth_tomograms`
    ``tomo_id, voxel_spacing_angstrom``; positions in voxels.

    The official test has at most one motor per tomogram. Where there are several, any of them is right: the
    distance is that to the nearest one, and the tomogram still counts once.

    Returns ``tomo_id, has_motor, score, distance_angstrom``; the score is NaN where nothing was found, the
    distance where nothing was found or there is nothing to find.
    """
    best = best_of(motors)
    pairs = best.merge(truth_motors, on="tomo_id", suffixes=("", "_true"))
    steps = pairs[["z", "y", "x"]].to_numpy(dtype=float) - pairs[["z_true", "y_true", "x_true"]].to_numpy(dtype=float)
    nearest = pd.Series(np.linalg.norm(steps, axis=1), index=pairs["tomo_id"]).groupby(level=0).min()
    spacings = spacings_of(truth_tomograms)
    return pd.DataFrame(
        {
            "tomo_id": spacings.index,
            "has_motor": spacings.index.isin(truth_motors["tomo_id"]),
            "score": best.set_index("tomo_id")["score"].reindex(spacings.index).to_numpy(dtype=float),
            "distance_angstrom": (nearest.reindex(spacings.index) * spacings).to_numpy(dtype=float),
        }
    )


def best_of(motors: pd.DataFrame) -> pd.DataFrame:
    """The row with the best score of each tomogram; of equally good ones the one that is last in z, y, x."""
    return motors.sort_values(["score", "z", "y", "x"], ascending=False).drop_duplicates("tomo_id")


def count_tomograms(best: pd.DataFrame, threshold: float, radius_angstrom: float) -> Counts:
    """The official counts of the table of `best_motors` if scores from `threshold` on say "motor"."""
    hits, alarms = hits_and_alarms(best, radius_angstrom)
    true_positives = int((hits >= threshold).sum())
    return Counts(true_positives, int((alarms >= threshold).sum()), int(best["has_motor"].sum()) - true_positives)


def tomogram_scores(best: pd.DataFrame, threshold: float, radius_angstrom: float) -> dict[str, object]:
    """Scores of the table of `best_motors` at `threshold`, at the threshold with the best F2, and along CURVE.

    Always answering "motor" scores high in F2 on data where most tomograms have one, so read precision and the
    curve beside it. The best threshold was chosen on these very tomograms: it flatters.
    """
    candidates = np.unique(np.concatenate(hits_and_alarms(best, radius_angstrom)))
    scored = [_at(best, candidate, radius_angstrom) for candidate in candidates[::-1].tolist()]
    return {
        "n_tomograms": len(best),
        "n_with_motor": int(best["has_motor"].sum()),
        **_at(best, threshold, radius_angstrom),
        # Reversed, so that of equally good thresholds the highest one is told.
        "best": max(scored, key=lambda at: at["f2"] or 0.0, default=None),
        "curve": [_at(best, step, radius_angstrom) for step in CURVE],
    }


def motor_scores(
    motors: pd.DataFrame,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    threshold: float,
    radius_angstrom: float,
) -> dict[str, object]:
    """Scores of every single motor, for tomograms with several; arguments as in `best_motors`.

    Detections from `threshold` on are matched to true motors one to one within the radius; among the matchings
    with the most pairs the one with the least total distance counts. A far detection is a false alarm here.
    The localisation error is the distance in angstrom within the pairs.
    """
    found, missed, false = outcomes(motors, truth_motors, truth_tomograms, threshold, radius_angstrom)
    distances = found["distance_angstrom"].to_numpy(dtype=float)
    return {
        "n_motors": len(found) + len(missed),
        "threshold": threshold,
        **Counts(len(found), len(false), len(missed)).as_dict(),
        "localisation_error_angstrom_median": float(np.median(distances)) if len(distances) else None,
        "localisation_error_angstrom_p90": float(np.quantile(distances, 0.9)) if len(distances) else None,
    }


def _at(best: pd.DataFrame, threshold: float, radius_angstrom: float) -> dict[str, float | int | None]:
    return {"threshold": threshold, **count_tomograms(best, threshold, radius_angstrom).as_dict()}


def hits_and_alarms(best: pd.DataFrame, radius_angstrom: float) -> tuple[Floats, Floats]:
    """Scores of the right answers, and of the answers where there is no motor, in the table of `best_motors`."""
    scores = best["score"].to_numpy(dtype=float)
    said, has_motor = ~np.isnan(scores), best["has_motor"].to_numpy(dtype=bool)
    near = best["distance_angstrom"].to_numpy(dtype=float) <= radius_angstrom
    return scores[said & has_motor & near], scores[said & ~has_motor]


def _checked(table: pd.DataFrame, numbers: list[str], name: str) -> pd.DataFrame:
    """The columns `numbers` as floats by ``tomo_id``."""
    if missing := [column for column in ["tomo_id", *numbers] if column not in table]:
        raise MetricError(f"{name}: has no column {missing[0]!r}, only {', '.join(map(repr, table.columns))}")
    if table["tomo_id"].duplicated().any():
        twice = table["tomo_id"][table["tomo_id"].duplicated()].iloc[0]
        raise MetricError(f"{name}: tomogram {twice} has several rows; the official metric takes one row per tomogram")
    values = pd.DataFrame(
        {column: pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float) for column in numbers},
        index=pd.Index(table["tomo_id"]),
    )
    bad = values[~np.isfinite(values.to_numpy()).all(axis=1)]
    if len(bad):
        raise MetricError(
            f"{name}: tomogram {bad.index[0]} holds something that is not a finite number; -1 says 'no motor'"
        )
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
