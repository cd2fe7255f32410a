import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.config import TargetSettings
from motor_ray.detector.decode import decode
from motor_ray.detector.model import Prediction
from motor_ray.slices.targets import draw_targets

EDGE = 160


def prediction_of(heatmap: torch.Tensor) -> Prediction:
    """A prediction of `heatmap` logits `(b, 1, h, w)`, with boxes of 3 x 5 cells centred in the middle of cells."""
    frames, _, height, width = heatmap.shape
    size = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1).expand(frames, 2, height, width)
    return Prediction(heatmap, size, torch.full_like(size, 0.5), torch.zeros(frames))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6, unique=True), st.integers(0, 1000))
@settings(max_examples=40, derandomize=True)
def test_drawn_boxes_are_decoded_where_they_were(places: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    # One box in each of some 32-pixel tiles, so that no two Gaussians melt into one peak.
    centres = np.array(places, dtype=np.float64).reshape(-1, 2) * 32 + random.uniform(4, 28, (len(places), 2))
    boxes = np.hstack([centres, random.uniform(10, 100, (len(places), 2))])
    targets = draw_targets(boxes, EDGE, TargetSettings())
    prediction = Prediction(targets.heatmap[None].logit(1e-4), targets.size[None], targets.offset[None], torch.zeros(1))
    ((found, scores),) = decode(prediction, max_detections=20, threshold=0.9)
    assert found.shape == (len(places), 4)
    assert scores.shape == (len(places),)
    np.testing.assert_allclose(_sorted(found.numpy()), _sorted(boxes), atol=1e-3)


def _sorted(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T)]


def test_every_frame_of_a_batch_has_its_own_detections_best_first() -> None:
    heatmap = torch.full((3, 1, 12, 12), -5.0)
    heatmap[0, 0, 2, 3], heatmap[0, 0, 8, 8], heatmap[2, 0, 0, 11] = 1.0, 2.0, 3.0
    first, second, third = decode(prediction_of(heatmap), max_detections=5, threshold=0.5)
    assert first.boxes.tolist() == [[33.5, 33.5, 12, 20], [9.5, 13.5, 12, 20]]
    torch.testing.assert_close(first.scores, torch.tensor([2.0, 1.0]).sigmoid())
    assert second.boxes.shape == (0, 4)
    assert second.scores.shape == (0,)
    assert third.boxes.tolist() == [[1.5, 45.5, 12, 20]]


def test_only_the_best_are_kept_and_none_below_the_threshold() -> None:
    heatmap = torch.full((1, 1, 16, 16), -9.0)
    for rank in range(5):
        heatmap[0, 0, 3 * rank, 3] = -rank
    assert len(decode(prediction_of(heatmap), max_detections=3, threshold=0.0)[0].scores) == 3
    ((_, scores),) = decode(prediction_of(heatmap), max_detections=16, threshold=0.2)
    torch.testing.assert_close(scores, torch.tensor([0.0, -1.0]).sigmoid())


def test_a_cell_beside_a_higher_one_is_no_peak() -> None:
    heatmap = torch.full((1, 1, 8, 8), -9.0)
    heatmap[0, 0, 4, 4], heatmap[0, 0, 5, 5] = 2.0, 1.9
    assert len(decode(prediction_of(heatmap), max_detections=9, threshold=0.5)[0].scores) == 1


@pytest.mark.parametrize("plateau", [[(4, 4), (4, 5)], [(4, 4), (5, 5)], [(3, 3), (3, 4), (4, 3), (4, 4)]])
def test_equal_neighbours_are_one_peak(plateau: list[tuple[int, int]]) -> None:
    heatmap = torch.full((1, 1, 10, 10), -9.0)
    for row, column in plateau:
        heatmap[0, 0, row, column] = 2.0
    heatmap[0, 0, 8, 8] = 2.0
    assert len(decode(prediction_of(heatmap), max_detections=9, threshold=0.5)[0].scores) == 2


def test_more_detections_may_be_asked_for_than_there_are_cells() -> None:
    ((boxes, _),) = decode(prediction_of(torch.randn(1, 1, 3, 3)), max_detections=100, threshold=0.0)
    assert 1 <= len(boxes) <= 4


def test_boxes_have_no_negative_size() -> None:
    heatmap = torch.full((1, 1, 4, 4), 1.0)
    prediction = prediction_of(heatmap)._replace(size=torch.full((1, 2, 4, 4), -2.0))
    assert (decode(prediction, max_detections=1, threshold=0.0)[0].boxes[:, 2:] == 0).all()


def test_maps_that_are_not_finite_hold_no_detections() -> None:
    assert len(decode(prediction_of(torch.full((1, 1, 4, 4), math.nan)), 5, threshold=0.0)[0].scores) == 0
