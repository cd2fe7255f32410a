"""The table that travels from loading to scoring: a slab and its pixels, moved without copies."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.tables import PLAN

LOADED = pa.struct([("z", pa.int32()), ("status", pa.string()), ("error", pa.string()), ("note", pa.string())])

FRAMES = pa.schema(
    [
        *PLAN,
        ("loaded", pa.list_(LOADED)),
        ("frames", pa.large_binary()),
        ("channels", pa.list_(pa.int32())),
    ]
)
"""A PLAN row and its pixels.

``loaded`` has one entry per slice of ``zs``, in order. ``frames`` holds the ``(n, contrasts * tiles, size, size)``
uint8 frames of the n slices that were read, neighbours included; ``channels`` the ``(ok, in_slices)`` places in it of
each good slice's channels.
"""


def frames_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """FRAMES of rows as `LoadSlab.load` gives them, without a copy of the pixels."""
    columns = {name: [row[name] for row in rows] for name in FRAMES.names if name != "frames"}
    arrays = {name: pa.array(values, FRAMES.field(name).type) for name, values in columns.items()}
    pixels = [
        pa.Array.from_buffers(
            pa.large_binary(),
            1,
            [None, pa.py_buffer(np.array([0, row["frames"].nbytes], np.int64)), pa.py_buffer(row["frames"])],
        )
        for row in rows
    ]
    arrays["frames"] = pa.chunked_array(pixels, pa.large_binary())
    return pa.table([arrays[name] for name in FRAMES.names], schema=FRAMES)


def pixels_of(frames: pa.Table) -> list[NDArray[np.uint8]]:
    """The bytes of the column ``frames``, row by row, as they lie in memory: read-only and flat."""
    rows = []
    for chunk in frames["frames"].chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        values = np.frombuffer(data, np.uint8) if ends[-1] else np.empty(0, np.uint8)
        rows += [values[start:end] for start, end in itertools.pairwise(ends)]
    return rows
