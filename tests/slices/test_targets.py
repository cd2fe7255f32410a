import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.config import HEATMAP_STRIDE, LEVEL_STRIDES, AugmentSettings, FrameSettings, TargetSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.decode import decode
from motor_ray.detector.model import Prediction
from motor_ray.slices.augment import move_boxes, random_transform, warp
from motor_ray.slices.frame import frames_of
from motor_ray.slices.targets import (
    box_on_frame,
    boxes_on_frame,
    draw_levels,
    draw_targets,
    levels_of,
    usual_box_cells,
)

RECIPE = TargetSettings()
SIZE = 720

positions = st.floats(-0.5, SIZE - 0.5, exclude_max=True)
boxes = st.lists(st.tuples(positions, positions, st.floats(8, 200), st.floats(8, 200)), max_size=4)


@settings(max_examples=30)
@given(boxes)
def test_the_heatmap_is_one_at_each_centre_and_less_everywhere_else(drawn):
    targets = draw_targets(np.array(drawn).reshape(-1, 4), SIZE, RECIPE)
    at_centre = targets.mask == 1
    assert targets.heatmap.shape == (1, 180, 180)
    assert (targets.heatmap[at_centre] == 1).all()
    assert (targets.heatmap[~at_centre] < 1).all()
    assert float(targets.presence) == (len(drawn) > 0)
    assert ((targets.offset >= 0) & (targets.offset <= 1)).all()


@given(st.tuples(positions, positions, st.floats(8, 200), st.floats(8, 200)))
def test_decoding_drawn_targets_gives_the_box_back(box):
    targets = draw_targets(np.array([box]), SIZE, RECIPE)
    [(found, scores)] = decode_drawn(targets)
    np.testing.assert_allclose(found, [box], atol=1e-3)
    assert scores[0] > 0.99


def decode_drawn(targets):
    """What a network that predicts `targets` exactly would be decoded to."""
    logits = torch.logit(targets.heatmap, eps=1e-6)
    prediction = Prediction(logits[None], targets.size[None], targets.offset[None], torch.zeros(1))
    return decode(prediction, max_detections=5, threshold=0.5)


@pytest.mark.parametrize("shape", [(960, 928), (1912, 1847), (96, 96)])
@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_a_motor_at_the_edge_of_a_slice_goes_through_frame_targets_and_decoding_and_comes_back(shape, corner):
    [frame] = frames_of(shape, None, FrameSettings())
    motor = np.array([[7, *(corner * (edge - 1) for edge in shape)]])
    boxes = boxes_on_frame(motor, 7, 0.0, frame, RECIPE.box_pixels)
    [(found, _)] = decode_drawn(draw_targets(boxes, SIZE, RECIPE))
    np.testing.assert_allclose(frame.boxes_to_slice(found)[:, :2], motor[:, 1:], atol=2e-3)


@given(st.integers(0, 2**32), st.floats(120, 600), st.floats(120, 600))
def test_drawing_moved_boxes_is_moving_what_was_drawn(seed, y, x):
    still = AugmentSettings(scaling=0, flips=True, rotation_degrees=180)
    matrix = random_transform(SIZE, np.random.default_rng(seed), still)
    box = np.array([[y, x, 100, 100]])
    drawn = draw_targets(box, SIZE, TargetSettings(sigma=6)).heatmap.numpy()
    as_frame = cv2.resize(255 * drawn[0], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    moved_picture = warp(as_frame[None], matrix)[0]
    moved_boxes = draw_targets(move_boxes(box, matrix, SIZE), SIZE, TargetSettings(sigma=6)).heatmap[0].numpy()
    shrunk = cv2.resize(moved_picture, (180, 180), interpolation=cv2.INTER_AREA) / 255
    assert np.abs(shrunk - moved_boxes).max() < 0.2  # up to a cell of rounding at each end


def test_two_motors_in_different_cells_are_both_drawn():
    targets = draw_targets(np.array([[100, 100, 50, 50.0], [100, 400, 50, 50]]), SIZE, RECIPE)
    assert int(targets.mask.sum()) == 2


def test_the_gaussian_falls_off_with_sigma():
    targets = draw_targets(np.array([[361.5, 361.5, 100, 100]]), SIZE, TargetSettings(sigma=3))
    assert float(targets.heatmap[0, 90, 93]) == pytest.approx(np.exp(-0.5))


@given(st.lists(st.tuples(positions, positions, st.just(50), st.just(50), st.floats(0.01, 1)), min_size=1, max_size=4))
def test_a_faded_box_is_a_lower_gaussian_at_the_same_place(drawn):
    full = draw_targets(np.array(drawn)[:1, :4], SIZE, RECIPE)
    faded = draw_targets(np.array(drawn)[:1], SIZE, RECIPE)
    torch.testing.assert_close(faded.heatmap, full.heatmap * drawn[0][4])
    for same in ("size", "offset", "mask"):
        torch.testing.assert_close(getattr(faded, same), getattr(full, same), rtol=0, atol=0)
    several = draw_targets(np.array(drawn), SIZE, RECIPE)
    assert float(several.presence) == float(several.heatmap.max()) == pytest.approx(max(box[4] for box in drawn))
    assert set(several.mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_boxes_in_one_cell_the_one_with_the_higher_peak_counts(order):
    pair = np.array([[100, 100, 50, 50, 0.5], [101, 101, 60, 60, 1]])
    targets = draw_targets(pair[list(order)], SIZE, RECIPE)
    assert targets.size[:, 25, 25].tolist() == [15, 15]
    assert targets.heatmap[0, 25, 25] == 1


@pytest.mark.parametrize("fade", [None, 1.5])
def test_the_peak_fades_along_z_as_a_gaussian_or_not_at_all(fade):
    [frame] = frames_of((960, 928), None, FrameSettings())
    motors = np.array([[10.25, 480, 464], [14, 100, 100]])
    shown = boxes_on_frame(motors, 12, 2.0, frame, RECIPE.box_pixels, fade)
    expected = [1, 1] if fade is None else [np.exp(-(dz**2) / (2 * fade**2)) for dz in (1.75, 2)]
    np.testing.assert_allclose(shown[:, 4], expected)
    assert boxes_on_frame(motors, 12, 0.5, frame, RECIPE.box_pixels, fade).shape == (0, 5)


def test_a_centre_outside_the_frame_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\(720, 5\) lies outside a frame of 720"):
        draw_targets(np.array([[720.0, 5, 50, 50]]), SIZE, RECIPE)


def test_a_frame_shows_the_motors_within_reach_along_z_and_inside_it():
    [frame] = frames_of((960, 928), None, FrameSettings())
    motors = np.array([[10, 480, 464], [14, 100, 100], [15, 480, 464], [10, 2000, 464]], float)
    shown = boxes_on_frame(motors, 12, 2.0, frame, RECIPE.box_pixels)
    np.testing.assert_allclose(frame.boxes_to_slice(shown[:, :4])[:, :2], motors[:2, 1:])
    assert (shown[:, 2:4] == RECIPE.box_pixels).all()
    assert (shown[:, 4] == 1).all()
    assert frame.size == HEATMAP_STRIDE * 180


@given(boxes, st.sampled_from([1, 2, 3]))
def test_every_box_belongs_to_one_level_and_larger_ones_to_no_finer_one(drawn, levels):
    drawn = np.array(drawn).reshape(-1, 4)
    owner = levels_of(drawn, levels)
    assert set(owner) <= set(range(levels))
    assert (np.diff(owner[np.argsort(drawn[:, 2:].max(axis=1), kind="stable")]) >= 0).all()
    drawn_there = [set(map(tuple, levels_drawn)) for levels_drawn in (drawn[owner == level] for level in range(levels))]
    assert sum(map(len, drawn_there)) == len(set(map(tuple, drawn)))
    for level, targets in enumerate(draw_levels(drawn, SIZE, RECIPE, levels)):
        assert targets.mask.shape == (1, SIZE // LEVEL_STRIDES[level], SIZE // LEVEL_STRIDES[level])
        assert float(targets.presence) == (level in owner)
        assert bool(targets.mask.any()) == (level in owner)


@pytest.mark.parametrize(
    ("edges", "owner"), [((63.9, 10), 0), ((10, 64), 1), ((127, 127), 1), ((128, 1), 2), ((700, 700), 2)]
)
def test_the_longer_edge_says_which_level_a_box_belongs_to(edges, owner):
    box = np.array([[100, 100, *edges]])
    assert levels_of(box, 3).tolist() == [owner]
    assert levels_of(box, 2).tolist() == [min(owner, 1)]
    assert levels_of(box, 1).tolist() == [0]


def settings_of(**groups):
    return settings_from(groups)


@pytest.mark.parametrize("mode", ["fit", "spacing"])
@pytest.mark.parametrize(("shape", "spacing"), [((960, 928), 13.1), ((1912, 1847), 6.5), ((924, 956), 19.7)])
def test_a_box_in_angstrom_is_as_large_in_the_specimen_on_every_frame(mode, shape, spacing):
    asked = settings_of(targets={"box_angstrom": 1000.0}, frame={"mode": mode})
    for frame in frames_of(shape, spacing, asked.frame):
        edges = box_on_frame(frame, spacing, asked)
        np.testing.assert_allclose(edges / frame.scale * spacing, 1000.0)
        shown = boxes_on_frame(np.array([[5, *frame.to_slice([300, 300])]]), 5, 0.0, frame, edges)
        np.testing.assert_allclose(shown, [[300, 300, *edges, 1]], atol=1e-9)
        np.testing.assert_allclose(frame.boxes_to_slice(shown[:, :4])[0, 2:] * spacing, 1000.0)


def test_boxes_in_angstrom_differ_between_tomograms_of_one_frame_size():
    asked = settings_of(targets={"box_angstrom": 1000.0})
    edges = [
        box_on_frame(frames_of(shape, spacing, asked.frame)[0], spacing, asked)[0]
        for shape, spacing in (((960, 928), 13.1), ((924, 956), 19.7))
    ]
    np.testing.assert_allclose(edges, [1000 / 13.1 * 720 / 960, 1000 / 19.7 * 720 / 956], rtol=1e-3)


def test_without_a_spacing_the_assumed_one_counts_and_without_angstrom_none():
    [frame] = frames_of((960, 928), None, FrameSettings())
    asked = settings_of(targets={"box_angstrom": 1000.0}, link={"assumed_spacing_angstrom": 20.0})
    np.testing.assert_array_equal(box_on_frame(frame, None, asked), box_on_frame(frame, 20.0, asked))
    for spacing in (None, 6.5, 20.0):
        assert box_on_frame(frame, spacing, settings_of(targets={"box_pixels": 63.0})).tolist() == [63, 63]


@pytest.mark.parametrize(
    ("groups", "cells"),
    [
        ({}, 25),
        ({"model": {"levels": 2}}, 12.5),  # 100 pixels belong to P3, of stride 8
        ({"model": {"levels": 3}, "targets": {"box_pixels": 160}}, 10),
        ({"targets": {"box_angstrom": 1000.0}}, 25),
        ({"targets": {"box_angstrom": 800.0}, "frame": {"mode": "spacing", "spacing_angstrom": 16.0}}, 12.5),
    ],
)
def test_an_untrained_network_starts_from_boxes_of_the_usual_size_on_their_level(groups, cells):
    assert usual_box_cells(settings_of(**groups)) == cells
