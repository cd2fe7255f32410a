"""Slices of a slab to frames: the first operator of the pipeline, as a plain class that knows neither Ray nor torch.

    PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row

One row in, one row out, whatever happens to its slices: a slice that cannot be read is a status in the row,
so that counts add up and a row keeps its id from the plan to the file.
"""

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.archive.readers import TomogramReader, open_tomogram, read_slices
from motor_ray.config import RunSettings
from motor_ray.distributed.frames import frames_table
from motor_ray.errors import MotorRayError, OutageError, SliceCorruptError, SliceMissingError
from motor_ray.slices.channels import channel_step, channels_of, with_neighbours
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.slices.preprocess import contrasts_of, make_frames
from motor_ray.slices.repair import Repair, repair_asked, repaired
from motor_ray.storage import retries

READ_THREADS = 8
"""Slices of a slab that are fetched at the same time."""

OPEN_TOMOGRAMS = 4
"""Tomograms that are kept open: slabs come in the plan's order, so the next one is mostly of the same tomogram."""


class Fate(NamedTuple):
    """What became of a slice: a note, or the error it ended with."""

    error: MotorRayError | None
    note: str | None = None


class LoadSlab:
    """Reads the slices of a slab and makes frames of them. Several threads may call it at once.

    With 2 `contrasts` each frame is made twice, the second time with CLAHE switched off; or on, if it was off.

    INPUT   PLAN table
    OUTPUT  FRAMES table, as many rows

    Raises OutageError if the storage does not answer: that is no fault of the slices, and the run can go on later.
    """

    def __init__(
        self, settings: RunSettings, *, contrasts: int = 1, count: Callable[[str, int], None] | None = None
    ) -> None:
        self.settings, self.count = settings, count
        self.contrasts = contrasts_of(settings.preprocess, contrasts)
        # OpenCV would start a thread for each of the machine's cores, in every loader.
        cv2.setNumThreads(1)
        self._open = lru_cache(OPEN_TOMOGRAMS)(self._open_tomogram)
        self._lock, self._retries_told = threading.Lock(), retries()

    def __call__(self, plan: pa.Table) -> pa.Table:
        """FRAMES rows of PLAN rows."""
        rows = [self.load(row) for row in plan.to_pylist()]
        self._tell_retries()
        return frames_table(rows)

    def load(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The FRAMES row of a PLAN row; ``frames`` is an array ``(n, contrasts * tiles, size, size)``."""
        step = channel_step(row["voxel_spacing_angstrom"], self.settings)
        wanted = with_neighbours(row["zs"], row["size_z"], step)
        frames, fates = self._load_slices(row, wanted)
        places = {z: place for place, z in enumerate(z for z in wanted if fates[z].error is None)}
        good = [z for z in row["zs"] if z in places]
        return dict(row) | {
            "loaded": [entry_of(z, fates[z]) for z in row["zs"]],
            "frames": frames,
            "channels": [places.get(c, places[z]) for z in good for c in channels_of(z, row["size_z"], step)],
        }

    def _load_slices(self, row: Mapping[str, Any], zs: list[int]) -> tuple[NDArray[np.uint8], dict[int, Fate]]:
        """The frames of those of the slices `zs` that are good, and what became of each."""
        shape = (row["size_z"], row["size_y"], row["size_x"])
        try:
            placement = frames_of(shape[1:], row["voxel_spacing_angstrom"], self.settings.frame)
            reader = self._open(row["uri"], row["format"], shape)
        except OutageError:
            raise
        except MotorRayError as error:
            return np.empty(0, np.uint8), dict.fromkeys(zs, Fate(error))
        images = read_slices(reader, zs, READ_THREADS)
        fault = repair_asked([image for image in images if not isinstance(image, Exception)], self.settings)
        size, good = self.settings.frame.size, 0
        frames = np.empty((len(zs), len(self.contrasts) * len(placement), size, size), np.uint8)
        fates = {}
        for z, image in zip(zs, images, strict=True):
            fates[z] = self._make_frames(image, fault, placement, frames[good])
            good += fates[z].error is None
        return frames[:good], fates

    def _make_frames(
        self, image: NDArray[Any] | MotorRayError, fault: Repair, placement: list[Frame], out: NDArray[np.uint8]
    ) -> Fate:
        if isinstance(image, Exception):
            return Fate(image)
        try:
            mended = repaired(image, fault)
            for settings, place in zip(self.contrasts, np.split(out, len(self.contrasts)), strict=True):
                make_frames(mended, placement, settings, place)
        except MotorRayError as error:
            return Fate(error)
        except cv2.error as error:
            return Fate(SliceCorruptError(f"the pixels cannot be made a frame ({error.err})"))
        return Fate(None, fault.note)

    def _open_tomogram(self, uri: str, format: str, shape: tuple[int, int, int]) -> TomogramReader:
        return open_tomogram(uri, format, shape, self.settings.archive)

    def _tell_retries(self) -> None:
        with self._lock:
            now, before = retries(), self._retries_told
            self._retries_told = now
        if self.count and now > before:
            self.count("retries", now - before)


def loader_arguments(settings: RunSettings) -> dict[str, Any]:
    """What LoadSlab takes to make frames for detection, which training does without."""
    return {"settings": settings, "contrasts": settings.detect.contrasts}


def entry_of(z: int, fate: Fate) -> dict[str, Any]:
    """What became of slice `z`: an entry of FRAMES' ``loaded``."""
    if fate.error is None:
        return {"z": z, "status": "ok", "error": None, "note": fate.note}
    status = "missing" if isinstance(fate.error, SliceMissingError) else "corrupt"
    return {"z": z, "status": status, "error": str(fate.error), "note": None}
