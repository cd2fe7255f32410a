"""Where a first look at every k-th slice saw something, the slices between are worth a look as well."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from motor_ray.config import DetectSettings
from motor_ray.motors.link import by_tomogram, detections_of, slices_of


def second_look(
    slabs: pa.Table, sizes: Mapping[str, int], strides: Mapping[str, int], settings: DetectSettings
) -> dict[str, list[int]]:
    """The z of slices to look at next, by tomogram, after a first look whose SLABS these are.

    `sizes` and `strides` are the number of slices, and the stride of the first look, of each tomogram. A look is
    followed up if it has a detection of ``candidate_score`` or more, or if it could not be read and so may have hidden
    one; but no look of a tomogram of which hardly anything can be read. Tomograms without any are left out.
    """
    again = {}
    for tomo_id, looks in by_tomogram(slices_of(slabs)):
        zs = looks["z"].to_numpy()
        near = neighbours(_worth_following(looks, settings), strides[tomo_id], sizes[tomo_id]) - set(zs.tolist())
        if near:
            again[tomo_id] = sorted(near)
    return again


def neighbours(zs: Sequence[int], stride: int, size_z: int) -> set[int]:
    """Slices nearer than `stride` to any of `zs`: a motor that shows on a look shows nowhere else but there."""
    return {near for z in zs for near in range(max(z - stride + 1, 0), min(z + stride, size_z))}


def _worth_following(looks: pa.Table, settings: DetectSettings) -> list[int]:
    """The z of those SLICES rows of a tomogram that may show a motor."""
    readable = np.asarray(looks["status"].to_numpy()) == "ok"
    if readable.mean() < settings.good_share:
        return []
    seen = detections_of(looks)
    follow = ~readable
    follow[seen.slice_index[seen.scores >= settings.candidate_score]] = True
    return [int(z) for z in looks["z"].to_numpy()[follow]]
