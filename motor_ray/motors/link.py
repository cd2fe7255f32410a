"""Boxes on slices become motors in three dimensions.

Knows the tables of a run and what a motor looks like along z; knows neither files nor the network, and looks at
one tomogram at a time.
"""

from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from motor_ray.config import LinkSettings
from motor_ray.errors import ManifestError
from motor_ray.tables import MOTORS, SLABS, SLICE

SLICES = pa.schema([("slab_id", pa.string()), ("tomo_id", pa.string()), *SLICE])
"""One row per slice that was looked at: SLABS unnested."""

EVIDENCE_ANGSTROM = 60.0
"""A motor must be seen along this much of z to reach its slices' score: half of what training calls a motor."""

CORE = 0.5
"""A motor's position comes from its slices with more than this share of its best slice's score."""

VALLEY = 0.5
"""Between two motors of one track the score falls to at most this share of the weaker one's."""

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class Detections(NamedTuple):
    """What was found on some slices; all arrays have one entry per detection."""

    slice_index: NDArray[np.int64]
    """``(n,)`` row of the slices' table."""

    boxes: Floats
    """``(n, 4)`` centre y, x, height, width in voxels."""

    scores: Floats
    """``(n,)`` in [0, 1]."""


class Motor(NamedTuple):
    """One motor; position and size in voxels."""

    z: float
    y: float
    x: float
    height: float
    width: float
    score: float
    n_slices: int


def slices_of(slabs: pa.Table) -> pa.Table:
    """SLABS unnested: one SLICES row per slice, in the slabs' order."""
    slabs = slabs.select(SLABS.names).cast(SLABS)
    nested = slabs["slices"].combine_chunks()
    owners = pc.list_parent_indices(nested)
    columns = [slabs[name].take(owners) for name in ("slab_id", "tomo_id")]
    return pa.table([*columns, *pc.list_flatten(nested).flatten()], schema=SLICES)


def link_slabs(slabs: pa.Table, manifest: pa.Table, settings: LinkSettings | None = None) -> pa.Table:
    """The MOTORS of every tomogram in `slabs`, by tomogram and then best first.

    All slabs of a tomogram must be there; their order and how slices are spread over them do not matter. A
    tomogram without motors has no row. Raises ManifestError if one is not in `manifest`.
    """
    settings = settings or LinkSettings()
    slices = slices_of(slabs)
    spacings = manifest_column(slices, manifest, "voxel_spacing_angstrom")
    rows = []
    for tomo_id, of_tomogram in by_tomogram(slices.filter(pc.equal(slices["status"], "ok"))):
        spacing = spacings[tomo_id]
        known = spacing is not None and spacing > 0
        zs = of_tomogram["z"].to_numpy()
        found = detections_of(of_tomogram)
        table = np.column_stack([zs[found.slice_index], found.boxes, found.scores])
        motors = link_motors(table, zs, spacing if known else settings.assumed_spacing_angstrom, settings)
        own = {"tomo_id": tomo_id, "voxel_spacing_angstrom": spacing if known else None}
        rows += [own | motor._asdict() for motor in motors]
    return pa.Table.from_pylist(rows, schema=MOTORS)


def by_tomogram(slices: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each tomogram, tomograms in the order of their ids."""
    ids = slices["tomo_id"].combine_chunks().dictionary_encode()
    codes = ids.indices.to_numpy()
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes)))[:-1]
    for tomo_id, rows in sorted(zip(ids.dictionary.to_pylist(), groups, strict=True), key=itemgetter(0)):
        yield tomo_id, slices.take(rows)


def detections_of(slices: pa.Table) -> Detections:
    """All detections on `slices`, a table with the column ``detections`` of SLICES."""
    nested = slices["detections"].combine_chunks()
    columns = [np.asarray(column, dtype=np.float64) for column in pc.list_flatten(nested).flatten()]
    return Detections(
        slice_index=np.asarray(pc.list_parent_indices(nested), dtype=np.int64),
        boxes=np.column_stack(columns[:4]),
        scores=columns[4],
    )


def link_motors(detections: Floats, looked_at: Rows, spacing_angstrom: float, settings: LinkSettings) -> list[Motor]:
    """The motors of one tomogram, best first.

    Parameters
    ----------
    detections
        ``(n, 6)`` z, y, x, height, width in voxels and the score in [0, 1], in any order.
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

    The score is the mean of the best slices' scores over as many slices as EVIDENCE_ANGSTROM holds, slices
    without a detection counting 0. So one slice at 0.95 scores 0.19 where five slices are asked (13.3
    angstrom) while a steady 0.6 scores 0.6; gaps cost nothing once enough slices agree; and within a track more
    or better detections never lower it. Position and size are averages over the track's core, weighted by score.
    """
    looked_at = np.union1d(looked_at, detections[:, 0].astype(np.int64))
    order = np.lexsort((*detections[:, [4, 3, 2, 1]].T, -detections[:, 5], detections[:, 0]))
    detections = detections[order]  # by z, then best first: the input's own order is forgotten here
    step = int(np.diff(looked_at).min()) if len(looked_at) > 1 else 1
    needed = max(round(EVIDENCE_ANGSTROM / (spacing_angstrom * step)), 1)
    needed = min(needed, max(len(looked_at), 1))
    fewest = min(settings.min_slices, len(looked_at))
    tracks = [detections[rows] for rows in _tracks(detections, step, spacing_angstrom, settings) if len(rows) >= fewest]
    parts = [part for track in tracks for part in _parts(track, looked_at, spacing_angstrom, settings)]
    motors = [_motor(part, needed) for part in parts if len(part) >= fewest]
    return _distinct(motors, settings.merge_distance_angstrom / spacing_angstrom)


def _tracks(detections: Floats, step: int, spacing_angstrom: float, settings: LinkSettings) -> list[Rows]:
    """Rows of each track, by z. A detection in the shadow of a better one on its slice is in none."""
    gate = settings.merge_distance_angstrom / 2 / spacing_angstrom
    reach = settings.max_gap_angstrom / spacing_angstrom + step
    places = detections[:, :3]
    track_of = np.full(len(places), -1)
    last = np.empty(0, dtype=np.int64)  # rows at which the open tracks end
    count = 0
    for rows in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places[:, 0])) + 1):
        shadowed = np.triu(cdist(places[rows, 1:], places[rows, 1:]) <= gate, k=1).any(axis=0)
        rows = rows[~shadowed]
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
    """A track ``(n, 6)``, cut in the valleys between motors that lie in line along z."""
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
    """What the detections ``(n, 6)`` of one track say together."""
    scores = track[:, 5]
    # What a slice has beyond the share, so that nothing jumps as a slice enters the core; scores may all be 0.
    weights = np.maximum(scores - CORE * scores.max(), 0) + np.finfo(np.float64).tiny
    if len(track) > 1:
        weights *= np.gradient(track[:, 0])  # a slice beside a gap speaks for half of it, or the gap would repel z
    z, y, x, height, width = (weights @ track[:, :5] / weights.sum()).tolist()
    score = float(np.sort(scores)[-needed:].sum() / needed)
    return Motor(z, y, x, height, width, min(score, 1.0), len(track))


def _distinct(motors: list[Motor], merge_distance: float) -> list[Motor]:
    """The motors, best first, without those within `merge_distance` voxels of a better one."""
    motors = sorted(motors, key=lambda motor: (-motor.score, -motor.n_slices, motor))
    places = np.array([motor[:3] for motor in motors]).reshape(-1, 3)
    alone = np.ones(len(motors), dtype=bool)
    for index in range(len(motors)):
        if alone[index]:
            alone[index + 1 :] &= np.linalg.norm(places[index + 1 :] - places[index], axis=1) >= merge_distance
    return [motor for motor, stays in zip(motors, alone, strict=True) if stays]


def manifest_column(slices: pa.Table, manifest: pa.Table, column: str) -> dict[str, Any]:
    """Values of a manifest's column by tomogram; raises ManifestError if a tomogram of `slices` is not there."""
    values = dict(zip(manifest["tomo_id"].to_pylist(), manifest[column].to_pylist(), strict=True))
    unknown = sorted(set(pc.unique(slices["tomo_id"]).to_pylist()) - values.keys())
    if unknown:
        raise ManifestError(
            f"{len(unknown)} tomograms have detections but no row in the manifest, such as {', '.join(unknown[:3])}; "
            "give the manifest that the detections were made with"
        )
    return values
