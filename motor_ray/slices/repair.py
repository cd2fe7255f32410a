"""Grey levels that were damaged before we got them: wrapped bytes and inverted contrast, found and undone.

Both are judged on several slices of one tomogram together, and only where the evidence is plain: a damaged tomogram
that is left as it is costs some motors, a good one that is "repaired" all of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from motor_ray.config import PreprocessSettings, RunSettings
from motor_ray.slices.preprocess import grey_limits, stretch

Image = NDArray[Any]
"""A slice ``(y, x)`` of any real dtype."""

SAMPLE_STEP = 8
"""Histograms are taken from every so many rows and columns."""

TORN_MASS, TORN_RATIO, TORN_JUMPS = 0.01, 4.0, 0.2
"""Wrapped: so much of the mass on both sides of 255|0, so many times that of 127|128; and of it so much in jumps.

Of the 648 public tomograms two are torn (3 % and 10 %, nothing in the middle); all others with mass on both sides
have more of it in the middle.
"""

SMALLEST_EDGE = 512
"""Smaller slices show too little to judge their contrast by."""

RIM = 8
"""An eighth of a slice on each side is left out: carbon, padding and what the tilted views missed lie there."""

TILES = 4
"""The rest is judged in 4 x 4 tiles: one ice crystal with a bright fringe must not speak for all of it."""

SMOOTH = 0.03
"""Band-passed variance over that which averaging 2 x 2 pixels removes: 0.011 in white noise, 0.009 in a real slice, and
more than this in one that was smoothed. There ranks are of structure, no longer of noise, and the sign that is left
says little."""


class Evidence(NamedTuple):
    """What tells inverted contrast at one scale."""

    skewness: float
    """Towards bright: of all pixels, and half as much in most tiles."""

    share: float
    """Of the tiles, those that are skewed towards bright at all."""


FINE, COARSE = Evidence(0.08, 0.8), Evidence(0.05, 0.6)
"""None of 8,878 good pictures was taken for inverted: simulated ones and parts of a real slice with noise, filters,
JPEG and the public tomograms' histograms put on them. Of the raw ones' negatives a third is noticed."""

FINE_SIGMAS, COARSE_SIGMAS = (0.8, 1.28), (0.64, 1.02)
"""Of the difference of Gaussians, in pixels of 4 and of 8 voxels: 3 to 5, and 5 to 8 voxels."""

KERNEL = 7
"""Pixels that these Gaussians take; OpenCV would choose up to 11, which costs a third more and changes nothing."""


class Repair(NamedTuple):
    """What is wrong with the grey levels of some slices."""

    wrapped: bool
    inverted: bool

    @property
    def note(self) -> str | None:
        """What was done to the slices, for people; None if nothing."""
        done = ["bytes were wrapped at 128"] * self.wrapped + ["contrast was inverted"] * self.inverted
        return "; ".join(done) or None


SOUND = Repair(wrapped=False, inverted=False)


def repair_asked(images: Sequence[Image], settings: RunSettings) -> Repair:
    """What `find_repair` says of `images`; nothing is wrong if repairs are not asked for."""
    return find_repair(images, settings.preprocess) if settings.archive.repair else SOUND


def find_repair(images: Sequence[Image], preprocess: PreprocessSettings) -> Repair:
    """What is wrong with `images`, slices of one tomogram of one size, in any order; nothing if there are none."""
    wrapped = look_wrapped(images)
    if wrapped:
        images = [_unwrap(image) for image in images]
    return Repair(wrapped, look_inverted(images, preprocess))


def repaired(image: Image, repair: Repair) -> Image:
    """`image` without what `repair` found; unwrapped bytes are uint8, else the dtype stays. `image` is not changed."""
    if repair.wrapped:
        image = _unwrap(image)
    if repair.inverted:
        image = ~image if image.dtype.kind in "iu" else -image
    return image


def look_wrapped(images: Sequence[Image]) -> bool:
    """Whether bytes were read with the wrong sign, in `images` of bytes or of another type that holds bytes' values.

    Read so, grey levels wrap: the middle of the histogram is torn apart and lies at both ends. The values then meet
    across the seam at which the true reading does *not* end: many on both sides of 127|128 speak for the reading at
    hand, many on both sides of 255|0 for the other. Zeros and clipped extremes pile up on the seams themselves in
    either reading and are not counted. A picture in black and white would pass, but only at its edges do neighbours
    jump from end to end; in a torn reading noise makes them jump everywhere.
    """
    if not images:
        return False
    step = SAMPLE_STEP
    levels = _byte_levels(np.concatenate([image[::step, ::step].ravel() for image in images]))
    if levels is None:
        return False
    share = np.bincount(levels, minlength=256) / max(levels.size, 1)
    inside = min(share[96:127].sum(), share[129:160].sum())
    across = min(share[1:32].sum(), share[224:255].sum())
    if across <= max(TORN_MASS, TORN_RATIO * inside):
        return False
    return bool(np.mean([_jumps(image) for image in images]) > TORN_JUMPS * across)


def look_inverted(images: Sequence[Image], preprocess: PreprocessSettings) -> bool:
    """Whether dense things are bright in `images`, as far as that can be seen.

    Membranes, filaments and beads are thin and few: the response to a band-pass of their size has its longer tail on
    their side. The response is skewed as well wherever grey levels are not linear in density, so these are replaced
    by their ranks first, which needs noise that outweighs structure. At coarser scales crowded cytoplasm turns the
    sign around, at finer ones noise does; so two scales must agree.
    """
    if not images or min(images[0].shape) < SMALLEST_EDGE:
        return False
    halves = _as_bytes([_half(_middle(image)) for image in images], preprocess)
    table = _ranks(halves)
    fine, coarse, noise = np.zeros((2, TILES, TILES)), np.zeros((2, TILES, TILES)), 0.0
    for half in halves:
        ranked = cv2.LUT(half, table)
        quarter = _half(ranked)
        fine += _moments(quarter, FINE_SIGMAS)
        coarse += _moments(_half(quarter), COARSE_SIGMAS)
        noise += _variance(ranked) - _variance(quarter)
    noisy = fine[0].mean() < SMOOTH * noise
    return bool(noisy) and _is_bright(fine, FINE) and _is_bright(coarse, COARSE)


def _byte_levels(values: Image) -> NDArray[np.uint8] | None:
    """`values` counted up from the lowest that a byte of their sign can have; None if they are no bytes' values."""
    if values.dtype == np.uint8:
        return values
    if values.size == 0:
        return None
    lowest, low, high = -128 if values.min() < 0 else 0, values.min(), values.max()
    if not (lowest <= low and high <= lowest + 255) or (values != np.rint(values)).any():
        return None
    return (values.astype(np.int16) - lowest).astype(np.uint8)


def _jumps(image: Image) -> float:
    """Share of neighbours along x that differ by more than half of a byte's range."""
    left, right = image[::SAMPLE_STEP, :-1:SAMPLE_STEP], image[::SAMPLE_STEP, 1::SAMPLE_STEP]
    if left.size == 0:
        return 0.0
    return float(np.mean(np.abs(left.astype(np.float32) - right.astype(np.float32)) > 128))


def _unwrap(image: Image) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image ^ np.uint8(128)
    if image.dtype == np.int8:
        return image.astype(np.uint8)
    values = np.nan_to_num(image.astype(np.float32))
    # Below zero lie bytes that were read as signed ones, and were meant from 0 on; else it was the other way round.
    turn = 0 if values.min() < 0 else 128
    return (np.rint(values + turn) % 256).astype(np.uint8)


def _middle(image: Image) -> Image:
    y, x = (edge // RIM for edge in image.shape)
    return image[y:-y, x:-x]


def _half(image: Image) -> Image:
    """`image` at half its size, averaged, in float32 unless it is bytes."""
    if image.dtype == np.int8:
        image = image.view(np.uint8) ^ np.uint8(128)
    if image.dtype not in (np.uint8, np.int16, np.uint16):  # the whole numbers that OpenCV knows
        image = image.astype(np.float32, copy=False)
    halved = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return halved if image.dtype == np.uint8 else halved.astype(np.float32, copy=False)


def _as_bytes(images: list[Image], preprocess: PreprocessSettings) -> list[NDArray[np.uint8]]:
    """Bytes as they are, others stretched alike to 0-255; none if no pixel is finite."""
    if all(image.dtype == np.uint8 for image in images):
        return images
    sample = np.concatenate([image[::SAMPLE_STEP, ::SAMPLE_STEP].ravel() for image in images])
    limits = grey_limits(sample, preprocess)
    return [stretch(image, *limits) for image in images] if limits else []


def _ranks(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The table of 256 that makes the grey levels of `images` uniform; that of the negatives mirrors it."""
    counts = np.zeros(256)
    for image in images:
        counts += np.bincount(image[::4, ::4].ravel(), minlength=256)
    below = np.cumsum(counts) - counts / 2
    return np.asarray(np.rint(below * (255 / max(counts.sum(), 1))), dtype=np.uint8)


def _variance(image: Image) -> float:
    return float(cv2.meanStdDev(image)[1][0, 0] ** 2)


def _moments(image: NDArray[np.uint8], sigmas: tuple[float, float]) -> NDArray[np.float64]:
    """Mean square and mean cube of the band-passed `image` in each tile, ``(2, TILES, TILES)``."""
    values = image.astype(np.float32)
    narrow, wide = (cv2.GaussianBlur(values, (KERNEL, KERNEL), sigma) for sigma in sigmas)
    band = narrow - wide
    # OpenCV is five times faster where the tiles are of whole pixels.
    band = band[: band.shape[0] // TILES * TILES, : band.shape[1] // TILES * TILES]
    square = band * band
    tiles = [cv2.resize(power, (TILES, TILES), interpolation=cv2.INTER_AREA) for power in (square, square * band)]
    return np.array(tiles, np.float64)


def _is_bright(moments: NDArray[np.float64], needed: Evidence) -> bool:
    """Whether the skewness of all pixels, and in a weaker form that of most tiles, is towards bright."""
    square, cube = np.maximum(moments[0], 1e-9), moments[1]
    tiles = cube / square**1.5
    whole = cube.mean() / square.mean() ** 1.5
    return bool(
        whole > needed.skewness and np.median(tiles) > needed.skewness / 2 and (tiles > 0).mean() >= needed.share
    )
