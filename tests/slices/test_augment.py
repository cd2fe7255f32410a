import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import AugmentSettings, TargetSettings
from motor_ray.slices.augment import (
    augment,
    blur,
    move_boxes,
    poisson_noise,
    random_transform,
    sample_generator,
    warp,
)
from motor_ray.slices.targets import draw_targets

SIZE = 128
RECIPE = AugmentSettings()
GEOMETRY = AugmentSettings(flips=True, rotation_degrees=180, poisson_probability=0, blur_sigma_max=0)
STILL = AugmentSettings(rotation_degrees=0, scaling=0, translation_pixels=0, poisson_probability=0, blur_sigma_max=0)


def spot(y: float, x: float) -> np.ndarray:
    """A ``(1, SIZE, SIZE)`` frame, black but for a bright spot of 5 pixels across at (y, x)."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.array(255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8), np.uint8)[None]


@given(st.integers(0, 2**32), st.floats(45, 82), st.floats(45, 82))
def test_moving_the_boxes_then_drawing_is_drawing_then_moving_the_frame(seed, y, x):
    matrix = random_transform(SIZE, np.random.default_rng(seed), GEOMETRY)
    [[moved_y, moved_x, *_]] = move_boxes(np.array([[y, x, 20, 20]]), matrix, SIZE)
    seen = warp(spot(y, x), matrix)[0].astype(float)
    seen[seen < 20] = 0
    rows, columns = np.mgrid[:SIZE, :SIZE]
    centre = (seen * rows).sum() / seen.sum(), (seen * columns).sum() / seen.sum()
    np.testing.assert_allclose(centre, (moved_y, moved_x), atol=0.2)


@given(st.integers(0, 2**32))
def test_boxes_zoom_with_the_frame_but_do_not_turn(seed):
    matrix = random_transform(SIZE, np.random.default_rng(seed), GEOMETRY)
    [[_, _, height, width]] = move_boxes(np.array([[64.0, 64, 20, 30]]), matrix, SIZE)
    zoom = np.linalg.norm(matrix[:, 0])
    np.testing.assert_allclose((height, width), (20 * zoom, 30 * zoom))
    assert 1 - GEOMETRY.scaling <= zoom <= 1 + GEOMETRY.scaling


@given(st.integers(0, 2**32))
def test_a_boxs_peak_moves_along_and_stays_what_it_is(seed):
    matrix = random_transform(SIZE, np.random.default_rng(seed), GEOMETRY)
    boxes = np.array([[60, 64, 20, 30, 0.3], [-300, 64, 20, 30, 0.5], [70, 80, 10, 10, 1]])
    moved = move_boxes(boxes, matrix, SIZE)
    assert moved[:, 4].tolist() == [0.3, 1]
    np.testing.assert_array_equal(moved[:, :4], move_boxes(boxes[:, :4], matrix, SIZE))


def test_a_box_whose_centre_leaves_the_frame_is_dropped_and_targets_can_be_drawn_of_the_rest():
    boxes = np.random.default_rng(1).uniform(0, SIZE, (200, 4))
    for seed in range(20):
        _, moved = augment(spot(64, 64), boxes, np.random.default_rng(seed), GEOMETRY)
        assert 0 < len(moved) <= len(boxes)
        assert draw_targets(moved, SIZE, TargetSettings()).heatmap.max() == 1


def test_without_changes_frame_and_boxes_stay_as_they_are():
    frame, boxes = spot(50, 70), np.array([[50.0, 70, 20, 20]])
    same, still = augment(frame, boxes, np.random.default_rng(0), STILL)
    np.testing.assert_array_equal(same, frame)
    np.testing.assert_array_equal(still, boxes)


def test_the_input_is_never_changed():
    frame, boxes = spot(50, 70), np.array([[50.0, 70, 20, 20]])
    frame.flags.writeable = boxes.flags.writeable = False
    changed, _ = augment(frame, boxes, np.random.default_rng(0), RECIPE)
    assert (changed != frame).any()
    assert (frame == spot(50, 70)).all()


def test_a_sample_is_a_function_of_seed_epoch_and_slice_alone():
    def draw(seed: int, epoch: int, slice_id: str) -> bytes:
        return augment(spot(64, 64), np.empty((0, 4)), sample_generator(seed, epoch, slice_id), RECIPE)[0].tobytes()

    assert draw(1, 2, "a") == draw(1, 2, "a")
    assert len({draw(1, 2, "a"), draw(2, 2, "a"), draw(1, 3, "a"), draw(1, 2, "b")}) == 4


def test_neighbouring_slices_move_together():
    frame = np.concatenate([spot(50, 70), spot(50, 70), spot(50, 70)])
    moved, _ = augment(frame, np.empty((0, 4)), np.random.default_rng(3), GEOMETRY)
    np.testing.assert_array_equal(moved[0], moved[2])


def test_poisson_noise_has_the_pixels_intensity_as_mean_and_variance():
    noisy = AugmentSettings(**(STILL.model_dump() | {"poisson_probability": 1}))
    frame = np.full((1, 256, 256), 100, np.uint8)
    seen = augment(frame, np.empty((0, 4)), np.random.default_rng(0), noisy)[0].astype(float)
    assert seen.mean() == pytest.approx(100, abs=0.3)
    assert seen.var() == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize("grey", [*range(12), 20, 50, 100, 150, 200])
def test_noise_of_every_grey_level_has_it_as_mean_and_variance(grey):
    seen = poisson_noise(np.full((1, 512, 512), grey, np.uint8), np.random.default_rng(grey)).astype(float)
    assert seen.mean() == pytest.approx(grey, abs=5 * np.sqrt(grey / seen.size))
    assert seen.var() == pytest.approx(grey, rel=0.02)


@pytest.mark.parametrize("grey", [1, 7, 60, 180, 255])
def test_noise_has_the_quantiles_of_poisson_draws_that_stop_at_white(grey):
    seen = poisson_noise(np.full((1, 256, 256), grey, np.uint8), np.random.default_rng(1))
    drawn = np.minimum(np.random.default_rng(2).poisson(grey, 256 * 256), 255)
    shares = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    np.testing.assert_allclose(np.quantile(seen, shares), np.quantile(drawn, shares), atol=1)


def test_noise_leaves_black_black_and_is_a_function_of_the_generator_alone():
    frame = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    frame[:, :8] = 0
    noisy = poisson_noise(frame, np.random.default_rng(5))
    assert (noisy[:, :8] == 0).all()
    np.testing.assert_array_equal(noisy, poisson_noise(frame, np.random.default_rng(5)))
    assert (noisy != poisson_noise(frame, np.random.default_rng(6))).any()
    assert noisy.dtype == np.uint8


def test_bright_pixels_do_not_wrap_around_under_noise():
    noisy = AugmentSettings(**(STILL.model_dump() | {"poisson_probability": 1}))
    seen = augment(np.full((1, 64, 64), 250, np.uint8), np.empty((0, 4)), np.random.default_rng(0), noisy)[0]
    assert seen.min() > 150


def test_blur_spreads_a_spot_by_its_sigma():
    frame = spot(64, 64)
    rows = np.arange(SIZE) - 64.0
    profile = blur(frame, 1.5)[0, :, 64].astype(float)
    variance = (profile * rows**2).sum() / profile.sum()
    assert variance == pytest.approx(4 + 1.5**2, rel=0.1)
    assert blur(frame, 0) is frame
