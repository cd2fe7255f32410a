"""Slices of a slab to frames: the first operator of the pipeline, as a plain class that knows neither Ray nor torch.

    PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row

One row in, one row out, whatever happens to its slices: a slice that cannot be read is a status in the row,
so that counts add up and a row keeps its id from the plan to the file.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import RunSettings
from motor_ray.errors import MotorRayError, SliceMissingError
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.slices.preprocess import make_frames
from motor_ray.tables import PLAN

FRAMES = pa.schema(
    [
        *PLAN,
        ("loaded", pa.list_(pa.struct([("z", pa.int32()), ("status", pa.string()), ("error", pa.string())]))),
        ("frames", pa.large_binary()),
        ("channels", pa.list_(pa.int32())),
    ]
)
"""A PLAN row and its pixels.

``loaded`` has one entry per slice of ``zs``, in order. ``frames`` holds the ``(n, tiles, size, size)`` uint8 frames of
the n slices that were read, neighbours included; ``channels`` the ``(ok, in_slices)`` places in it of each good
slice's channels.
"""

READ_THREADS = 8
"""Slices of a slab that are fetched at the same time."""


class LoadSlab:
    """Reads the slices of a slab and makes frames of them.

    INPUT   PLAN table
    OUTPUT  FRAMES table, as many rows
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        # Ray gives the actor one CPU; OpenCV would start a thread for each of the machine's.
        cv2.setNumThreads(1)

    def __call__(self, plan: pa.Table) -> pa.Table:
        """FRAMES rows of PLAN rows."""
        return pa.Table.from_pylist([self.load(row) for row in plan.to_pylist()], schema=FRAMES)

    def load(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The FRAMES row of a PLAN row."""
        wanted = with_neighbours(row["zs"], row["size_z"], self.settings)
        frames = self._read_frames(row, wanted)
        places = {z: place for place, z in enumerate(z for z in wanted if not isinstance(frames[z], Exception))}
        good = [z for z in row["zs"] if z in places]
        pixels = [frame for frame in frames.values() if not isinstance(frame, Exception)]
        return dict(row) | {
            "loaded": [status_of(z, frames[z]) for z in row["zs"]],
            "frames": np.stack(pixels).tobytes() if pixels else b"",
            "channels": [places.get(c, places[z]) for z in good for c in self._channels(z, row["size_z"])],
        }

    def _channels(self, z: int, size_z: int) -> list[int]:
        return with_neighbours([z], size_z, self.settings, clamp=True)

    def _read_frames(self, row: Mapping[str, Any], zs: list[int]) -> dict[int, NDArray[np.uint8] | MotorRayError]:
        shape = (row["size_z"], row["size_y"], row["size_x"])
        try:
            placement = frames_of(shape[1:], row["voxel_spacing_angstrom"], self.settings.frame)
            reader = open_tomogram(row["uri"], row["format"], shape, self.settings.archive)
        except MotorRayError as error:
            return dict.fromkeys(zs, error)
        images = read_slices(reader, zs, READ_THREADS)
        return {z: self._make_frames(image, placement) for z, image in zip(zs, images, strict=True)}

    def _make_frames(
        self, image: NDArray[Any] | MotorRayError, placement: list[Frame]
    ) -> NDArray[np.uint8] | MotorRayError:
        if isinstance(image, Exception):
            return image
        try:
            return make_frames(image, placement, self.settings.preprocess)
        except MotorRayError as error:
            return error


def with_neighbours(zs: list[int], size_z: int, settings: RunSettings, *, clamp: bool = False) -> list[int]:
    """`zs` and the slices that the model sees beside them.

    Sorted and each once; or, with `clamp`, one per channel in order, a neighbour outside the tomogram replaced by the
    last slice inside.
    """
    reach = settings.model.slice_step if settings.model.in_slices == 3 else 0
    steps = (-reach, 0, reach) if reach else (0,)
    near = [min(max(z + step, 0), size_z - 1) for z in zs for step in steps]
    return near if clamp else sorted(set(near))


def status_of(z: int, frame: NDArray[np.uint8] | MotorRayError) -> dict[str, Any]:
    """What became of slice `z`: an entry of FRAMES' ``loaded``."""
    if not isinstance(frame, Exception):
        return {"z": z, "status": "ok", "error": None}
    status = "missing" if isinstance(frame, SliceMissingError) else "corrupt"
    return {"z": z, "status": status, "error": str(frame)}
