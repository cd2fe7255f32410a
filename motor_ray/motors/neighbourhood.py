"""What surrounds a candidate in z, y and x, as numbers that its second look is taken at.

Knows what was linked, and lengths in angstrom; what the numbers are worth is learned in `motor_ray.detector.rescore`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from motor_ray.errors import RunError
from motor_ray.motors.link import Linked
from motor_ray.motors.tracks import Candidate

STEP_ANGSTROM = 50.0
STEPS = 9
"""Parts along z, the candidate's centre in the middle one: 450 angstrom, as a motor is wide."""

FAR_ANGSTROM = 1000.0
"""Whatever is farther from an edge of the volume than this is equally far."""

DRIFT_ANGSTROM, EXTENT_ANGSTROM = 100.0, 450.0
"""What drift in the plane, and lengths, are measured in: both are about 1 then."""

PRESENT = 3
"""Channels before the features: score, share of slices with a detection, and whether any slice was looked at."""

GEOMETRY = ("score", "best", "mean", "deviation", "extent", "drift", "height", "width", "edge_z", "edge_y", "edge_x")
"""Columns of what a candidate is as a whole; the first is the score that it was linked with."""

Floats = NDArray[np.float32]


class Neighbourhoods(NamedTuple):
    """What surrounds n candidates."""

    along_z: Floats
    """``(n, PRESENT + c, STEPS)``: in each part along z the mean score, the share of the slices looked at that have a
    detection, whether any was looked at, and the means of the features; zeros where there is nothing."""

    geometry: Floats
    """``(n, len(GEOMETRY))``: scores from 0 to 1, lengths in the units above."""


def neighbourhoods(linked: Linked) -> Neighbourhoods:
    """Of every candidate of a tomogram. Raises RunError if detections have no features."""
    if any(one.detections.shape[1] == 6 for one in linked.candidates):
        raise RunError(
            f"{linked.tomo_id}: its detections have no features to judge candidates by; detect in the tomograms again, "
            "to another --out, with --detect.features"
        )
    along_z = [_along_z(one, linked) for one in linked.candidates]
    geometry = [_geometry(one, linked) for one in linked.candidates]
    return Neighbourhoods(np.array(along_z, np.float32), np.array(geometry, np.float32))


def stacked(several: list[Neighbourhoods]) -> Neighbourhoods:
    """Those of several tomograms, one after the other."""
    return Neighbourhoods(*(np.concatenate(parts) for parts in zip(*several, strict=True)))


def _along_z(candidate: Candidate, linked: Linked) -> NDArray[np.float64]:
    found = candidate.detections

    def summed(zs: NDArray[np.floating], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(STEPS, k)`` sums of ``(n, k)`` values."""
        parts = np.rint((zs - candidate.motor.z) * linked.spacing_angstrom / STEP_ANGSTROM).astype(int) + STEPS // 2
        inside = (parts >= 0) & (parts < STEPS)
        sums = np.zeros((STEPS, values.shape[1]))
        np.add.at(sums, parts[inside], values[inside])
        return sums

    looked_at = summed(linked.looked_at.astype(float), np.ones((len(linked.looked_at), 1)))
    sums = summed(found[:, 0], np.column_stack([np.ones(len(found)), found[:, 5:]]))
    means = sums[:, 1:] / np.maximum(sums[:, :1], 1)
    share = sums[:, :1] / np.maximum(looked_at, 1)
    return np.hstack([means[:, :1], share, looked_at > 0, means[:, 1:]]).T


def _geometry(candidate: Candidate, linked: Linked) -> list[float]:
    motor, found, spacing = candidate.motor, candidate.detections, linked.spacing_angstrom
    scores, places = found[:, 5], found[:, 1:3]
    drift = np.sqrt(((places - places.mean(axis=0)) ** 2).sum(axis=1).mean())
    to_edge = [min(place, size - 1 - place) for place, size in zip(motor[:3], linked.shape, strict=True)]
    edges = np.clip(np.array(to_edge) * spacing / FAR_ANGSTROM, 0, 1)
    lengths = np.array([np.ptp(found[:, 0]), motor.height, motor.width]) * spacing / EXTENT_ANGSTROM
    shape = (lengths[0], drift * spacing / DRIFT_ANGSTROM, *lengths[1:])
    return [motor.score, scores.max(), scores.mean(), scores.std(), *shape, *edges]
