"""Where a slice lies in the square frame that the network sees: the only place that scales or pads.

A pixel's index is its centre, so that resampling by a factor ``f`` takes index ``i`` to ``(i + 0.5) * f - 0.5``.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from motor_ray.config import FrameSettings
from motor_ray.errors import TomogramError

OVERLAP = 1 / 8
"""Neighbouring frames share at least this much of their edge, so that a motor on a seam is whole in one of them."""

MAX_FRAMES = 64
"""A slice that would need more frames than this has a voxel spacing that cannot be true."""

MILD_SHRINKING = 0.75
"""Down to this factor, that of 960 voxels to 720 pixels, interpolation weighs the same two neighbours as averaging
areas does, about as much, in a sixth of the time: by (5/6, 1/6) and (1/2, 1/2) instead of (3/4, 1/4) and (1/2, 1/2)."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A square window on a resampled slice.

    ``slice_shape`` and ``resampled_shape`` are (y, x) pixels before and after resampling; ``origin`` is the
    pixel of the resampled slice under the frame's first pixel, negative where the frame reaches beyond the slice.
    """

    size: int
    slice_shape: tuple[int, int]
    resampled_shape: tuple[int, int]
    origin: tuple[int, int]

    @property
    def scale(self) -> NDArray[np.float64]:
        """Frame pixels per slice voxel, (y, x); the two differ by rounding."""
        return np.divide(self.resampled_shape, self.slice_shape)

    def to_frame(self, yx: ArrayLike) -> NDArray[np.float64]:
        """``(..., 2)`` positions in slice voxels to frame pixels."""
        return (np.asarray(yx) + 0.5) * self.scale - 0.5 - self.origin

    def to_slice(self, yx: ArrayLike) -> NDArray[np.float64]:
        """``(..., 2)`` positions in frame pixels to slice voxels; the inverse of `to_frame`."""
        return (np.asarray(yx) + self.origin + 0.5) / self.scale - 0.5

    def boxes_to_frame(self, boxes: ArrayLike) -> NDArray[np.float64]:
        """``(n, 4)`` boxes (centre y, x, height, width) in slice voxels to frame pixels."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        return np.hstack([self.to_frame(boxes[:, :2]), boxes[:, 2:] * self.scale])

    def boxes_to_slice(self, boxes: ArrayLike) -> NDArray[np.float64]:
        """``(n, 4)`` boxes (centre y, x, height, width) in frame pixels to slice voxels."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        return np.hstack([self.to_slice(boxes[:, :2]), boxes[:, 2:] / self.scale])

    def cut(self, resampled: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The ``(size, size)`` frame of a resampled slice ``(y, x)``; beyond the slice it is the slice's mean grey.

        It is written to `out` if that is given, an array of that shape.
        """
        top, left = self.origin
        inside = resampled[max(top, 0) : top + self.size, max(left, 0) : left + self.size]
        frame = np.empty((self.size, self.size), np.uint8) if out is None else out
        above, before = max(-top, 0), max(-left, 0)
        rows, columns = slice(above, above + inside.shape[0]), slice(before, before + inside.shape[1])
        if inside.shape != frame.shape:
            grey = round(cv2.mean(resampled)[0])
            frame[:above], frame[rows.stop :] = grey, grey
            frame[:, :before], frame[:, columns.stop :] = grey, grey
        frame[rows, columns] = inside
        return frame


def frames_of(
    slice_shape: tuple[int, int], voxel_spacing_angstrom: float | None, settings: FrameSettings
) -> list[Frame]:
    """The frames that cover a slice of ``slice_shape`` (y, x) voxels: one in mode 'fit', as few as it takes otherwise.

    Raises TomogramError in mode 'spacing' if the voxel spacing is unknown or would need absurdly many frames.
    """
    factor = settings.size / max(slice_shape)
    if settings.mode == "spacing":
        if voxel_spacing_angstrom is None:
            raise TomogramError(
                "frames at a fixed spacing need the voxel spacing, and this tomogram has none; "
                "put it in the manifest's column voxel_spacing_angstrom or give --archive.voxel-spacing-angstrom"
            )
        factor = voxel_spacing_angstrom / settings.spacing_angstrom
    height, width = (max(round(edge * factor), 1) for edge in slice_shape)
    tops, lefts = _origins(height, settings.size), _origins(width, settings.size)
    if len(tops) * len(lefts) > MAX_FRAMES:
        raise TomogramError(
            f"a slice of {slice_shape[0]} x {slice_shape[1]} voxels of {voxel_spacing_angstrom:g} angstrom needs "
            f"{len(tops) * len(lefts)} frames at {settings.spacing_angstrom:g} angstrom per pixel, more than "
            f"{MAX_FRAMES}; is the voxel spacing right?"
        )
    return [
        Frame(size=settings.size, slice_shape=slice_shape, resampled_shape=(height, width), origin=(top, left))
        for top in tops
        for left in lefts
    ]


def inside(yx: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """Which of ``(n, 2)`` positions lie on a frame of `size` pixels, edge to edge: from -0.5 to ``size - 0.5``."""
    return np.asarray(((yx >= -0.5) & (yx < size - 0.5)).all(axis=1))


def resample(image: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice ``(y, x)`` at another ``shape``: pixel areas are averaged when it shrinks much, else interpolated."""
    if image.shape == shape:
        return image
    method = cv2.INTER_AREA if max(shape) < MILD_SHRINKING * max(image.shape) else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (shape[1], shape[0]), interpolation=method), dtype=np.uint8)


def _origins(edge: int, size: int) -> list[int]:
    """First pixels of the windows of `size` that cover `edge` pixels; one centred window if it fits."""
    if edge <= size:
        return [-((size - edge) // 2)]
    overlap = round(size * OVERLAP)
    count = math.ceil((edge - overlap) / (size - overlap))
    return [round(start) for start in np.linspace(0, edge - size, count)]
