"""What the network saw where it found something: a few numbers for each box."""

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from motor_ray.config import HEATMAP_STRIDE
from motor_ray.detector.decode import Detections

GRID = 3
"""A box is divided into so many parts along each edge."""


def describe(features: torch.Tensor, found: list[Detections]) -> list[NDArray[np.float16]]:
    """Of each box in each of `b` frames its features: of its middle part, then the mean of those around, `(n, 2 c)`.

    `features` are those of the frames' cells, `(b, c, h, w)`. The parts around are averaged, because a motor is seen
    from any side: turning or mirroring a frame changes nothing. Beyond the frame its last cells go on.
    """
    corners = [_corners(one.boxes).to(features) for one in found]
    parts = roi_align(features, corners, GRID, 1 / HEATMAP_STRIDE, sampling_ratio=2, aligned=True).flatten(2)
    middle = GRID**2 // 2
    around = (parts.sum(dim=2) - parts[..., middle]) / (GRID**2 - 1)
    largest = float(np.finfo(np.float16).max)
    numbers = torch.cat([parts[..., middle], around], dim=1).clamp(-largest, largest).half().cpu().numpy()
    return np.split(numbers, np.cumsum([len(one.scores) for one in found])[:-1])


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """`(n, 4)` x, y of both corners of `(n, 4)` centre y, x, height, width. Here pixel 0 begins at 0."""
    centre, half = boxes[:, [1, 0]] + 0.5, boxes[:, [3, 2]] / 2
    return torch.cat([centre - half, centre + half], dim=1)
