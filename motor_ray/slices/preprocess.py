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

LARGEST_RANGE = 1e38
"""Values that lie farther apart are no densities but damage, and soon no difference that float32 can hold."""


def make_frames(
    image: NDArray[np.generic],
    frames: Sequence[Frame],
    settings: PreprocessSettings,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The frames ``(n, size, size)`` of a slice ``(y, x)`` of any real dtype; `frames` all lie on that slice.

    They are written to `out` if that is given, an array of that shape: a fresh one for each slice of a slab would be
    copied once more.
    """
    grey = resample(to_uint8(image, settings), frames[0].resampled_shape)
    if settings.clahe:
        grey = equalise(grey, settings)
    made = np.empty((len(frames), frames[0].size, frames[0].size), np.uint8) if out is None else out
    for frame, place in zip(frames, made, strict=True):
        frame.cut(grey, place)
    return made


def contrasts_of(settings: PreprocessSettings, contrasts: int) -> list[PreprocessSettings]:
    """How each of 1 or 2 versions of a frame is made: as `settings` say; and with CLAHE off, or on if it is off."""
    return [settings, settings.model_copy(update={"clahe": not settings.clahe})][:contrasts]


def to_uint8(image: NDArray[np.generic], settings: PreprocessSettings) -> NDArray[np.uint8]:
    """8-bit slices as they are; others clipped at percentiles and stretched to 0-255, a constant one to 0.

    NaN becomes the darkest grey, an infinity the end on its side. Raises SliceCorruptError if no pixel is finite, or
    if they lie farther apart than densities can.
    """
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    step_y, step_x = (max(edge // SAMPLE_EDGE, 1) for edge in image.shape)
    limits = grey_limits(image[::step_y, ::step_x], settings)
    if limits is None:
        raise SliceCorruptError(
            f"no densities in a slice of {image.shape[0]} x {image.shape[1]} voxels: none is finite, or they lie "
            f"{LARGEST_RANGE:g} apart; copy it again"
        )
    return stretch(image, *limits)


def grey_limits(values: NDArray[np.generic], settings: PreprocessSettings) -> tuple[float, float] | None:
    """The values that become black and white, for a sample of a slice, of any shape.

    None if no value is finite, or if these two are more than LARGEST_RANGE apart.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        return None
    low, high = np.percentile(finite, settings.clip_percentiles)
    return (float(low), float(high)) if high - low < LARGEST_RANGE else None


def stretch(image: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """`image` as bytes, from 0 at `low` or below, and for NaN, to 255 at `high` or above; 0 if these are the same."""
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, and is clipped
        values = image.astype(np.float32)
    # fmax takes a number rather than NaN; all in place, for this is most of what such a slice costs.
    np.fmin(np.fmax(values, low, out=values), high, out=values)
    values -= low
    values *= 255 / (high - low)
    values += 0.5
    return values.astype(np.uint8)


def equalise(image: NDArray[np.uint8], settings: PreprocessSettings) -> NDArray[np.uint8]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of a slice ``(y, x)``."""
    tiles = (settings.clahe_tiles, settings.clahe_tiles)
    return np.asarray(cv2.createCLAHE(settings.clahe_clip, tiles).apply(image), dtype=np.uint8)
