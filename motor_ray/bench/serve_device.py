"""A stand-in for the device of an endpoint's detectors, whose answers can be told right from wrong."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motor_ray.config import PASSES, Augmentation, RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.answering import Answerer
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.replica import Detector

if TYPE_CHECKING:
    from motor_ray.detector.looks import Look

SECONDS, READY = "device_seconds", "ready"
"""Keys of the metrics of a stand-in's checkpoint: how long the device takes a slice, and a folder for `ready_here`."""


class StandInAnswerer(Answerer):
    """Answerer with a device that takes `seconds` a slice, and none of the CPU, in the place of the network."""

    def __init__(self, sha256: str, settings: RunSettings, seconds: float) -> None:
        self.settings, self.sha256, self.seconds = settings, sha256, seconds
        self.loader = LoadSlab(settings)
        self.looker: Any = self._look

    def _look(self, images: NDArray[np.uint8], tta: Augmentation) -> "list[Look]":
        time.sleep(self.seconds * PASSES[tta] * len(images))
        return [self._seen(image[0]) for image in images]

    def _seen(self, frame: NDArray[np.uint8]) -> "Look":
        """A motor at the frame's brightest pixel: each picture has its own answer."""
        from motor_ray.detector.looks import Look

        brightness = float(frame.mean()) / 255
        y, x = np.unravel_index(int(frame.argmax()), frame.shape)
        box = np.array([[y, x, 10.0, 10.0]], np.float64)
        return Look(box, np.array([0.5 + brightness / 2]), brightness, is_sound=True)


class StandIn(Detector):
    """Detector with such a device. Like a GPU it leaves the CPU all the rest of the work, and imports torch."""

    def _load(self, name: str) -> StandInAnswerer:
        card = self.cards[name]
        answerer = StandInAnswerer(card.sha256, settings_from(card.settings), card.metrics[SECONDS])
        answerer.warm_up()
        Path(card.metrics[READY], str(os.getpid())).touch()
        return answerer


def ready_here(folder: Path) -> set[int]:
    """Processes of detectors that have been ready; they may have died since."""
    return {int(path.name) for path in folder.iterdir()}
