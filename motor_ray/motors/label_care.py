"""Labels that deserve a second look: likely missing, likely wrong, or somewhere else than the model says.

A good model disagrees with its labels mostly where the labels are wrong (Northcutt et al. 2021, "Confident Learning",
arXiv 1911.00068). Knows tables of detections and of labels, not files or pictures.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from motor_ray.config import CareSettings
from motor_ray.errors import LabelsError
from motor_ray.motors.link import by_tomogram, detections_of, slices_of
from motor_ray.motors.matching import match_motors, spacings_of

SUSPECTS = pa.schema(
    [
        ("rank", pa.int32()),
        ("tomo_id", pa.string()),
        ("z", pa.float64()),
        ("y", pa.float64()),
        ("x", pa.float64()),
        ("kind", pa.string()),  # missing, wrong or doubtful
        ("score", pa.float64()),
        ("distance_angstrom", pa.float64()),
        ("n_slices", pa.int32()),
        ("suspicion", pa.float64()),
        ("found_z", pa.float64()),
        ("found_y", pa.float64()),
        ("found_x", pa.float64()),
    ]
)
"""One row per suspect, most suspicious first; positions in voxels.

``z, y, x`` is the label, or for a missing one the detection. ``score`` is the model's there. ``distance_angstrom`` lies
between the label and the motor that the model found nearest to it, or the other way round for a missing label; null
where there is none. ``n_slices`` is how many slices the model saw the motor on, of a wrong label how many slices near
it were looked at. ``found_*`` is where the model sees the motor; null for a wrong label.
"""

KINDS = ("missing", "wrong", "doubtful")

Floats = NDArray[np.float64]
Row = dict[str, Any]


class Suspects(NamedTuple):
    """What came of comparing a run with labels."""

    table: pa.Table
    """SUSPECTS."""

    counts: dict[str, int]
    """Suspects by kind; ``labels`` that were judged, and ``found`` of them; ``unjudged`` labels whose slices could not
    all be read; tomograms that are ``not_looked_at`` or ``not_labelled``."""


class Seen(NamedTuple):
    """What a run says of one tomogram; positions in voxels."""

    tomo_id: str
    spacing: float
    motors: Floats
    """``(n, 5)`` z, y, x, score and number of slices."""

    peaks: Floats
    """``(m, 4)`` z, y, x and score of the detections of single slices."""

    zs: NDArray[np.int64]
    """``(k,)`` slices that were looked at."""

    readable: NDArray[np.bool_]
    """``(k,)`` whether each could be read."""


def find_suspects(
    slabs: pa.Table,
    motors: pa.Table,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    *,
    reach_angstrom: float,
    settings: CareSettings,
) -> Suspects:
    """Labels that a run contradicts, most suspicious first.

    Parameters
    ----------
    slabs, motors
        SLABS and MOTORS of the run.
    truth_motors, truth_tomograms
        ``tomo_id, z, y, x`` in voxels, and ``tomo_id, voxel_spacing_angstrom``, as in `evaluate`.
    reach_angstrom
        A slice shows a motor within this distance along z.
    settings
        Scores and distances.

    Labels and motors are matched one to one within the radius. A motor of ``missing_score`` or more that has no label
    is a missing one; a matched pair farther apart than ``agree_angstrom`` is doubtful; a label with no peak of
    ``wrong_score`` or more on any slice within the radius, although every slice near it could be read, is wrong.

    How suspicious: a missing label as the model is sure of it; a wrong one as little as the model sees there, times the
    share of labels that it does see, for a model that finds few says little about the others; a doubtful one by score
    and distance.

    Raises LabelsError if no tomogram is both labelled and looked at, MetricError if one has no voxel spacing.
    """
    spacings = {str(name): float(value) for name, value in spacings_of(truth_tomograms).items()}
    places = {name: own[["z", "y", "x"]].to_numpy(np.float64) for name, own in truth_motors.groupby("tomo_id")}
    looked_at = set(slabs["tomo_id"].to_pylist())
    if not looked_at & spacings.keys():
        raise LabelsError(
            f"none of the {len(looked_at)} tomograms that were looked at is labelled; the labels speak of "
            f"{', '.join(list(spacings)[:3])}: do run and labels belong together?"
        )
    counts = Counter(dict.fromkeys([*KINDS, "labels", "found", "unjudged"], 0))
    counts["not_looked_at"], counts["not_labelled"] = len(spacings.keys() - looked_at), len(looked_at - spacings.keys())
    rows: list[Row] = []
    for seen in _seen(slabs, motors, spacings):
        rows += _compare(seen, places.get(seen.tomo_id, np.empty((0, 3))), counts, reach_angstrom, settings)
    counts.update(row["kind"] for row in rows)
    recall = counts["found"] / max(counts["labels"], 1)
    ranked = sorted((row | {"suspicion": _suspicion(row, recall, settings)} for row in rows), key=_order)
    table = [row | {"rank": rank} for rank, row in enumerate(ranked, start=1)]
    return Suspects(pa.Table.from_pylist(table, schema=SUSPECTS), dict(counts))


def _seen(slabs: pa.Table, motors: pa.Table, spacings: dict[str, float]) -> Iterator[Seen]:
    """What the run says of each labelled tomogram."""
    columns = ["z", "y", "x", "score", "n_slices"]
    found = pd.DataFrame({name: motors[name].to_numpy() for name in ["tomo_id", *columns]})
    motors_of = {name: own[columns].to_numpy(np.float64) for name, own in found.groupby("tomo_id")}
    for tomo_id, slices in by_tomogram(slices_of(slabs)):
        if tomo_id in spacings:
            zs = slices["z"].to_numpy().astype(np.int64)
            peaks = detections_of(slices)
            places = np.column_stack([zs[peaks.slice_index], peaks.boxes[:, :2], peaks.scores])
            readable = np.asarray(slices["status"].to_numpy()) == "ok"
            yield Seen(tomo_id, spacings[tomo_id], motors_of.get(tomo_id, np.empty((0, 5))), places, zs, readable)


def _compare(
    seen: Seen, labels: Floats, counts: Counter[str], reach_angstrom: float, settings: CareSettings
) -> Iterator[Row]:
    """The suspects of one tomogram, whose labels are ``(n, 3)``; `counts` is told of the labels that were judged."""
    motors = seen.motors[seen.motors[:, 3] >= settings.wrong_score]
    pairs = match_motors(motors[:, :3] * seen.spacing, labels * seen.spacing, settings.radius_angstrom)
    apart = cdist(motors[:, :3], labels) * seen.spacing
    counts.update(labels=len(pairs.truth), found=len(pairs.truth))
    for motor, label, distance in zip(*pairs, strict=True):
        if distance > settings.agree_angstrom:
            yield _row(seen, "doubtful", labels[label], motors[motor], distance)
    for motor in np.setdiff1d(np.arange(len(motors)), pairs.found):
        if motors[motor, 3] >= settings.missing_score:
            yield _row(seen, "missing", motors[motor, :3], motors[motor], _nearest(apart[motor]))
    for label in np.setdiff1d(np.arange(len(labels)), pairs.truth):
        near = np.abs(seen.zs - labels[label, 0]) * seen.spacing <= reach_angstrom
        if not near.any() or not seen.readable[near].all():
            counts["unjudged"] += 1
            continue
        best = _best_peak(seen, labels[label], settings.radius_angstrom)
        is_seen = best >= settings.wrong_score
        counts.update(labels=1, found=int(is_seen))
        if not is_seen:
            evidence = np.array([np.nan, np.nan, np.nan, best, near.sum()])
            yield _row(seen, "wrong", labels[label], evidence, _nearest(apart[:, label]))


def _best_peak(seen: Seen, place: Floats, radius_angstrom: float) -> float:
    """The highest score on any slice within the radius of `place`; 0 without any."""
    distances = np.linalg.norm(seen.peaks[:, :3] - place, axis=1) * seen.spacing
    return float(seen.peaks[distances <= radius_angstrom, 3].max(initial=0.0))


def _nearest(distances: Floats) -> float | None:
    return float(distances.min()) if len(distances) else None


def _row(seen: Seen, kind: str, place: Floats, motor: Floats, distance: float | None) -> Row:
    z, y, x = place.tolist()
    found = dict.fromkeys(("found_z", "found_y", "found_x")) if np.isnan(motor[0]) else _found(motor)
    own = {"tomo_id": seen.tomo_id, "z": z, "y": y, "x": x, "kind": kind, "distance_angstrom": distance}
    return own | {"score": float(motor[3]), "n_slices": int(motor[4])} | found


def _found(motor: Floats) -> dict[str, Any]:
    return dict(zip(("found_z", "found_y", "found_x"), motor[:3].tolist(), strict=True))


def _suspicion(row: Row, recall: float, settings: CareSettings) -> float:
    if row["kind"] == "wrong":
        return float(recall * (1 - row["score"]))
    share = row["distance_angstrom"] / settings.radius_angstrom if row["kind"] == "doubtful" else 1.0
    return float(row["score"] * share)


def _order(row: Row) -> tuple[Any, ...]:
    return (-row["suspicion"], row["tomo_id"], row["z"], row["y"], row["x"])
