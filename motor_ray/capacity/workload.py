"""How much there is to look at in an archive: slices and slabs of both looks, and what is fetched for them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from motor_ray.config import RunSettings
from motor_ray.slab_plan import first_look
from motor_ray.slices.frame import frames_of
from motor_ray.tables import MANIFEST

JPEG_SHARE = 0.225
"""Bytes of a JPEG slice for each of its voxels: 200 kB of 960 x 928 in the public data."""


class Look(NamedTuple):
    """A pass over an archive."""

    slices: int
    slabs: int

    @property
    def slab_slices(self) -> float:
        """Slices of a slab, on average."""
        return self.slices / max(self.slabs, 1)


class Workload(NamedTuple):
    """What a detection has to do."""

    tomograms: int
    slices: int
    """That there are."""

    first: Look
    second: Look
    frame_bytes: float
    """Of a slice's frames, on their way to a scorer, on average over tomograms."""

    @property
    def looked_at(self) -> int:
        """Slices of both looks."""
        return self.first.slices + self.second.slices


def workload_of(manifest: pa.Table, settings: RunSettings, second_look: float) -> Workload:
    """What the MANIFEST `manifest` asks for, `second_look` slices of the second look for each of the first.

    Slabs of the second look are taken to be as long as those of the first. Raises TomogramError if a slice cannot be
    made frames of.
    """
    lengths = np.concatenate([_slab_lengths(piece) for piece in first_look(manifest, settings)])
    first = Look(int(lengths.sum()), len(lengths))
    again = 0 if settings.detect.exhaustive else round(first.slices * second_look)
    return Workload(
        len(manifest),
        sum(manifest["size_z"].to_pylist()),
        first,
        Look(again, math.ceil(again / first.slab_slices)),
        _frame_bytes(manifest, settings),
    )


def alike(
    tomograms: int, shape: tuple[int, int, int], spacing_angstrom: float | None, settings: RunSettings, again: float
) -> Workload:
    """The same for so many `tomograms` of one `shape` (z, y, x) and voxel spacing, each slice stored by itself."""
    row = dict(zip(("size_z", "size_y", "size_x"), shape, strict=True)) | {
        "tomo_id": "any",
        "uri": "slice_{z:04d}.jpg",
        "format": "jpeg_stack",
        "voxel_spacing_angstrom": spacing_angstrom,
        "chunk_depth": None,
    }
    one = workload_of(pa.Table.from_pylist([row], schema=MANIFEST), settings, again)
    second = Look(round(one.first.slices * tomograms * again) if one.second.slices else 0, 0)
    return Workload(
        tomograms,
        one.slices * tomograms,
        Look(one.first.slices * tomograms, one.first.slabs * tomograms),
        second._replace(slabs=math.ceil(second.slices / one.first.slab_slices)),
        one.frame_bytes,
    )


def jpeg_bytes(shapes: Iterable[tuple[int, int]]) -> float:
    """Bytes of a slice, on average, if slices of these (y, x) `shapes` are JPEGs like the public ones."""
    return JPEG_SHARE * float(np.mean([height * width for height, width in shapes]))


def shapes_of(manifest: pa.Table) -> list[tuple[int, int]]:
    """The (y, x) voxels of the slices of each tomogram of the MANIFEST."""
    return list(zip(manifest["size_y"].to_pylist(), manifest["size_x"].to_pylist(), strict=True))


def _slab_lengths(plan: pa.Table) -> np.ndarray:
    return np.diff(plan["zs"].combine_chunks().offsets.to_numpy())


def _frame_bytes(manifest: pa.Table, settings: RunSettings) -> float:
    """Tomograms of one kind are counted once, for there may be a million."""
    columns = ["size_y", "size_x", "voxel_spacing_angstrom"]
    kinds = manifest.group_by(columns).aggregate([([], "count_all")]).to_pylist()
    tiles = [
        len(frames_of((kind["size_y"], kind["size_x"]), kind["voxel_spacing_angstrom"], settings.frame))
        for kind in kinds
    ]
    mean = float(np.average(tiles, weights=[kind["count_all"] for kind in kinds]))
    return mean * settings.frame.size**2 * settings.model.in_slices * settings.detect.contrasts
