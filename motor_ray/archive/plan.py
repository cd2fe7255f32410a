"""Which slices are looked at, and which are read together.

A slab is a few slices of one tomogram, and one row from plan to result. A first look takes every k-th slice, so close
together that no motor falls between two of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from motor_ray.config import RunSettings
from motor_ray.tables import PLAN

Row = dict[str, Any]

COARSEST_ANGSTROM = 20.0
"""Taken for the voxel spacing of a tomogram whose own is unknown: looks are then close enough at any usual one."""

LAYER_SLICES = 19
"""Slices of one chunk layer that may travel as one row, even if slabs are shorter: a layer is then read once."""

PIECE = 1000
"""Tomograms whose slabs are held in memory at a time."""


def z_stride(voxel_spacing_angstrom: float | None, settings: RunSettings) -> int:
    """Every how-manieth slice a first look takes: 1 if exhaustive, else as asked, else from the motor's reach.

    A motor shows on slices within ``targets.reach_angstrom`` of its centre, on either side, so looks up to twice that
    apart see every one.
    """
    if settings.detect.exhaustive:
        return 1
    if settings.detect.z_stride:
        return settings.detect.z_stride
    return max(int(2 * settings.targets.reach_angstrom / (voxel_spacing_angstrom or COARSEST_ANGSTROM)), 1)


def looks(size_z: int, stride: int) -> list[int]:
    """The z of a first look at `size_z` slices: `stride` apart, and none farther than half that from the next look."""
    zs = list(range(min(stride // 2, size_z - 1), size_z, stride))
    return zs if size_z - 1 - zs[-1] <= stride // 2 else [*zs, size_z - 1]


def make_plan(
    tomograms: Iterable[Row], zs: Mapping[str, Sequence[int]], slab_slices: int, fitting: Mapping[str, int]
) -> pa.Table:
    """A PLAN in which each of the slices `zs` of each of `tomograms`, rows of the MANIFEST, stands exactly once.

    Slabs hold up to `slab_slices` slices, or those of one chunk layer of up to LAYER_SLICES; but never more than memory
    holds, `fitting` by tomogram.
    """
    rows = [
        slab_of(row, slab)
        for row in tomograms
        if (own := sorted(zs.get(row["tomo_id"], [])))
        for slab in slabs(own, row.get("chunk_depth") or 1, slab_slices, fitting[row["tomo_id"]])
    ]
    return pa.Table.from_pylist(rows, schema=PLAN)


def slabs(zs: Sequence[int], chunk_depth: int, slab_slices: int, fitting: int) -> Iterator[list[int]]:
    """`zs`, ascending, cut into slabs so that no chunk layer is in two of them unless it must be; else evenly."""
    longest = min(max(slab_slices, LAYER_SLICES) if chunk_depth > 1 else slab_slices, fitting)
    slab_slices = min(slab_slices, fitting)
    slab_slices = math.ceil(len(zs) / max(math.ceil(len(zs) / slab_slices), 1))
    slab: list[int] = []
    for layer in _layers(zs, chunk_depth):
        if slab and len(slab) + len(layer) > slab_slices:
            yield slab
            slab = []
        slab += layer
        while len(slab) > longest:
            yield slab[:longest]
            slab = slab[longest:]
    if slab:
        yield slab


def slab_of(tomogram: Row, zs: list[int]) -> Row:
    """The PLAN row for the slices `zs`, ascending, of a tomogram, which is a row of the MANIFEST."""
    carried = {name: tomogram[name] for name in PLAN.names if name not in ("slab_id", "zs")}
    return {"slab_id": f"{tomogram['tomo_id']}/{zs[0]:05d}-{zs[-1]:05d}", "zs": zs, **carried}


def pieces(manifest: pa.Table, size: int = PIECE) -> Iterator[pa.Table]:
    """`manifest` in pieces of up to `size` tomograms."""
    for start in range(0, len(manifest), size):
        yield manifest.slice(start, size)


def _layers(zs: Sequence[int], chunk_depth: int) -> Iterator[list[int]]:
    layer: list[int] = []
    for z in zs:
        if layer and z // chunk_depth != layer[0] // chunk_depth:
            yield layer
            layer = []
        layer.append(z)
    if layer:
        yield layer
