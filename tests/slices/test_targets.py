import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.config import HEATMAP_STRIDE, FrameSettings, TargetSettings
from motor_ray.detector.decode import decode
from motor_ray.detector.model import Prediction
from motor_ray.slices.frame import frames_of
from motor_ray.slices.targets import boxes_on_frame, draw_targets

RECIPE = TargetSettings()
SIZE = 720

positions = st.floats(0, SIZE, exclude_max=True)
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
    logits = torch.logit(targets.heatmap, eps=1e-6)
    prediction = Prediction(logits[None], targets.size[None], targets.offset[None], torch.zeros(1))
    [(found, scores)] = decode(prediction, max_detections=5, threshold=0.5)
    np.testing.assert_allclose(found, [box], atol=0.5)
    assert scores[0] > 0.99


def test_two_motors_in_different_cells_are_both_drawn():
    targets = draw_targets(np.array([[100, 100, 50, 50.0], [100, 400, 50, 50]]), SIZE, RECIPE)
    assert int(targets.mask.sum()) == 2


def test_the_gaussian_falls_off_with_sigma():
    targets = draw_targets(np.array([[362.0, 362.0, 100, 100]]), SIZE, TargetSettings(sigma=3))
    assert float(targets.heatmap[0, 90, 93]) == pytest.approx(np.exp(-0.5))


def test_a_centre_outside_the_frame_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\(720, 5\) lies outside a frame of 720"):
        draw_targets(np.array([[720.0, 5, 50, 50]]), SIZE, RECIPE)


def test_a_frame_shows_the_motors_within_reach_along_z_and_inside_it():
    [frame] = frames_of((960, 928), None, FrameSettings())
    motors = np.array([[10, 480, 464], [14, 100, 100], [15, 480, 464], [10, 2000, 464]], float)
    shown = boxes_on_frame(motors, 12, 2.0, frame, RECIPE.box_pixels)
    np.testing.assert_allclose(frame.boxes_to_slice(shown)[:, :2], motors[:2, 1:])
    assert (shown[:, 2:] == RECIPE.box_pixels).all()
    assert frame.size == HEATMAP_STRIDE * 180
