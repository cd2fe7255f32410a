"""Which slices are read together: a slab is a few slices of one tomogram, and one row from plan to result."""

from collections.abc import Iterator

import pyarrow as pa

from motor_ray.tables import PLAN


def make_plan(manifest: pa.Table, slab_slices: int) -> pa.Table:
    """A PLAN in which every slice of every tomogram of the MANIFEST stands exactly once.

    Slabs hold up to `slab_slices` neighbouring slices; the same manifest and number give the same ids.
    """
    rows = [row for tomogram in manifest.to_pylist() for row in _slabs(tomogram, slab_slices)]
    return pa.Table.from_pylist(rows, schema=PLAN)


def slab_of(tomogram: dict[str, object], zs: list[int]) -> dict[str, object]:
    """The PLAN row for the slices `zs`, ascending, of a tomogram, which is a row of the MANIFEST."""
    carried = {name: tomogram[name] for name in PLAN.names if name not in ("slab_id", "zs")}
    return {"slab_id": f"{tomogram['tomo_id']}/{zs[0]:05d}-{zs[-1]:05d}", "zs": zs, **carried}


def _slabs(tomogram: dict[str, int], slab_slices: int) -> Iterator[dict[str, object]]:
    for start in range(0, tomogram["size_z"], slab_slices):
        yield slab_of(dict(tomogram), list(range(start, min(start + slab_slices, tomogram["size_z"]))))
