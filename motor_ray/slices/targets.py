"""What the network should say about a frame: boxes to heatmap, size, offset, mask and presence.

A centre's cell is the floor of its sub-cell position, so that the Gaussian is there exactly as high as it shall be;
the remainder is the offset (Zhou et al. 2019, "Objects as Points", arXiv 1904.07850). A maximum at the sub-cell
position would leave every cell below it, and the focal loss without a positive.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from motor_ray.config import LEVEL_STRIDES, RunSettings, TargetSettings
from motor_ray.slices.frame import Frame, inside

LEVEL_CELLS = 16
"""A box whose longer edge has this many cells of a level, or more, belongs to a coarser one, if there is one: with
strides of 4, 8 and 16 to P2 below 64 frame pixels, to P3 below 128, else to P4.

These are the ranges of FCOS (Tian et al. 2019, arXiv 1904.01355), where an edge is at most 8 strides from the centre.
So a box has 8 to 16 cells on every level, but for the smallest and the largest ones, and the heads can be the same."""


class Targets(NamedTuple):
    """Targets of one frame, or of a batch with a leading axis; all float32, lengths in heatmap cells.

    Those of several levels stand in one row, ``(1, 1, n)`` instead of ``(1, h, w)``, finest level first, as what a
    network predicts in training does.
    """

    heatmap: torch.Tensor
    """``(1, h, w)`` in [0, 1]: around each centre a Gaussian, whose maximum there is the centre's peak."""

    size: torch.Tensor
    """``(2, h, w)`` height and width of the box, at centres; 0 elsewhere."""

    offset: torch.Tensor
    """``(2, h, w)`` y and x from the cell to the centre, 0 to 1, at centres; 0 elsewhere."""

    mask: torch.Tensor
    """``(1, h, w)`` 1 at centres, 0 elsewhere."""

    presence: torch.Tensor
    """``()`` the highest peak of any box, 0 without one."""


def boxes_on_frame(
    motors: NDArray[np.float64],
    z: int,
    reach_voxels: float,
    frame: Frame,
    box_pixels: ArrayLike,
    fade_voxels: float | None = None,
) -> NDArray[np.float64]:
    """The ``(n, 5)`` boxes of the motors that `frame` shows of slice `z`.

    Their columns are centre y, x, height and width in frame pixels, and peak from 0 to 1, how high the target shall be.
    `box_pixels` is the edge of all of them, or their height and width; see `box_on_frame`.
    `motors` are ``(m, 3)`` z, y, x in voxels; a motor shows within `reach_voxels` of its centre along z. On slices away
    from the centre the peak is lower as a Gaussian of standard deviation `fade_voxels` is; always 1 if that is None.
    """
    distances = np.abs(motors[:, 0] - z)
    near = distances <= reach_voxels
    peaks = np.ones(len(motors)) if fade_voxels is None else np.exp(-(distances**2) / (2 * fade_voxels**2))
    centres = frame.to_frame(motors[near, 1:])
    edges = np.full_like(centres, box_pixels)
    return np.column_stack([centres, edges, peaks[near]])[inside(centres, frame.size)]


def box_on_frame(frame: Frame, voxel_spacing_angstrom: float | None, settings: RunSettings) -> NDArray[np.float64]:
    """Height and width ``(2,)``, in frame pixels, of the box that is drawn around a motor on `frame`.

    A spacing that is unknown is taken to be ``link.assumed_spacing_angstrom``.
    """
    targets = settings.targets
    if targets.box_angstrom is None:
        return np.full(2, targets.box_pixels)
    return targets.box_angstrom / (voxel_spacing_angstrom or settings.link.assumed_spacing_angstrom) * frame.scale


def usual_box_cells(settings: RunSettings) -> float:
    """Edge of a usual box, in cells of its level: what a network predicts before it has learned anything."""
    edge = settings.targets.box_pixels
    if settings.targets.box_angstrom is not None and settings.frame.mode == "spacing":
        edge = settings.targets.box_angstrom / settings.frame.spacing_angstrom
    [level] = levels_of(np.array([[0, 0, edge, edge]]), settings.model.levels)
    return edge / LEVEL_STRIDES[level]


def levels_of(boxes: NDArray[np.float64], levels: int) -> NDArray[np.int64]:
    """To which of so many levels, 0 for the finest, each of ``(n, 4)`` or ``(n, 5)`` boxes belongs: to just one."""
    limits = LEVEL_CELLS * np.array(LEVEL_STRIDES[: levels - 1])
    return np.asarray(np.searchsorted(limits, boxes[:, 2:4].max(axis=1), side="right"), dtype=np.int64)


def draw_targets(boxes: NDArray[np.float64], size: int, settings: TargetSettings, levels: int = 1) -> Targets:
    """Targets of a frame of edge `size` pixels, for a network of so many `levels`.

    `boxes` are ``(n, 5)`` centre y, x, height, width in frame pixels, and peak; or ``(n, 4)``, whose peaks are 1.
    Centres must lie in the frame. Of two boxes centred in one cell the one with the higher peak counts, or the later.
    """
    drawn = draw_levels(boxes, size, settings, levels)
    if levels == 1:
        return drawn[0]
    *maps, presence = zip(*drawn, strict=True)
    heatmap, sizes, offset, mask = (
        torch.cat([part.flatten(1) for part in parts], dim=1).unsqueeze(1) for parts in maps
    )
    return Targets(heatmap, sizes, offset, mask, torch.stack(presence).amax())


def draw_levels(boxes: NDArray[np.float64], size: int, settings: TargetSettings, levels: int) -> list[Targets]:
    """Targets as `draw_targets` makes them, those of each level by itself: of the boxes that belong to it."""
    owner = levels_of(boxes, levels)
    return [
        _draw_level(boxes[owner == level], size, settings, stride)
        for level, stride in enumerate(LEVEL_STRIDES[:levels])
    ]


def whole_heatmap(levels: Sequence[Targets]) -> NDArray[np.float32]:
    """The targets' heatmaps of all levels on the finest one's cells, ``(h, w)``, each as its highest: to look at."""
    finest, *coarser = (level.heatmap[0].numpy() for level in levels)
    whole = finest.copy()
    for heatmap in coarser:
        ratio = -(-whole.shape[0] // heatmap.shape[0])
        repeated = heatmap.repeat(ratio, axis=0).repeat(ratio, axis=1)
        np.maximum(whole, repeated[: whole.shape[0], : whole.shape[1]], out=whole)
    return whole


def _draw_level(boxes: NDArray[np.float64], size: int, settings: TargetSettings, stride: int) -> Targets:
    edge = size // stride
    peaks = boxes[:, 4] if boxes.shape[1] == 5 else np.ones(len(boxes))
    order = np.argsort(peaks, kind="stable")
    boxes, peaks = boxes[order, :4], peaks[order]
    # A pixel's index is its centre, so the first cell of 4 pixels reaches from -0.5 to 3.5.
    centres, sizes_in_cells = (boxes[:, :2] + 0.5) / stride, boxes[:, 2:] / stride
    cells = np.floor(centres).astype(np.int64)
    if cells.size and (cells.min() < 0 or cells.max() >= edge):
        outside = boxes[((cells < 0) | (cells >= edge)).any(axis=1)][0]
        raise ValueError(f"box centre ({outside[0]:g}, {outside[1]:g}) lies outside a frame of {size} pixels")
    ys, xs = cells.T
    mask, sizes, offsets = (np.zeros((channels, edge, edge), np.float32) for channels in (1, 2, 2))
    mask[0, ys, xs] = 1
    sizes[:, ys, xs] = sizes_in_cells.T
    offsets[:, ys, xs] = (centres - cells).T
    return Targets(
        heatmap=torch.from_numpy(_draw_heatmap(cells, peaks, edge, settings.sigma)),
        size=torch.from_numpy(sizes),
        offset=torch.from_numpy(offsets),
        mask=torch.from_numpy(mask),
        presence=torch.tensor(peaks.max(initial=0), dtype=torch.float32),
    )


def _draw_heatmap(cells: NDArray[np.int64], peaks: NDArray[np.float64], edge: int, sigma: float) -> NDArray[np.float32]:
    """The highest of the Gaussians around `cells` ``(n, 2)`` with maxima `peaks` ``(n,)``, as ``(1, edge, edge)``."""
    heatmap = np.zeros((1, edge, edge), np.float32)
    axis = np.arange(edge)
    for (y, x), peak in zip(cells, peaks, strict=True):
        rows, columns = (np.exp(-((axis - centre) ** 2) / (2 * sigma**2)) for centre in (y, x))
        np.maximum(heatmap[0], np.outer(peak * rows, columns), out=heatmap[0])
    return heatmap
