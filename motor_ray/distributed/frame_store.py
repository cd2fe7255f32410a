"""Decoded frames on a node's own disk: read and decoded once, then taken in any order, by any process of the node.

A frame of 720 x 720 is half a megabyte, so a day's training set fits a disk but not a memory. Nothing here imports ray.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.config import RunSettings
from motor_ray.config_values import settings_hash
from motor_ray.distributed.frames import pixels_of
from motor_ray.distributed.samples import frame_id
from motor_ray.errors import RunError
from motor_ray.slices.frame import frames_of
from motor_ray.tables import table_hash

FRAMES = "frames"
INDEX = "index.json"

SPARE_BYTES = 500e6
"""What filling leaves free on a disk, for others."""


def store_name(plan: pa.Table, settings: RunSettings) -> str:
    """A name for the frames of a plan: settings that make other pixels give another."""
    pixels = [settings.archive, settings.frame, settings.preprocess]
    seen: list[float] = [settings.model.in_slices, settings.model.slice_step]
    if settings.model.slice_step_angstrom is not None:
        seen += [settings.model.slice_step_angstrom, settings.link.assumed_spacing_angstrom]
    return "-".join([table_hash(plan), *map(settings_hash, pixels), *map(str, seen)])


def count_frames(plan: pa.Table, settings: RunSettings) -> int:
    """How many frames the slices of a plan make."""
    return sum(
        len(row["zs"]) * len(frames_of((row["size_y"], row["size_x"]), row["voxel_spacing_angstrom"], settings.frame))
        for row in plan.to_pylist()
    )


def require_room(folder: Path, plan: pa.Table, settings: RunSettings) -> None:
    """Raises RunError if the disk of `folder` cannot take the frames of `plan`.

    What was left there by a process that ended before all was written goes first.
    """
    (folder / FRAMES).unlink(missing_ok=True)
    wanted = count_frames(plan, settings) * settings.model.in_slices * settings.frame.size**2
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if wanted > free:
        raise RunError(
            f"{folder}: decoded frames take {wanted / 1e9:.1f} GB, there are {max(free, 0) / 1e9:.1f} GB to spare; "
            "name a folder on a larger disk with --train.cache, or take fewer slices with --train.slices-per-motor"
        )


def fill(folder: Path, tables: Iterable[pa.Table], settings: RunSettings, show: Callable[[int], None]) -> None:
    """Write the frames of FRAMES `tables` of single slices to `folder`; `show` is told how many slices are in.

    A folder that is not `is_filled` afterwards was not written whole.
    """
    index: dict[str, int] = {}
    unread: list[dict[str, Any]] = []
    slices = 0
    with (folder / FRAMES).open("wb") as file:
        for table in tables:
            rows = table.drop_columns(["frames"]).to_pylist()
            for row, pixels in zip(rows, pixels_of(table), strict=True):
                if (problem := _unread(row)) is not None:
                    unread.append(problem)
                else:
                    _write_slice(row, pixels, file, index, settings)
            slices += len(rows)
            show(slices)
    written = folder / f"{INDEX}.partial"
    written.write_text(json.dumps({"frames": index, "unread": unread}))
    os.replace(written, folder / INDEX)


def is_filled(folder: Path) -> bool:
    """Whether `folder` holds frames that were written whole."""
    return (folder / INDEX).exists()


def _unread(row: dict[str, Any]) -> dict[str, Any] | None:
    """The FAILURES row, and the slab, of a slice that could not be read."""
    [entry] = row["loaded"]
    if entry["status"] == "ok":
        return None
    return {name: row[name] for name in ("slab_id", "tomo_id", "uri")} | {name: entry[name] for name in ("z", "error")}


def _write_slice(
    row: dict[str, Any], pixels: NDArray[np.uint8], file: Any, index: dict[str, int], settings: RunSettings
) -> None:
    size, in_slices = settings.frame.size, settings.model.in_slices
    placement = frames_of((row["size_y"], row["size_x"]), row["voxel_spacing_angstrom"], settings.frame)
    images = pixels.reshape(-1, len(placement), size, size)[np.reshape(row["channels"], in_slices)]
    for tile in range(len(placement)):
        index[frame_id(row["slab_id"], tile)] = len(index)
        file.write(np.ascontiguousarray(images[:, tile]))  # (in_slices, y, x)


class FrameStore:
    """The frames that `fill` has written to a folder."""

    def __init__(self, folder: Path, settings: RunSettings) -> None:
        index = json.loads((folder / INDEX).read_text())
        self._index: dict[str, int] = index["frames"]
        self.unread: list[dict[str, Any]] = index["unread"]
        """FAILURES rows of slices that could not be read, and the ids of their slabs."""

        shape = (len(self._index), settings.model.in_slices, settings.frame.size, settings.frame.size)
        self._frames = np.memmap(folder / FRAMES, np.uint8, "r", shape=shape) if self._index else np.empty(shape)

    def leave_out(self, slab_ids: Collection[str]) -> None:
        """Take these slices, too, as not readable."""
        self._index = {name: place for name, place in self._index.items() if name.rpartition("/")[0] not in slab_ids}

    def frame(self, slice_id: str) -> NDArray[np.uint8] | None:
        """``(in_slices, size, size)`` of one frame of a slice; None if the slice could not be read."""
        place = self._index.get(slice_id)
        return None if place is None else np.asarray(self._frames[place])
