"""The columns of every table, named once.

A block without rows would otherwise lose its types: Ray Data infers ``null`` for an empty list column.
Positions are voxels of the stored tomogram in z, y, x; a voxel's index is its centre.
"""

import hashlib
import json

import pyarrow as pa

MANIFEST = pa.schema(
    [
        ("tomo_id", pa.string()),
        ("uri", pa.string()),
        ("format", pa.string()),
        ("size_z", pa.int32()),
        ("size_y", pa.int32()),
        ("size_x", pa.int32()),
        ("voxel_spacing_angstrom", pa.float64()),
        ("chunk_depth", pa.int32()),
    ]
)
"""One row per tomogram. The spacing is null where nobody knows it; ``chunk_depth`` is the number of slices that are
stored together, null where each slice lies by itself."""

PLAN = pa.schema(
    [
        ("slab_id", pa.string()),
        ("tomo_id", pa.string()),
        ("uri", pa.string()),
        ("format", pa.string()),
        ("zs", pa.list_(pa.int32())),
        ("size_z", pa.int32()),
        ("size_y", pa.int32()),
        ("size_x", pa.int32()),
        ("voxel_spacing_angstrom", pa.float64()),
    ]
)
"""One row per slab: a few slices of one tomogram that are read together."""

DETECTION = pa.struct(
    [
        ("y", pa.float32()),
        ("x", pa.float32()),
        ("height", pa.float32()),
        ("width", pa.float32()),
        ("score", pa.float32()),
        ("features", pa.binary()),  # float16, the same number for all; null where they were not asked for
    ]
)

SLICE = pa.struct(
    [
        ("z", pa.int32()),
        ("status", pa.string()),  # ok, missing or corrupt
        ("error", pa.string()),
        ("note", pa.string()),
        ("presence", pa.float32()),
        ("detections", pa.list_(DETECTION)),
    ]
)

SLABS = pa.schema([("slab_id", pa.string()), ("tomo_id", pa.string()), ("slices", pa.list_(SLICE))])
"""One row per slab that was looked at, in the plan's own granularity, so that no row is ever added or dropped."""

MOTORS = pa.schema(
    [
        ("tomo_id", pa.string()),
        ("z", pa.float64()),
        ("y", pa.float64()),
        ("x", pa.float64()),
        ("height", pa.float64()),
        ("width", pa.float64()),
        ("score", pa.float64()),
        ("n_slices", pa.int32()),
        ("voxel_spacing_angstrom", pa.float64()),
    ]
)
"""One row per motor."""

FAILURES = pa.schema([("tomo_id", pa.string()), ("z", pa.int32()), ("uri", pa.string()), ("error", pa.string())])
"""One row per slice, or (z null) whole tomogram, that could not be read."""


def table_hash(*tables: pa.Table) -> str:
    """A short name for the rows of small tables, whatever files they came from."""
    rows = [table.to_pylist() for table in tables]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
