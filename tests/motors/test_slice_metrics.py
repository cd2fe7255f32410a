import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import box_iou as torch_box_iou

from motor_ray.errors import MetricError
from motor_ray.motors.slice_metrics import box_iou, corners, count_hits, mean_average_precision, slice_scores

NONE = np.empty((0, 4))
NO_SCORES = np.empty(0)
BOX = np.array([[50.0, 60.0, 20.0, 10.0]])


def shifted(y: float) -> NDArray[np.float64]:
    return np.asarray(np.add(BOX, [y, 0, 0, 0]))


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_overlaps_are_torchvisions(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(1, 40, (n, 4)), rng.uniform(1, 40, (m, 4))
    expected = torch_box_iou(torch.from_numpy(corners(a)), torch.from_numpy(corners(b)))
    np.testing.assert_allclose(box_iou(a, b), expected.numpy(), atol=1e-12)


def test_boxes_without_area_overlap_nothing() -> None:
    point = np.array([[50.0, 60.0, 0.0, 0.0]])
    assert box_iou(point, point) == 0


def test_perfect_boxes_score_one_everywhere() -> None:
    scores = slice_scores([(BOX, np.array([0.9])), (NONE, NO_SCORES)], [BOX, NONE], 0.5)
    for name in ("mAP@0.5", "mAP@0.7", "mAP@0.9", "precision", "recall", "f1"):
        assert scores[name] == pytest.approx(1)
    assert (scores["n_slices"], scores["n_boxes"], scores["false_positives"]) == (2, 1, 0)


def test_each_map_asks_for_its_own_overlap() -> None:
    # Shifted by 4 of 20: 16 / 24 = 0.67 overlap; by 2: 18 / 22 = 0.82.
    found = [(shifted(4), np.array([0.9])), (shifted(2), np.array([0.8]))]
    scores = mean_average_precision(found, [BOX, BOX])
    assert scores["mAP@0.5"] == pytest.approx(1)
    assert scores["mAP@0.7"] == pytest.approx(51 / 101 / 2)  # precision 1/2 up to recall 1/2, at 51 of 101 recalls
    assert scores["mAP@0.9"] == pytest.approx(0)


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_boxes_below_the_threshold_count_in_map_only(threshold: float) -> None:
    scores = slice_scores([(BOX, np.array([0.9]))], [BOX], threshold)
    assert scores["recall"] == (threshold < 0.9)
    assert scores["mAP@0.5"] == pytest.approx(1)


def test_a_true_box_is_found_once_and_by_the_best() -> None:
    boxes = np.concatenate([BOX, shifted(1), shifted(30)])
    assert count_hits(boxes, BOX, 0.5) == 1
    assert count_hits(boxes, np.concatenate([BOX, shifted(2)]), 0.5) == 2
    # The weak box comes first in the array, but the strong one has the true box to itself.
    scores = slice_scores([(np.concatenate([shifted(30), BOX]), np.array([0.6, 0.9]))], [BOX], 0.5)
    assert (scores["true_positives"], scores["false_positives"]) == (1, 1)


def test_without_truth_map_and_recall_are_undefined_and_never_minus_one() -> None:
    scores = slice_scores([(BOX, np.array([0.9]))], [NONE], 0.5)
    assert scores["mAP@0.5"] is scores["mAP@0.9"] is scores["recall"] is None
    assert scores["precision"] == 0


def test_without_detections_map_and_recall_are_zero_and_precision_undefined() -> None:
    scores = slice_scores([(NONE, NO_SCORES)], [BOX], 0.5)
    assert scores["mAP@0.5"] == scores["mAP@0.9"] == scores["recall"] == scores["f1"] == 0
    assert scores["precision"] is None


def test_without_slices_everything_is_undefined_but_valid_json() -> None:
    for found, truth in (([], []), ([(NONE, NO_SCORES)], [NONE])):
        scores = slice_scores(found, truth, 0.5)
        json.dumps(scores, allow_nan=False)
        assert scores["mAP@0.5"] is scores["precision"] is scores["recall"] is scores["f1"] is None


def test_different_slices_are_refused() -> None:
    with pytest.raises(MetricError, match="detections of 1 slices and truth of 0"):
        slice_scores([(BOX, np.array([0.9]))], [], 0.5)
