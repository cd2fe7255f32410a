"""Grey levels: any slice to 8-bit frames, the form in which slices travel."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from motor_ray.config import PreprocessSettings
from motor_ray.errors import SliceCorruptError
from motor_ray.slices.frame import Frame, resample

SAMPLE_EDGE = 256
"""Percentiles are taken on about this many rows and columns: exact to a grey level, and 10x faster."""


def make_frames(image: NDArray[np.generic], frames: Sequence[Frame], settings: PreprocessSettings) -> NDArray[np.uint8]:
    """The frames ``(n, size, size)`` of a slice ``(y, x)`` of any real dtype; `frames` all lie on that slice."""
    grey = resample(to_uint8(image, settings), frames[0].resampled_shape)
    if settings.clahe:
        grey = equalise(grey, settings)
    return np.stack([frame.cut(grey) for frame in frames])


def to_uint8(image: NDArray[np.generic], settings: PreprocessSettings) -> NDArray[np.uint8]:
    """8-bit slices as they are; others clipped at percentiles and stretched to 0-255, a constant one to 0.

    Pixels that are not finite become the darkest grey. Raises SliceCorruptError if none is finite.
    """
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    step_y, step_x = (max(edge // SAMPLE_EDGE, 1) for edge in image.shape)
    sample = image[::step_y, ::step_x].astype(np.float32)
    finite = sample[np.isfinite(sample)]
    if finite.size == 0:
        raise SliceCorruptError(f"no finite pixel in a slice of {image.shape[0]} x {image.shape[1]} voxels")
    low, high = np.percentile(finite, settings.clip_percentiles)
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    stretched = (np.nan_to_num(image.astype(np.float32), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.asarray(np.clip(np.rint(stretched), 0, 255), dtype=np.uint8)


def equalise(image: NDArray[np.uint8], settings: PreprocessSettings) -> NDArray[np.uint8]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of a slice ``(y, x)``."""
    tiles = (settings.clahe_tiles, settings.clahe_tiles)
    return np.asarray(cv2.createCLAHE(settings.clahe_clip, tiles).apply(image), dtype=np.uint8)
