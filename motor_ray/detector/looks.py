"""A trained network at work: pictures in, what it says of them out, in numbers that need no torch."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from motor_ray.config import DetectSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.decode import decode
from motor_ray.detector.device import can_compile, pick_device
from motor_ray.detector.inference import prepare


class Look(NamedTuple):
    """What the network says of one frame."""

    boxes: NDArray[np.float64]
    """``(n, 4)`` centre y, x, height and width in frame pixels, best first."""

    scores: NDArray[np.float64]
    """``(n,)`` in [0, 1]."""

    presence: float
    """That the frame shows a motor, in [0, 1]."""

    is_sound: bool
    """False if a number of the answer is not finite."""


class Looker:
    """Owns a network and the device that it runs on, which the heatmaps never leave. One thread may call it."""

    def __init__(
        self, model: str, settings: DetectSettings, *, threads: int, compiled: Literal["on", "off", "if possible"]
    ) -> None:
        torch.set_num_threads(threads)
        self.settings = settings
        device = pick_device()
        self.predict = prepare(
            load_checkpoint(model),
            device,
            mixed_precision=settings.mixed_precision,
            compiled=compiled == "on" or (compiled == "if possible" and can_compile(device)),
        )

    def __call__(self, images: NDArray[np.uint8]) -> list[Look]:
        """A look at each of ``(n, channels, size, size)`` images."""
        most, threshold = self.settings.max_detections, self.settings.score_threshold
        looks: list[Look] = []
        for start in range(0, len(images), self.settings.batch_frames):
            # Copied, because torch cannot look at the object store's read-only memory.
            prediction = self.predict(torch.tensor(images[start : start + self.settings.batch_frames]))
            sound = prediction.heatmap.isfinite().all(dim=(1, 2, 3)) & prediction.presence.isfinite()
            found = decode(prediction, most, threshold)
            numbers = zip(prediction.presence.sigmoid().tolist(), sound.tolist(), strict=True)
            for (boxes, scores), (presence, is_sound) in zip(found, numbers, strict=True):
                looks.append(Look(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), presence, is_sound))
        return looks
