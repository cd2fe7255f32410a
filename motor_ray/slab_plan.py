"""Which slices are looked at, in rows that memory holds.

Joins archive and slices, which know nothing of one another.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from motor_ray.archive.plan import looks, make_plan, pieces, z_stride
from motor_ray.config import RunSettings
from motor_ray.errors import TomogramError
from motor_ray.slices.channels import channel_step, slice_bytes, with_neighbours

Row = dict[str, Any]
"""A row of the MANIFEST."""

SLAB_BYTES = 10_000_000
"""What the frames of a slab weigh at most, unless those of a single slice weigh more: the most that Ray wants in a row.
19 frames of 720 x 720 have 9.9 MB."""

LONGEST = 64
"""Slices of a slab at most, however small their frames are: they are held as they were read, too."""


def first_look(manifest: pa.Table, settings: RunSettings) -> Iterator[pa.Table]:
    """The PLAN of a first look at every tomogram of the MANIFEST, in pieces.

    The same manifest and settings give the same slabs with the same ids.
    """
    for piece in pieces(manifest):
        rows = piece.to_pylist()
        zs = {row["tomo_id"]: looks(row["size_z"], z_stride(row["voxel_spacing_angstrom"], settings)) for row in rows}
        yield plan_of(rows, zs, settings)


def plan_of(
    tomograms: Sequence[Row], zs: Mapping[str, Sequence[int]], settings: RunSettings, slab_slices: int | None = None
) -> pa.Table:
    """The PLAN of the slices `zs` of `tomograms`, in slabs of up to `slab_slices`, or as the settings say."""
    fitting = {row["tomo_id"]: slices_that_fit(row, zs.get(row["tomo_id"], []), settings) for row in tomograms}
    return make_plan(tomograms, zs, slab_slices or settings.detect.slab_slices, fitting)


def slices_that_fit(row: Row, zs: Sequence[int], settings: RunSettings) -> int:
    """How many of the slices `zs` of a tomogram make a slab of SLAB_BYTES: at least one, at most LONGEST."""
    spacing = row["voxel_spacing_angstrom"]
    try:
        readable = SLAB_BYTES // slice_bytes((row["size_y"], row["size_x"]), spacing, settings)
    except TomogramError:  # it will be said slice by slice, and nothing is loaded
        return LONGEST
    step = channel_step(spacing, settings)

    def read(count: int) -> int:
        start = max(len(zs) - count, 0) // 2  # in the middle, where all have neighbours
        return len(with_neighbours(sorted(zs)[start : start + count], row["size_z"], step))

    fitting = bisect_right(range(1, LONGEST + 1), readable, key=read) if step else readable
    return min(max(fitting, 1), LONGEST)
