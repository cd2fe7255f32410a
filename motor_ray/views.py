"""What a picture shows of a tomogram: a slice of it, and the motors that are known and found there.

Joins archive, slices and motors, which know nothing of one another.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.archive.readers import open_tomogram
from motor_ray.config import ArchiveSettings, AugmentSettings, RunSettings
from motor_ray.errors import MotorRayError, OutageError
from motor_ray.motors.figures import CheckRow, MotorsPanel, close_up
from motor_ray.slices.augment import augment, sample_generator
from motor_ray.slices.frame import frames_of
from motor_ray.slices.preprocess import make_frames, to_uint8
from motor_ray.slices.repair import repair_asked, repaired
from motor_ray.slices.targets import box_on_frame, boxes_on_frame, draw_levels, whole_heatmap

Row = dict[str, Any]
"""A row of the MANIFEST."""

NEAR_ANGSTROM = 200.0
"""A picture of a slice marks the motors whose centre lies this near along z."""

CLOSE_UP_ANGSTROM = 3000.0
"""Edge of what is shown around a motor: wide enough for a hit, at most 1000 angstrom off, and the cell around it."""


def box_edges(slice_shape: tuple[int, int], spacing: float | None, settings: RunSettings) -> tuple[float, float]:
    """Height and width, in slice voxels, of the boxes that the network was taught on such a slice."""
    frame = frames_of(slice_shape, spacing, settings.frame)[0]
    height, width = box_on_frame(frame, spacing, settings) / frame.scale
    return float(height), float(width)


def spacing_of(row: Row, labels: Labels) -> float:
    """The voxel spacing that the network was taught a tomogram with: the manifest's, where it has none the labels'."""
    return row["voxel_spacing_angstrom"] or labels.spacing_of(row["tomo_id"])


def check_row(title: str, row: Row, labels: Labels, settings: RunSettings, changes: AugmentSettings) -> CheckRow:
    """One line of the dataset check: the middle slice, or that of the tomogram's first motor, and its frame there."""
    motors, spacing = labels.motors_of(row["tomo_id"]), spacing_of(row, labels)
    z = min(round(motors[0, 0]), row["size_z"] - 1) if len(motors) else row["size_z"] // 2
    image = read_slice(row, z, settings.archive)
    targets = settings.targets
    fade = targets.fade_angstrom / spacing if targets.fade_angstrom else None
    placement = frames_of(image.shape, spacing, settings.frame)
    boxes = [
        boxes_on_frame(motors, z, targets.reach_angstrom / spacing, frame, box_on_frame(frame, spacing, settings), fade)
        for frame in placement
    ]
    tile = int(np.argmax([len(some) for some in boxes]))
    mended = repaired(image, repair_asked([image], settings))
    pixels = make_frames(mended, placement, settings.preprocess)[tile]
    rng = sample_generator(settings.train.seed, 0, row["tomo_id"])
    augmented, moved = augment(pixels[None], boxes[tile], rng, changes)
    heatmap = whole_heatmap(draw_levels(moved, settings.frame.size, targets, settings.model.levels))
    on_slice = placement[tile].boxes_to_slice(boxes[tile][:, :4])
    return CheckRow(title, to_uint8(image, settings.preprocess), augmented[0], heatmap, on_slice, moved[:, :4])


def close_ups(
    group: pd.DataFrame, rows: dict[str, Row], labels: Labels, found: pd.DataFrame, settings: RunSettings
) -> Iterator[MotorsPanel]:
    """The surroundings of each motor of `group`, a table of `outcomes`, on the slice through it."""
    for motor in group.to_dict("records"):
        row = rows[motor["tomo_id"]]
        own = found.loc[found["tomo_id"] == row["tomo_id"], ["z", "y", "x", "score"]].to_numpy(np.float64)
        try:
            panel = panel_at(_slice_at(motor["z"], row), row, labels, own, settings)
        except OutageError:
            raise
        except MotorRayError:  # of slices that cannot be read there is no picture; the run lists them
            continue
        if "distance_angstrom" in motor:
            panel = panel._replace(title=f"{panel.title}\n{motor['distance_angstrom'] / 10:.0f} nm off")
        yield close_up(panel, motor["y"], motor["x"], CLOSE_UP_ANGSTROM / spacing_of(row, labels))


def motors_panel(row: Row, labels: Labels, found: NDArray[np.float64], settings: RunSettings) -> MotorsPanel:
    """The slice through the first true motor, else the best found one, else the middle."""
    true = labels.motors_of(row["tomo_id"])
    seen = true if len(true) else found
    z = _slice_at(seen[0, 0], row) if len(seen) else row["size_z"] // 2
    return panel_at(z, row, labels, found, settings)


def _slice_at(z: float, row: Row) -> int:
    return min(max(round(z), 0), int(row["size_z"]) - 1)


def panel_at(z: int, row: Row, labels: Labels, found: NDArray[np.float64], settings: RunSettings) -> MotorsPanel:
    """Slice `z` of a tomogram, and the motors near it: those of the labels, and ``(n, 4)`` z, y, x, score `found`."""
    true, spacing = labels.motors_of(row["tomo_id"]), spacing_of(row, labels)
    image = to_uint8(read_slice(row, z, settings.archive), settings.preprocess)
    near_true, near_found = (some[np.abs(some[:, 0] - z) * spacing <= NEAR_ANGSTROM, 1:] for some in (true, found))
    edge = box_edges((row["size_y"], row["size_x"]), spacing, settings)[0]
    return MotorsPanel(f"{row['tomo_id']}, z = {z}", image, near_true, near_found, edge, spacing)


def read_slice(row: Row, z: int, settings: ArchiveSettings) -> NDArray[Any]:
    """Slice `z` of a tomogram, which is a row of the MANIFEST, as stored."""
    shape = (row["size_z"], row["size_y"], row["size_x"])
    return open_tomogram(row["uri"], row["format"], shape, settings).read_slice(z)
