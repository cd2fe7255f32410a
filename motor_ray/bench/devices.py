"""Scorers of the detection benchmark: the real one, and stand-ins for a device; both note what they do when."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.bench.notes import Notebook
from motor_ray.config import RunSettings
from motor_ray.distributed.scoring import Look, ScoreFrames

NOTHING = Look(np.empty((0, 4)), np.empty(0), 0.5, is_sound=True)
"""What a stand-in says of every frame."""


class Timed(ScoreFrames):
    """ScoreFrames, with notes of when it was at work."""

    def __init__(self, notebook: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notebook = Notebook(notebook)

    def __call__(self, frames: pa.Table) -> pa.Table:
        """SLABS rows of FRAMES rows."""
        with self.notebook.noting(sum(map(len, frames["zs"].to_pylist())), frames.nbytes // max(len(frames), 1)):
            return super().__call__(frames)


class StandIn(Timed):
    """ScoreFrames with a device that takes `seconds` a slice, and none of the CPU, in the place of the network.

    Like a GPU it leaves the CPU all the rest of a scorer's work; as that does, it needs torch to be imported.
    """

    def __init__(self, notebook: str, settings: RunSettings, seconds: float, report: Any = None) -> None:
        self.settings, self.report, self.seconds = settings, report, seconds
        self.notebook = Notebook(notebook)

    def look(self, images: NDArray[np.uint8]) -> list[Look]:
        """What it says of ``(n, channels, size, size)`` images, after the time that it takes."""
        if self.seconds:
            time.sleep(self.seconds * len(images))
        return [NOTHING] * len(images)

    _look = look
