from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.config import PreprocessSettings
from motor_ray.slices.repair import SOUND, Repair, find_repair, look_wrapped, repaired

RECIPE = PreprocessSettings()
SHAPE = (560, 520)


def cells(seed: int = 0, count: int = 3, noise: float = 25.0) -> list[np.ndarray]:
    """Slices ``SHAPE`` of one specimen, around 130: membranes and beads on noisy ground, dark as they should be."""
    rng = np.random.default_rng(seed)
    drawing: np.ndarray = np.zeros(SHAPE, np.float32)
    for _ in range(20):
        centre, axes = rng.integers(0, 540, 2).tolist(), rng.integers(25, 70, 2).tolist()
        cv2.ellipse(drawing, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, 2)
    for _ in range(40):
        cv2.circle(drawing, rng.integers(0, 540, 2).tolist(), int(rng.integers(2, 5)), 1.0, -1)
    drawing = cv2.GaussianBlur(drawing, (0, 0), 1.0)
    return [130 - 35 * drawing + rng.normal(0, noise, SHAPE) for _ in range(count)]


def as_bytes(images: list[np.ndarray]) -> list[np.ndarray]:
    return [np.rint(image).clip(0, 255).astype(np.uint8) for image in images]


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0))


def stored(values: np.ndarray, dtype: type, padding: float) -> list[np.ndarray]:
    """`values` as bytes, seen as unsigned: what a reader gets that does not know the sign."""
    limits = np.iinfo(dtype)
    image = np.rint(values).clip(limits.min, limits.max).astype(dtype)
    image[: int(padding * len(image))] = 0
    return [image.view(np.uint8)]


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(0, 255), spread=st.floats(3, 60), padding=st.floats(0, 0.3))
def test_unsigned_bytes_never_look_wrapped(mean: float, spread: float, padding: float) -> None:
    values = np.random.default_rng(0).normal(mean, spread, (500, 640))
    assert not look_wrapped(stored(values, np.uint8, padding))


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(-1.5, 1.5), spread=st.floats(3, 40), padding=st.floats(0, 0.3))
def test_signed_bytes_on_both_sides_of_zero_look_wrapped(mean: float, spread: float, padding: float) -> None:
    values = np.random.default_rng(0).normal(mean * spread, spread, (500, 640))
    assert look_wrapped(stored(values, np.int8, padding))


Wrap = Callable[[np.ndarray], np.ndarray]
WRAPPED: dict[str, Wrap] = {
    "signed bytes read as unsigned": lambda image: image ^ np.uint8(128),
    "unsigned bytes read as signed": lambda image: image.view(np.int8),
    "unsigned bytes read as signed and kept as float32": lambda image: image.view(np.int8).astype(np.float32),
    "signed bytes read as unsigned and kept as int16": lambda image: (image ^ np.uint8(128)).astype(np.int16),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("inverted", [False, True])
def test_wrapped_bytes_of_any_type_become_what_they_were(wrap: Wrap, inverted: bool) -> None:
    images = as_bytes(cells())
    seen = [wrap(~image if inverted else image) for image in images]
    repair = find_repair(seen, RECIPE)
    assert repair == Repair(wrapped=True, inverted=inverted)
    for image, values in zip(images, seen, strict=True):
        np.testing.assert_array_equal(repaired(values, repair), image)


@pytest.mark.parametrize("quality", [60, 95])
def test_wrapped_bytes_are_seen_through_jpeg(quality: int) -> None:
    images = as_bytes(cells())
    seen = [as_jpeg(image ^ np.uint8(128), quality) for image in images]
    repair = find_repair(seen, RECIPE)
    assert repair.wrapped
    near = np.abs(repaired(seen[0], repair).astype(int) - images[0])
    assert np.median(near) < 25


def test_a_picture_in_black_and_white_is_not_torn() -> None:
    two_tones = np.where(cells()[0] < 125, 20, 235) + np.random.default_rng(0).normal(0, 12, SHAPE)
    blocks = cv2.resize(two_tones[::40, ::40], SHAPE[::-1], interpolation=cv2.INTER_LINEAR)
    assert not look_wrapped(as_bytes([blocks]))


Turn = Callable[[np.ndarray], np.ndarray]
KINDS: dict[str, Turn] = {
    "uint8": lambda image: np.rint(image).clip(0, 255).astype(np.uint8),
    "int8": lambda image: np.rint(image - 128).clip(-128, 127).astype(np.int8),
    "int16": lambda image: (200 * image - 20000).astype(np.int16),
    "uint16": lambda image: (200 * image.clip(0)).astype(np.uint16),
    "float16": lambda image: (image / 1000).astype(np.float16),
    "float32": lambda image: (1e6 + image).astype(np.float32),
    "float64": lambda image: -1e-9 * (255 - image),
}


@pytest.mark.parametrize("turn", KINDS.values(), ids=KINDS.keys())
def test_inverted_contrast_is_found_and_undone_in_every_type(turn: Turn) -> None:
    good = [turn(image) for image in cells()]
    assert find_repair(good, RECIPE) == SOUND
    negative = [turn(255 - image) for image in cells()]
    repair = find_repair(negative, RECIPE)
    assert repair == Repair(wrapped=False, inverted=True)
    upright = repaired(negative[0], repair)
    assert upright.dtype == good[0].dtype
    assert np.corrcoef(upright.ravel().astype(float), good[0].ravel().astype(float))[0, 1] > 0.999


@settings(max_examples=25, deadline=None)
@given(
    gamma=st.floats(0.2, 5), blur=st.floats(0.3, 2), quality=st.integers(40, 100), seed=st.integers(0, 5),
    low=st.floats(0, 120), high=st.floats(135, 255),
)  # fmt: skip
def test_no_curve_of_grey_levels_makes_good_contrast_look_inverted(
    gamma: float, blur: float, quality: int, seed: int, low: float, high: float
) -> None:
    scaled = [((image - 40) / 160).clip(0, 1) ** gamma * (high - low) + low for image in cells(seed, count=1)]
    images = [as_jpeg(cv2.GaussianBlur(image, (0, 0), blur), quality) for image in as_bytes(scaled)]
    assert find_repair(images, RECIPE) == SOUND


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 12), blur=st.floats(0.3, 4), power=st.floats(0.3, 1.2),
    together=st.booleans(),
)  # fmt: skip
def test_noise_is_left_alone(seed: int, count: int, blur: float, power: float, together: bool) -> None:
    rng = np.random.default_rng(seed)
    fields = [cv2.GaussianBlur(rng.normal(size=SHAPE), (0, 0), blur) for _ in range(1 if together else count)]
    images = [np.exp(power * field / field.std()).astype(np.float32) for field in fields]
    assert find_repair(images * count if together else images, RECIPE) == SOUND


def test_in_a_smoothed_picture_nothing_is_claimed_of_its_contrast() -> None:
    images = [cv2.GaussianBlur(image, (0, 0), 2) for image in as_bytes([255 - image for image in cells()])]
    assert find_repair(images, RECIPE) == SOUND


def test_what_shows_nothing_is_left_alone() -> None:
    flat = [np.full(SHAPE, 7, dtype) for dtype in (np.uint8, np.int16, np.float32)]
    for images in ([], *([image] for image in flat), [np.zeros((0, 5), np.uint8)], as_bytes([255 - cells()[0][:300]])):
        assert find_repair(images, RECIPE) == SOUND
    assert repaired(flat[0], SOUND) is flat[0]


def test_voxels_that_are_not_finite_neither_decide_nor_disturb() -> None:
    images: list[Any] = [(255 - image).astype(np.float32) for image in cells()]
    for image in images:
        image[:100] = np.nan
        image[300, 200], image[301, 77] = np.inf, -np.inf
    repair = find_repair(images, RECIPE)
    assert repair == Repair(wrapped=False, inverted=True)
    np.testing.assert_array_equal(np.isnan(repaired(images[0], repair)), np.isnan(images[0]))
    wild = (np.random.default_rng(0).uniform(-1, 1, SHAPE) * 3e38).astype(np.float32)
    for useless in (np.full(SHAPE, np.nan), wild):
        assert find_repair([useless], RECIPE) == SOUND


def test_the_order_of_slices_does_not_matter_and_none_is_changed() -> None:
    images = [~image for image in as_bytes(cells(count=5))]
    before = [image.copy() for image in images]
    for image in images:
        image.flags.writeable = False
    orders = (images, images[::-1], images[2:] + images[:2])
    assert len({find_repair(order, RECIPE) for order in orders}) == 1
    for image, copy in zip(images, before, strict=True):
        repaired(image, Repair(wrapped=True, inverted=True))
        np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize(
    ("repair", "note"),
    [
        (SOUND, None),
        (Repair(wrapped=True, inverted=False), "bytes were wrapped at 128"),
        (Repair(wrapped=False, inverted=True), "contrast was inverted"),
        (Repair(wrapped=True, inverted=True), "bytes were wrapped at 128; contrast was inverted"),
    ],
)
def test_the_note_says_what_was_wrong(repair: Repair, note: str | None) -> None:
    assert repair.note == note
