"""Boxes along z become motors: tracks from slice to slice, cut where two motors lie in line.

Knows arrays of one tomogram and what a motor looks like along z; `motor_ray.motors.link` has the tables.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from motor_ray.config import LinkSettings

CORE = 0.5
"""A motor's position comes from its slices with more than this share of its best slice's score."""

VALLEY = 0.5
"""Between two motors of one track the score falls to at most this share of the weaker one's."""

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class Motor(NamedTuple):
    """One motor; position and size in voxels."""

    z: float
    y: float
    x: float
    height: float
    width: float
    score: float
    n_slices: int


class Candidate(NamedTuple):
    """A motor and what it was linked from."""

    motor: Motor
    detections: Floats
    """``(n, 6 + c)`` z, y, x, height, width, score and c features of each."""


def link_candidates(
    detections: Floats, looked_at: Rows, spacing_angstrom: float, settings: LinkSettings
) -> list[Candidate]:
    """The motors of one tomogram and what each was linked from, best first.

    Parameters
    ----------
    detections
        ``(n, 6 + c)`` z, y, x, height, width in voxels, the score in [0, 1], and whatever else; in any order.
    looked_at
        ``(m,)`` z of every slice that was looked at, with detections or without.
    spacing_angstrom
        Voxel spacing.
    settings
        Distances, and how many slices a motor needs.

    How: from slice to slice every detection continues the nearest track that ends within half the merge distance
    in the plane and within the gap along z, one to one, so a tilted motor may drift while two motors side by
    side stay two. A track with two peaks beyond the merge distance and a valley between them is two motors in
    line. Of motors nearer than the merge distance the best one stays.

    The score is the mean of the best slices' scores over as many slices as `evidence_angstrom` holds,
    slices without a detection counting 0. So one slice at 0.95 scores 0.08 where 12 slices are asked (160 angstrom at
    13.3) while a steady 0.6 scores 0.6; gaps cost nothing once enough slices agree; and within a track more
    or better detections never lower it. Position and size are averages over the track's core, weighted by score.
    """
    looked_at = np.union1d(looked_at, detections[:, 0].astype(np.int64))
    order = np.lexsort((*detections[:, [4, 3, 2, 1]].T, -detections[:, 5], detections[:, 0]))
    detections = detections[order]  # by z, then best first: the input's own order is forgotten here
    steps = _steps(looked_at)
    step_at = dict(zip(looked_at.tolist(), steps.tolist(), strict=True))
    fewest = min(settings.min_slices, len(looked_at))
    tracks = [detections[rows] for rows in _tracks(detections, step_at, spacing_angstrom, settings)]
    parts = [
        part
        for track in tracks
        if len(track) >= fewest
        for part in _parts(track, looked_at, spacing_angstrom, settings)
        if len(part) >= fewest
    ]
    candidates = []
    for part in parts:
        step = min(step_at[int(z)] for z in part[:, 0])
        needed = max(round(settings.evidence_angstrom / (spacing_angstrom * step)), 1)
        candidates.append(Candidate(_motor(part, min(needed, len(looked_at))), part))
    return _distinct(candidates, settings.merge_distance_angstrom / spacing_angstrom)


def _steps(looked_at: Rows) -> Rows:
    """Slices from each look to the next ones, the more of both sides; `looked_at` ascends.

    Elsewhere in a tomogram looks may be closer: where a motor was, and a closer look was taken.
    """
    gaps = np.diff(looked_at)
    if not len(gaps):
        return np.ones(len(looked_at), dtype=np.int64)
    # The last slice is looked at whatever the stride leaves before it, so the gap before that says more.
    return np.asarray(np.maximum(np.r_[gaps[0], gaps], np.r_[gaps, gaps[-2:][0]]))


def _tracks(
    detections: Floats, step_at: Mapping[int, int], spacing_angstrom: float, settings: LinkSettings
) -> list[Rows]:
    """Rows of each track, by z. A detection in the shadow of a better one on its slice is in none."""
    gate = settings.merge_distance_angstrom / 2 / spacing_angstrom
    gap = settings.max_gap_angstrom / spacing_angstrom
    places = detections[:, :3]
    track_of = np.full(len(places), -1)
    last = np.empty(0, dtype=np.int64)  # rows at which the open tracks end
    count = 0
    for rows in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places[:, 0])) + 1):
        shadowed = np.triu(cdist(places[rows, 1:], places[rows, 1:]) <= gate, k=1).any(axis=0)
        rows = rows[~shadowed]
        reach = gap + step_at[int(places[rows[0], 0])] if len(rows) else gap
        last = last[places[rows[:1], 0] - places[last, 0] <= reach]
        here, there = _assign(places[rows], places[last], gate, reach)
        track_of[rows[here]] = track_of[last[there]]
        fresh = np.delete(rows, here)
        track_of[fresh] = count + np.arange(len(fresh))
        count += len(fresh)
        last = np.concatenate([np.delete(last, there), rows])
    order = np.argsort(track_of, kind="stable")
    return np.split(order, np.searchsorted(track_of[order], np.arange(count)))[1:]


def _assign(here: Floats, ends: Floats, gate: float, reach: float) -> tuple[Rows, Rows]:
    """Which of the detections ``(n, 3)`` continue which of the tracks' ends ``(m, 3)``: least total distance."""
    in_plane = cdist(here[:, 1:], ends[:, 1:])
    possible = in_plane <= gate
    along_z = np.abs(here[:, None, 0] - ends[None, :, 0])
    # The price of an impossible pair is that of the worst possible one, so that no pair is bought at any cost.
    rows, columns = linear_sum_assignment(np.where(possible, np.hypot(in_plane, along_z), np.hypot(gate, reach)))
    taken = possible[rows, columns]
    return rows[taken], columns[taken]


def _parts(track: Floats, looked_at: Rows, spacing_angstrom: float, settings: LinkSettings) -> list[Floats]:
    """A track ``(n, 6 + c)``, cut in the valleys between motors that lie in line along z."""
    from scipy.signal import find_peaks  # takes 0.4 s to import, which the start of a run need not wait for

    zs = track[:, 0].astype(np.int64)
    far = settings.merge_distance_angstrom / spacing_angstrom
    if zs[-1] - zs[0] <= far:
        return [track]
    between = looked_at[(looked_at >= zs[0]) & (looked_at <= zs[-1])]
    scores = np.zeros(len(between))
    scores[np.searchsorted(between, zs)] = track[:, 5]
    along_z = np.interp(np.arange(zs[0], zs[-1] + 1), between, scores)
    window = max(round(settings.max_gap_angstrom / spacing_angstrom), 1)
    smooth = uniform_filter1d(np.pad(along_z, window), window, mode="constant")
    peaks, properties = find_peaks(smooth, distance=max(far, 1), prominence=0)
    peaks = peaks[properties["prominences"] >= (1 - VALLEY) * smooth[peaks]]
    valleys = [low + np.argmin(smooth[low:high]) for low, high in pairwise(peaks)]
    return np.split(track, np.searchsorted(zs, np.array(valleys, dtype=np.int64) - window + zs[0]))


def _motor(track: Floats, needed: int) -> Motor:
    """What the detections ``(n, 6 + c)`` of one track say together."""
    scores = track[:, 5]
    # What a slice has beyond the share, so that nothing jumps as a slice enters the core; scores may all be 0.
    weights = np.maximum(scores - CORE * scores.max(), 0) + np.finfo(np.float64).tiny
    if len(track) > 1:
        weights *= np.gradient(track[:, 0])  # a slice beside a gap speaks for half of it, or the gap would repel z
    z, y, x, height, width = (weights @ track[:, :5] / weights.sum()).tolist()
    score = float(np.sort(scores)[-needed:].sum() / needed)
    return Motor(z, y, x, height, width, min(score, 1.0), len(track))


def _distinct(candidates: list[Candidate], merge_distance: float) -> list[Candidate]:
    """The candidates, best first, without those within `merge_distance` voxels of a better one."""
    candidates = sorted(candidates, key=lambda one: best_first(one.motor))
    places = np.array([one.motor[:3] for one in candidates]).reshape(-1, 3)
    alone = np.ones(len(candidates), dtype=bool)
    for index in range(len(candidates)):
        if alone[index]:
            alone[index + 1 :] &= np.linalg.norm(places[index + 1 :] - places[index], axis=1) >= merge_distance
    return [one for one, stays in zip(candidates, alone, strict=True) if stays]


def best_first(motor: Motor) -> tuple[float, int, Motor]:
    """What motors are sorted by."""
    return -motor.score, -motor.n_slices, motor
