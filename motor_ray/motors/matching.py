"""Which motors were found, which were missed, and which are none; knows tables of positions."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from motor_ray.errors import MetricError

Floats = NDArray[np.float64]

PLACE = ["tomo_id", "z", "y", "x"]


class Pairs(NamedTuple):
    """A matching; all ``(k,)``."""

    found: NDArray[np.int64]
    """Rows of the found places."""

    truth: NDArray[np.int64]
    """Rows of the true places that they were matched to."""

    distances: Floats


class Outcomes(NamedTuple):
    """What came of every motor; positions in voxels."""

    found: pd.DataFrame
    """True motors: ``tomo_id, z, y, x``, and the ``score`` and ``distance_angstrom`` of what found them; best first."""

    missed: pd.DataFrame
    """True motors that nothing found: ``tomo_id, z, y, x``."""

    false: pd.DataFrame
    """Detections that found no motor: ``tomo_id, z, y, x, score``; best first."""


def outcomes(
    motors: pd.DataFrame,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    threshold: float,
    radius_angstrom: float,
) -> Outcomes:
    """What came of every true motor, and of every detection from `threshold` on, in the tomograms of `truth_tomograms`.

    `motors` has ``tomo_id, z, y, x, score``, `truth_motors` ``tomo_id, z, y, x`` and `truth_tomograms`
    ``tomo_id, voxel_spacing_angstrom``; positions in voxels. For the matching see `match_motors`.
    """
    spacings = spacings_of(truth_tomograms)
    said = motors.loc[(motors["score"] >= threshold) & motors["tomo_id"].isin(spacings.index), [*PLACE, "score"]]
    true = truth_motors.loc[truth_motors["tomo_id"].isin(spacings.index), PLACE]
    pairs = match_all(said, true, spacings, radius_angstrom)
    found = true.iloc[pairs.truth].assign(
        score=said["score"].to_numpy()[pairs.found], distance_angstrom=pairs.distances
    )
    missed = true.iloc[np.setdiff1d(np.arange(len(true)), pairs.truth)]
    false = said.iloc[np.setdiff1d(np.arange(len(said)), pairs.found)]
    return Outcomes(_best_first(found), missed.reset_index(drop=True), _best_first(false))


def match_motors(found: Floats, truth: Floats, radius: float) -> Pairs:
    """The best one-to-one matching of ``(n, 3)`` and ``(m, 3)`` places within `radius`.

    Among the matchings with the most pairs it is the one with the least total distance.
    """
    distances = cdist(found, truth)
    possible = distances <= radius
    # One impossible pair costs more than all possible ones together: most pairs first, then least distance.
    impossible = (radius + 1) * (min(distances.shape) + 1)
    rows, columns = linear_sum_assignment(np.where(possible, distances, impossible))
    near = possible[rows, columns]
    return Pairs(rows[near], columns[near], distances[rows, columns][near])


def match_all(said: pd.DataFrame, true: pd.DataFrame, spacings: pd.Series, radius_angstrom: float) -> Pairs:
    """`match_motors` in every tomogram of `spacings`; rows are counted through the whole tables."""
    rows_said, rows_true = (table.groupby("tomo_id").indices for table in (said, true))
    matched = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for tomo_id, spacing in spacings.items():
        if tomo_id not in rows_said or tomo_id not in rows_true:
            continue
        own, theirs = np.asarray(rows_said[tomo_id]), np.asarray(rows_true[tomo_id])
        places = [
            table.iloc[rows][["z", "y", "x"]].to_numpy(dtype=float) * spacing
            for table, rows in ((said, own), (true, theirs))
        ]
        pairs = match_motors(places[0], places[1], radius_angstrom)
        matched.append(Pairs(own[pairs.found], theirs[pairs.truth], pairs.distances))
    return Pairs(*(np.concatenate(parts) for parts in zip(*matched, strict=True)))


def _best_first(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["score", *PLACE], ascending=False, ignore_index=True)


def spacings_of(truth_tomograms: pd.DataFrame) -> pd.Series:
    """Voxel spacing by tomogram; raises MetricError for a tomogram named twice or without spacing."""
    spacings = truth_tomograms.set_index("tomo_id")["voxel_spacing_angstrom"].astype(float)
    if spacings.index.has_duplicates:
        twice = spacings.index[spacings.index.duplicated()][0]
        raise MetricError(f"labels: tomogram {twice} occurs twice among the tomograms; expected one row each")
    unknown = spacings[~(spacings > 0)]
    if len(unknown):
        raise MetricError(
            f"labels: {len(unknown)} tomograms have no voxel spacing, such as {unknown.index[0]}; "
            "distances are judged in angstrom, so fill in 'Voxel spacing'"
        )
    return spacings
