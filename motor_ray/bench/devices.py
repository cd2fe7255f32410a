"""Scorers of the detection benchmark: the real one, and a stand-in for a device; both note what they do when."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motor_ray.bench.notes import Notebook
from motor_ray.config import RunSettings
from motor_ray.distributed.scoring import Looking, Report, ScoreFrames

if TYPE_CHECKING:
    from motor_ray.detector.looks import Look


class Noted:
    """A looker, with notes of when it was at work."""

    def __init__(self, look: Looking, notebook: str) -> None:
        self.look, self.notebook = look, Notebook(notebook)

    def __call__(self, images: NDArray[np.uint8]) -> "list[Look]":
        """What the looker says of ``(n, channels, size, size)`` images."""
        with self.notebook.noting(len(images), images.nbytes):
            return self.look(images)


class Timed(ScoreFrames):
    """ScoreFrames, with notes of when its device was at work."""

    def __init__(self, notebook: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.look = Noted(self.look, notebook)


class StandIn(ScoreFrames):
    """ScoreFrames with a device that takes `seconds` a slice, and none of the CPU, in the place of the network.

    Like a GPU it leaves the CPU all the rest of a scorer's work; as that does, it imports torch when it starts.
    """

    def __init__(self, notebook: str, settings: RunSettings, seconds: float, report: Report | None = None) -> None:
        from motor_ray.detector.looks import Look

        nothing = Look(np.empty((0, 4)), np.empty(0), 0.5, is_sound=True)

        def wait(images: NDArray[np.uint8]) -> "list[Look]":
            if seconds:
                time.sleep(seconds * len(images))
            return [nothing] * len(images)

        self._begin(settings, Noted(wait, notebook), report)
