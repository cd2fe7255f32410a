"""From prediction maps to scored boxes, slice by slice; what boxes on several slices mean is not known here."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from motor_ray.config import HEATMAP_STRIDE
from motor_ray.detector.model import Prediction


class Detections(NamedTuple):
    """Boxes on one frame, best first."""

    boxes: torch.Tensor
    """``(n, 4)`` centre y, centre x, height and width, float32 in frame pixels."""

    scores: torch.Tensor
    """``(n,)`` from 0 to 1."""


def decode(prediction: Prediction, max_detections: int, threshold: float) -> list[Detections]:
    """The best peaks of each frame's heatmap that reach `threshold`, as boxes; at most `max_detections` a frame.

    A peak is a cell that no neighbour among the 3 x 3 around it exceeds; of equal neighbours one is reported.
    A centre in cell ``c`` with offset ``o`` lies at frame pixel ``(c + o) * 4 - 0.5``.
    """
    logits = prediction.heatmap.detach().float()
    width = logits.shape[-1]
    peaks = logits == F.max_pool2d(logits, 3, stride=1, padding=1)
    ranked = torch.where(peaks, logits, -torch.inf).flatten(1)
    best, cells = ranked.topk(min(max_detections, ranked.shape[1]))
    rows, columns = cells // width, cells % width
    scores = best.sigmoid()
    kept = (scores >= threshold) & best.isfinite() & ~_repeats(rows, columns)
    centres = torch.stack([rows, columns], dim=2) + _at(prediction.offset, cells)
    # A pixel's index is its centre, so the first cell of 4 pixels reaches from -0.5 to 3.5.
    boxes = torch.cat(
        [HEATMAP_STRIDE * centres - 0.5, HEATMAP_STRIDE * _at(prediction.size, cells).clamp(min=0)], dim=2
    )
    return [Detections(boxes[frame, keep], scores[frame, keep]) for frame, keep in enumerate(kept)]


def _at(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The two channels of `maps`, `(b, 2, h, w)`, at flat indices `cells`, `(b, k)`, as `(b, k, 2)`."""
    flat = maps.detach().float().flatten(2)
    return flat.gather(2, cells[:, None].expand(-1, 2, -1)).transpose(1, 2)


def _repeats(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Which of the cells `(b, k)`, best first, touch a better or equal one: plateaus, usual in 16-bit heatmaps."""
    near = ((rows[:, :, None] - rows[:, None]).abs() <= 1) & ((columns[:, :, None] - columns[:, None]).abs() <= 1)
    return near.tril(diagonal=-1).any(dim=2)
