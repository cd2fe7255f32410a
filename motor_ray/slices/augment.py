"""Random changes of a training frame; its boxes move along.

Everything is drawn from the generator that is passed in, so a sample is the same on any machine and any
number of workers.
"""

import zlib
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import pdtr

from motor_ray.config import AugmentSettings
from motor_ray.slices.frame import inside

QUANTILES = 4096
"""Evenly spaced quantiles that stand for a Poisson distribution: the variance is right to 0.2 %."""


def sample_generator(seed: int, epoch: int, slice_id: str) -> np.random.Generator:
    """The randomness of one sample: a function of the run's seed, the epoch and the slice, and of nothing else."""
    return np.random.default_rng([seed, epoch, zlib.crc32(slice_id.encode())])


def augment(
    frame: NDArray[np.uint8], boxes: NDArray[np.float64], rng: np.random.Generator, settings: AugmentSettings
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A changed copy of `frame` and of the boxes on it.

    Parameters
    ----------
    frame
        ``(c, y, x)`` grey levels; its channels are neighbouring slices and change together.
    boxes
        ``(n, 4)`` centre y, x, height and width in frame pixels, or ``(n, 5)`` with a peak, which stays. A box whose
        centre leaves the frame is dropped.
    rng
        Source of randomness; see `sample_generator`.
    settings
        How much of each change.
    """
    matrix = random_transform(frame.shape[-1], rng, settings)
    frame, boxes = warp(frame, matrix), move_boxes(boxes, matrix, frame.shape[-1])
    if rng.random() < settings.poisson_probability:
        frame = poisson_noise(frame, rng)
    return blur(frame, rng.uniform(0, settings.blur_sigma_max)), boxes


def random_transform(size: int, rng: np.random.Generator, settings: AugmentSettings) -> NDArray[np.float64]:
    """A ``(2, 3)`` matrix taking homogeneous (x, y, 1) of the frame to (x, y) of the changed one.

    Rotation, zoom and mirroring are about the frame's centre, ``(size - 1) / 2``; then the shift.
    """
    angle = np.deg2rad(rng.uniform(-settings.rotation_degrees, settings.rotation_degrees))
    zoom = rng.uniform(1 - settings.scaling, 1 + settings.scaling)
    shift = rng.uniform(-settings.translation_pixels, settings.translation_pixels, 2)
    mirror = np.where(rng.random(2) < 0.5, -1.0, 1.0) if settings.flips else np.ones(2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = zoom * rotation * mirror
    centre = np.full(2, (size - 1) / 2)
    return np.column_stack([linear, centre - linear @ centre + shift])


def warp(frame: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The ``(c, y, x)`` frame moved by `matrix`. What comes in from outside is mean grey.

    Not a reflection: that would put a motor there which has no label.
    """
    size = frame.shape[-1]
    grey = round(float(frame.mean()))
    moved = [cv2.warpAffine(channel, matrix, (size, size), borderValue=grey) for channel in frame]
    return np.stack(moved).astype(np.uint8, copy=False)


def move_boxes(boxes: NDArray[np.float64], matrix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """``(n, 4)`` or ``(n, 5)`` boxes moved by `matrix`, less those whose centre left the frame.

    A box stands around a point, so it zooms but does not turn with the frame.
    """
    zoom = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    centres = boxes[:, 1::-1] @ matrix[:, :2].T + matrix[:, 2]
    moved = np.column_stack([centres[:, ::-1], boxes[:, 2:4] * zoom, boxes[:, 4:]])
    return moved[inside(moved[:, :2], size)]


def poisson_noise(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A Poisson draw for each pixel of `frame`, of any shape, with its grey level as mean; 255 for those above.

    Looked up rather than drawn, which takes an eighth of the time.
    """
    drawn = rng.integers(0, QUANTILES, frame.shape, dtype=np.uint16)
    return _poisson_quantiles().take(frame.astype(np.intp) * QUANTILES + drawn)


@lru_cache(maxsize=1)
def _poisson_quantiles() -> NDArray[np.uint8]:
    """``(256, QUANTILES)`` quantiles of the Poisson distribution around each grey level, at most 255."""
    middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    # Of the levels 0 to 254 the first that is as likely as that not to be exceeded; 255 where none is.
    rows = [np.searchsorted(pdtr(np.arange(255), grey), middles) for grey in range(256)]
    return np.stack(rows).astype(np.uint8)


def blur(frame: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Gaussian blur of each channel of ``(c, y, x)``; `sigma` in pixels, 0 for none."""
    if sigma <= 0:
        return frame
    return np.stack([cv2.GaussianBlur(channel, (0, 0), sigma) for channel in frame]).astype(np.uint8, copy=False)
