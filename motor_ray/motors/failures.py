"""What could not be read, slice by slice and tomogram by tomogram."""

import pyarrow as pa
import pyarrow.compute as pc

from motor_ray.motors.link import by_tomogram, manifest_column, slices_of
from motor_ray.tables import FAILURES


def failed_slices(slabs: pa.Table, manifest: pa.Table) -> pa.Table:
    """A FAILURES row for every slice of SLABS whose status is not ok, by tomogram and z.

    Raises ManifestError if a tomogram of `slabs` is not in `manifest`.
    """
    slices = slices_of(slabs)
    uris = manifest_column(slices, manifest, "uri")
    bad = slices.filter(pc.not_equal(slices["status"], "ok")).sort_by([("tomo_id", "ascending"), ("z", "ascending")])
    rows = [
        {
            "tomo_id": row["tomo_id"],
            "z": row["z"],
            "uri": uris[row["tomo_id"]],
            "error": row["error"] or f"the slice is {row['status']}",
        }
        for row in bad.select(["tomo_id", "z", "status", "error"]).to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=FAILURES)


def failed_tomograms(slabs: pa.Table, manifest: pa.Table, good_share: float) -> pa.Table:
    """A FAILURES row, without z, for every tomogram of SLABS of which less than `good_share` of the slices are ok."""
    slices = slices_of(slabs)
    uris = manifest_column(slices, manifest, "uri")
    rows = []
    for tomo_id, own in by_tomogram(slices):
        good = pc.sum(pc.equal(own["status"], "ok")).as_py()
        if good < good_share * len(own):
            error = f"only {good} of the {len(own)} slices that were looked at can be read; its motors may be missed"
            rows.append({"tomo_id": tomo_id, "z": None, "uri": uris[tomo_id], "error": error})
    return pa.Table.from_pylist(rows, schema=FAILURES)
