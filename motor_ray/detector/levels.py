"""Several levels of a pyramid as one: side by side to learn from, and on one grid of stride 4 to look at.

Maps are the heads' outputs on one level: logits `(b, 1, h, w)`, sizes and offsets `(b, 2, h, w)` in cells of it.
Levels come finest first, of strides `LEVEL_STRIDES`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from motor_ray.config import LEVEL_STRIDES

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

FALL = 0.1
"""By how much logits fall from cell to cell at the rim, where there is nothing to interpolate with."""

SLOPE = 1e-5
"""By how much logits of neighbouring coarse cells are told apart that would otherwise be equal."""


def side_by_side(levels: Sequence[Maps]) -> Maps:
    """The cells of all levels in one row, `(b, c, 1, n)`: a loss that judges cell by cell needs to know no more.

    A single level stays as it is.
    """
    if len(levels) == 1:
        return levels[0]
    heatmap, size, offset = (
        torch.cat([part.flatten(2) for part in parts], dim=2).unsqueeze(2) for parts in zip(*levels, strict=True)
    )
    return heatmap, size, offset


def merge_levels(levels: Sequence[Maps]) -> Maps:
    """One map of stride 4 from those of all levels, in float32; a single level stays as it is.

    In each cell the level with the highest logit says how large the box is and where its centre lies, which is in a
    coarser cell, so that the offset may be below 0 or above 1. The peaks are those of the levels, each at a single
    cell and as high as on its level, so that decoding finds the same boxes.
    """
    if len(levels) == 1:
        return levels[0]
    heatmap, size, offset = (part.float() for part in levels[0])
    height, width = heatmap.shape[-2:]
    for level, stride in zip(levels[1:], LEVEL_STRIDES[1:], strict=False):
        parts = _on_finest(level, stride // LEVEL_STRIDES[0])
        logits, sizes, offsets = (part[..., :height, :width] for part in parts)
        wins = logits > heatmap
        size, offset = torch.where(wins, sizes, size), torch.where(wins, offsets, offset)
        heatmap = torch.maximum(heatmap, logits)  # which keeps a NaN, so that a broken answer is noticed
    return heatmap, size, offset


def _on_finest(level: Maps, ratio: int) -> Maps:
    """A level's maps on cells `ratio` times as fine, whose lengths are in these cells."""
    logits, sizes, offsets = (part.float() for part in level)
    sizes, offsets = (part.repeat_interleave(ratio, -2).repeat_interleave(ratio, -1) for part in (sizes, offsets))
    rows, columns = (torch.arange(edge, device=logits.device) % ratio for edge in sizes.shape[-2:])
    within = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return _interpolated(logits, ratio), ratio * sizes, ratio * offsets - within


def _interpolated(logits: torch.Tensor, ratio: int) -> torch.Tensor:
    """`logits` at their values in one cell of the `ratio` x `ratio` each, and straight lines between these cells.

    So there is a peak where a coarse cell has one, and nowhere else: interpolated between the true centres, which lie
    between cells, a peak would be lower than it is; repeated, it would be several.
    """
    height, width = logits.shape[-2:]
    rows, columns = (torch.arange(edge, device=logits.device, dtype=logits.dtype) for edge in (height, width))
    # Equal neighbours, usual where the heads computed in 16 bits, would be two peaks once there are cells between them.
    distinct = logits - SLOPE * (2 * rows[:, None] + columns)
    between = [ratio * (edge - 1) + 1 for edge in (height, width)]
    lines = F.interpolate(distinct, size=between, mode="bilinear", align_corners=True)
    before, after = ratio // 2, ratio - 1 - ratio // 2
    down, right = (_beyond(edge, before, after, logits) for edge in between)
    return F.pad(lines, (before, after, before, after), mode="replicate") - FALL * (down[:, None] + right)


def _beyond(edge: int, before: int, after: int, like: torch.Tensor) -> torch.Tensor:
    """How far each of `before + edge + after` places lies outside the `edge` in their middle."""
    places = torch.arange(-before, edge + after, device=like.device, dtype=like.dtype)
    return (-places).clamp(min=0) + (places - (edge - 1)).clamp(min=0)
