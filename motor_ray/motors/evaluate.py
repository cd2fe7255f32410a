"""Detections against labels: everything that is worth reporting, as one dict.

Knows the tables of a run and of the labels; how large a true box is on a slice is told to it, because only the
frame knows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.config import EvaluateSettings
from motor_ray.errors import MetricError
from motor_ray.motors.link import by_tomogram, detections_of, slices_of
from motor_ray.motors.metrics import best_motors, motor_scores, tomogram_scores
from motor_ray.motors.slice_metrics import slice_scores

Floats = NDArray[np.float64]


def evaluate(
    slabs: pa.Table,
    motors: pa.Table,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    box_edges: Mapping[str, tuple[float, float]],
    *,
    reach_angstrom: float,
    settings: EvaluateSettings | None = None,
) -> dict[str, Any]:
    """Scores of a run over the tomograms that were looked at, ready for JSON.

    Parameters
    ----------
    slabs, motors
        SLABS and MOTORS of the run.
    truth_motors
        ``tomo_id, z, y, x`` in voxels, one row per motor.
    truth_tomograms
        ``tomo_id, voxel_spacing_angstrom``, one row per labelled tomogram, those without motors included.
    box_edges
        Height and width, in voxels, of a true box on the slices of each tomogram that was looked at.
    reach_angstrom
        A slice shows a motor within this distance along z.
    settings
        Threshold and radius.

    Returns ``{"slices": ..., "tomograms": ..., "motors": ...}``. Slices that could not be read are left out of
    "slices", but their motors are still to be found in the other two. Labelled tomograms that were not looked at
    are counted in ``tomograms.n_not_looked_at`` and otherwise left out.

    Raises MetricError if a tomogram that was looked at has no labels, no voxel spacing or no box.
    """
    settings = settings or EvaluateSettings()
    slices = slices_of(slabs)
    looked_at = set(slices["tomo_id"].to_pylist()) | set(slabs["tomo_id"].to_pylist())
    need_all(looked_at, set(truth_tomograms["tomo_id"]), "labels")
    need_all(looked_at, set(box_edges), "box sizes")
    tomograms = truth_tomograms[truth_tomograms["tomo_id"].isin(looked_at)]
    true = truth_motors[truth_motors["tomo_id"].isin(looked_at)]
    columns = ["tomo_id", "z", "y", "x", "score"]
    found = pd.DataFrame({name: motors[name].to_numpy() for name in columns})
    found = found[found["tomo_id"].isin(looked_at)]
    threshold = settings.threshold_or_usual
    limits = (threshold, settings.radius_angstrom)
    return {
        "slices": _slices(slices, true, tomograms, box_edges, reach_angstrom, threshold),
        "tomograms": {
            "n_not_looked_at": len(truth_tomograms) - len(tomograms),
            **tomogram_scores(best_motors(found, true, tomograms), *limits),
        },
        "motors": motor_scores(found, true, tomograms, *limits),
    }


def boxes_on_slices(
    zs: NDArray[np.integer], motors: Floats, edges: tuple[float, float], reach_voxels: float
) -> list[Floats]:
    """For each of the slices `zs` the ``(n, 4)`` true boxes, around those motors ``(m, 3)`` that are within reach."""
    boxes = np.hstack([motors[:, 1:], np.broadcast_to(edges, (len(motors), 2))])
    return [boxes[np.abs(motors[:, 0] - z) <= reach_voxels] for z in zs]


def _slices(
    slices: pa.Table,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    box_edges: Mapping[str, tuple[float, float]],
    reach_angstrom: float,
    threshold: float,
) -> dict[str, Any]:
    spacings = truth_tomograms.set_index("tomo_id")["voxel_spacing_angstrom"].to_dict()
    motors_of = truth_motors.groupby("tomo_id").indices
    places = truth_motors[["z", "y", "x"]].to_numpy(dtype=float)
    found: list[tuple[Floats, Floats]] = []
    truth: list[Floats] = []
    readable = np.asarray(slices["status"].to_numpy()) == "ok"
    for tomo_id, of_tomogram in by_tomogram(slices.filter(pa.array(readable))):
        boxes = detections_of(of_tomogram)
        cuts = np.searchsorted(boxes.slice_index, np.arange(1, len(of_tomogram)))
        found += zip(np.split(boxes.boxes, cuts), np.split(boxes.scores, cuts), strict=True)
        true = places[motors_of.get(tomo_id, np.empty(0, dtype=np.int64))]
        reach = reach_angstrom / spacings[tomo_id]
        truth += boxes_on_slices(of_tomogram["z"].to_numpy(), true, box_edges[tomo_id], reach)
    return {"n_unreadable": int((~readable).sum()), **slice_scores(found, truth, threshold)}


def need_all(looked_at: set[str], known: set[str], what: str) -> None:
    """Raises MetricError if a tomogram that was looked at is not among those whose labels, say, are known."""
    if missing := sorted(looked_at - known):
        raise MetricError(
            f"{len(missing)} of {len(looked_at)} tomograms that were looked at have no {what}, such as "
            f"{', '.join(missing[:3])}; give {what} for all of them, or detect in the labelled ones only"
        )
