"""Trained networks at work: pictures in, what they say of them out, in numbers that need no torch."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from motor_ray.config import HEATMAP_STRIDE, LEVEL_STRIDES, Augmentation, DetectSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.decode import decode
from motor_ray.detector.description import Models
from motor_ray.detector.descriptor import describe
from motor_ray.detector.device import can_compile, pick_device
from motor_ray.detector.ensemble import average
from motor_ray.detector.inference import Predictor, merged, prepare
from motor_ray.detector.model import Prediction
from motor_ray.detector.tta import VIEWS


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

    features: NDArray[np.float16] | None = None
    """``(n, c)`` of each box, if they are asked for; see `motor_ray.detector.descriptor`."""


class Looker:
    """Owns one network, or several that answer together, and the device that they run on.

    The heatmaps never leave it. One thread may call it.
    """

    def __init__(
        self, model: Models, settings: DetectSettings, *, threads: int, compiled: Literal["on", "off", "if possible"]
    ) -> None:
        torch.set_num_threads(threads)
        self.settings, self.device = settings, pick_device()
        self.compiled = compiled == "on" or (compiled == "if possible" and can_compile(self.device))
        self.channels, self.stride = 0, HEATMAP_STRIDE
        first, *others = [model] if isinstance(model, str) else model
        # Of several networks, and of several views, the first speaks for all about what is seen.
        self.networks = [self._prepared(first, features=settings.features), *map(self._prepared, others)]

    def __call__(self, images: NDArray[np.uint8], tta: Augmentation | None = None) -> list[Look]:
        """A look at each of ``(n, channels, size, size)`` images, with another test-time augmentation if given.

        'full' needs twice the channels: those of the frame, and the same with CLAHE switched.
        """
        most, threshold = self.settings.max_detections, self.settings.score_threshold
        looks: list[Look] = []
        for start in range(0, len(images), self.settings.batch_frames):
            # Copied, because torch cannot look at the object store's read-only memory.
            frames = torch.tensor(images[start : start + self.settings.batch_frames])
            prediction, cells = self.see(frames, self.settings.tta if tta is None else tta)
            maps = torch.cat([prediction.heatmap, prediction.size, prediction.offset], dim=1)
            sound = maps.isfinite().all(dim=(1, 2, 3)) & prediction.presence.isfinite()
            found = decode(prediction, most, threshold)
            features = describe(cells, found) if self.settings.features else [None] * len(found)
            numbers = zip(prediction.presence.sigmoid().tolist(), sound.tolist(), features, strict=True)
            for (boxes, scores), more in zip(found, numbers, strict=True):
                looks.append(Look(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), *more))
        return looks

    def see(self, images: torch.Tensor, tta: Augmentation) -> tuple[Prediction, torch.Tensor]:
        """What all networks say of all views of uint8 `images` `(b, channels, H, W)`, averaged.

        And what the first network sees in the cells of the first view, which is the frame as it is.
        """
        frames, *switched = torch.split(images.to(self.device), self.channels, dim=1)
        views = [(view, view.forward(frames, *switched, stride=self.stride)) for view in VIEWS[tta]]
        said: list[list[Prediction]] = []
        cells: torch.Tensor | None = None
        for network in self.networks:
            levels: list[list[Prediction]] = []
            for view, shown in views:
                seen = network.seen(shown)
                levels.append([view.inverse(level) for level in seen.levels])
                cells = seen.features if cells is None else cells  # large, so the others are let go of at once
            said.append(self._averaged(levels))
        assert cells is not None
        # Levels are merged last: a merged peak of a coarse cell stands in one of its fine cells, in a mirrored view in
        # another one, and the mean of both would be lower than either.
        if len({len(levels) for levels in said}) == 1:
            return merged(self._averaged(said)), cells
        # Of networks with different levels no two maps mean the same, so that this must be borne.
        return average([merged(levels) for levels in said], self.settings.ensemble), cells

    def _averaged(self, several: list[list[Prediction]]) -> list[Prediction]:
        """Level by level."""
        return [average(same, self.settings.ensemble) for same in zip(*several, strict=True)]

    def _prepared(self, model: str, *, features: bool = False) -> Predictor:
        detector = load_checkpoint(model)
        self.channels = detector.in_slices
        self.stride = max(self.stride, LEVEL_STRIDES[detector.levels - 1])
        return prepare(
            detector,
            self.device,
            mixed_precision=self.settings.mixed_precision,
            compiled=self.compiled,
            features=features,
        )
