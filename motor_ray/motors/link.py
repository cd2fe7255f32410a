"""Boxes on slices become motors in three dimensions: the tables of a run, one tomogram at a time.

Knows neither files nor the network; how motors are linked is in `motor_ray.motors.tracks`.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from motor_ray.config import LinkSettings
from motor_ray.errors import ManifestError
from motor_ray.motors.tracks import Candidate, best_first, link_candidates
from motor_ray.tables import MOTORS, SLABS, SLICE

SLICES = pa.schema([("slab_id", pa.string()), ("tomo_id", pa.string()), *SLICE])
"""One row per slice that was looked at: SLABS unnested."""

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

    features: NDArray[np.float32]
    """``(n, c)`` of what the network saw there; ``(n, 0)`` where a detection has none."""


class Linked(NamedTuple):
    """What was linked in one tomogram."""

    tomo_id: str
    candidates: list[Candidate]
    """Best first."""

    looked_at: Rows
    """``(m,)`` z of the slices that were looked at."""

    shape: tuple[int, int, int]
    """Voxels along z, y, x."""

    spacing_angstrom: float
    """The voxel spacing, an assumed one if it is unknown."""

    is_known: bool
    """Whether it is known."""


Rescore = Callable[[Linked], Sequence[float]]
"""New scores of the candidates of a tomogram."""


def slices_of(slabs: pa.Table) -> pa.Table:
    """SLABS unnested: one SLICES row per slice, in the slabs' order."""
    slabs = slabs.select(SLABS.names).cast(SLABS)
    nested = slabs["slices"].combine_chunks()
    owners = pc.list_parent_indices(nested)
    columns = [slabs[name].take(owners) for name in ("slab_id", "tomo_id")]
    return pa.table([*columns, *pc.list_flatten(nested).flatten()], schema=SLICES)


def link_slabs(
    slabs: pa.Table, manifest: pa.Table, settings: LinkSettings | None = None, rescore: Rescore | None = None
) -> pa.Table:
    """The MOTORS of every tomogram in `slabs`, by tomogram and then best first, with scores by `rescore` if given.

    All slabs of a tomogram must be there; their order and how slices are spread over them do not matter. A
    tomogram without motors has no row. Raises ManifestError if one is not in `manifest`.
    """
    rows = []
    for linked in link_tomograms(slabs, manifest, settings or LinkSettings()):
        motors = [candidate.motor for candidate in linked.candidates]
        if rescore and motors:
            scored = zip(motors, rescore(linked), strict=True)
            motors = sorted((motor._replace(score=score) for motor, score in scored), key=best_first)
        spacing = linked.spacing_angstrom if linked.is_known else None
        own = {"tomo_id": linked.tomo_id, "voxel_spacing_angstrom": spacing}
        rows += [own | motor._asdict() for motor in motors]
    return pa.Table.from_pylist(rows, schema=MOTORS)


def link_tomograms(slabs: pa.Table, manifest: pa.Table, settings: LinkSettings) -> Iterator[Linked]:
    """What was linked in each tomogram of `slabs`; see `link_slabs`."""
    slices = slices_of(slabs)
    names = ("size_z", "size_y", "size_x", "voxel_spacing_angstrom")
    columns = [manifest_column(slices, manifest, name) for name in names]
    for tomo_id, of_tomogram in by_tomogram(slices.filter(pc.equal(slices["status"], "ok"))):
        *shape, spacing = (column[tomo_id] for column in columns)
        known = spacing is not None and spacing > 0
        spacing = spacing if known else settings.assumed_spacing_angstrom
        zs = of_tomogram["z"].to_numpy()
        found = detections_of(of_tomogram)
        table = np.column_stack([zs[found.slice_index], found.boxes, found.scores, found.features])
        yield Linked(tomo_id, link_candidates(table, zs, spacing, settings), zs, (*shape,), spacing, known)


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
    *numbers, features = pc.list_flatten(nested).flatten()
    columns = [np.asarray(column, dtype=np.float64) for column in numbers]
    return Detections(
        slice_index=np.asarray(pc.list_parent_indices(nested), dtype=np.int64),
        boxes=np.column_stack(columns[:4]),
        scores=columns[4],
        features=_unpacked(features),
    )


def _unpacked(features: pa.Array) -> NDArray[np.float32]:
    """``(n, c)`` of a column of ``features``; ``(n, 0)`` if one is null."""
    if features.null_count or not len(features):
        return np.empty((len(features), 0), np.float32)
    packed = b"".join(features.to_pylist())
    return np.frombuffer(packed, np.float16).reshape(len(features), -1).astype(np.float32)


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
