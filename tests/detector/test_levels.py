"""Boxes of all sizes through targets of several levels, a perfect network, the merge and decoding, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from motor_ray.config import LEVEL_STRIDES, LossSettings, TargetSettings
from motor_ray.detector.decode import Detections, decode
from motor_ray.detector.levels import Maps, merge_levels, side_by_side
from motor_ray.detector.losses import detection_loss
from motor_ray.detector.model import Prediction
from motor_ray.slices.targets import Targets, draw_levels, draw_targets, whole_heatmap

EDGE = 320
TILE = 64

tiles = st.tuples(st.integers(0, EDGE // TILE - 1), st.integers(0, EDGE // TILE - 1))


def boxes_in(places: list[tuple[int, int]], seed: int) -> np.ndarray:
    """A box of any size in each of some tiles, so far apart that no two Gaussians melt into one peak."""
    random = np.random.default_rng(seed)
    centres = np.array(places, dtype=np.float64).reshape(-1, 2) * TILE + random.uniform(15, 48, (len(places), 2))
    return np.hstack([centres, 8 * 40 ** random.uniform(0, 1, (len(places), 2))])  # 8 to 320 pixels


def perfect(boxes: np.ndarray, levels: int) -> list[Maps]:
    """What the heads of a network that knows `boxes` give on each level."""
    drawn = draw_levels(boxes, EDGE, TargetSettings(), levels)
    return [(one.heatmap[None].logit(1e-4), one.size[None], one.offset[None]) for one in drawn]


def decoded(maps: Maps, threshold: float = 0.9) -> Detections:
    [found] = decode(Prediction(*maps, torch.zeros(1)), max_detections=50, threshold=threshold)
    return found


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.round(2).T)]


@pytest.mark.parametrize("levels", [1, 2, 3])
@given(places=st.lists(tiles, max_size=9, unique=True), seed=st.integers(0, 1000))
@hypothesis_settings(max_examples=40, derandomize=True)
def test_boxes_of_all_levels_come_back_each_once(levels: int, places: list[tuple[int, int]], seed: int) -> None:
    boxes = boxes_in(places, seed)
    found, scores = decoded(merge_levels(perfect(boxes, levels)))
    assert found.shape == boxes.shape
    np.testing.assert_allclose(in_order(found.numpy()), in_order(boxes), atol=1e-3)
    assert (scores > 0.999).all()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 5)])
def test_every_cell_of_a_coarse_level_can_hold_a_peak_also_at_the_rim(level: int, shape: tuple[int, int]) -> None:
    ratio = LEVEL_STRIDES[level] // LEVEL_STRIDES[0]
    fine = torch.full((1, 1, ratio * shape[0], ratio * shape[1]), -9.0)
    none = (fine, torch.zeros(1, 2, *fine.shape[2:]), torch.zeros(1, 2, *fine.shape[2:]))
    for row, column in np.ndindex(shape):
        logits = torch.full((1, 1, *shape), -3.0)
        logits[0, 0, row, column] = 1.5
        offset = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(1, 2, *shape)
        between = [none] if level == 2 else []
        found, scores = decoded(merge_levels([none, *between, (logits, 10 + offset, offset)]), threshold=0.5)
        stride = LEVEL_STRIDES[level]
        expected = [(row + 0.25) * stride - 0.5, (column + 0.75) * stride - 0.5, 10.25 * stride, 10.75 * stride]
        np.testing.assert_allclose(found.numpy(), [expected], atol=1e-3)
        assert scores.item() == pytest.approx(torch.tensor(1.5).sigmoid().item(), abs=1e-3)


def test_equal_neighbours_of_a_coarse_level_are_one_peak() -> None:
    drawn = [list(one) for one in perfect(np.zeros((0, 4)), 3)]
    drawn[2][0][0, 0, 3:5, 6:8] = 2.0
    assert len(decoded(merge_levels([(a, b, c) for a, b, c in drawn]), threshold=0.5).scores) == 1


def test_the_finest_level_alone_is_left_as_it_is() -> None:
    [alone] = perfect(boxes_in([(0, 0)], 1), 1)
    assert merge_levels([alone]) is side_by_side([alone]) is alone


def test_a_coarse_answer_that_is_not_finite_is_not_hidden() -> None:
    maps = perfect(boxes_in([(1, 1)], 1), 2)
    maps[1][0][0, 0, 2, 2] = torch.nan
    assert merge_levels(maps)[0].isnan().any()


def test_a_map_that_is_no_multiple_of_the_coarse_one_is_covered_to_its_end() -> None:
    fine, coarse = (
        (torch.full((1, 1, edge, edge), start), torch.ones(1, 2, edge, edge), torch.zeros(1, 2, edge, edge))
        for edge, start in ((9, -9.0), (5, 0.0))
    )
    heatmap, size, offset = merge_levels([fine, coarse])
    assert heatmap.shape == (1, 1, 9, 9)
    assert (heatmap > -1).all()
    assert (size == 2).all()
    assert set(offset.unique().tolist()) == {-1, 0}


def test_targets_and_predictions_stand_side_by_side_in_the_same_order() -> None:
    boxes = boxes_in([(0, 1), (2, 2), (4, 3), (3, 0)], 5)
    together = draw_targets(boxes, EDGE, TargetSettings(), levels=3)
    levels = draw_levels(boxes, EDGE, TargetSettings(), 3)
    rows = side_by_side([(one.heatmap[None], one.size[None], one.offset[None]) for one in levels])
    for row, part in zip(rows, together, strict=False):
        assert torch.equal(row[0], part)
    assert together.mask.sum() == len(boxes)
    assert together.presence == 1


def test_the_heatmap_to_look_at_shows_the_boxes_of_every_level() -> None:
    boxes = boxes_in([(0, 1), (2, 2), (4, 3), (3, 0)], 5)
    levels = draw_levels(boxes, EDGE, TargetSettings(), 3)
    whole = whole_heatmap(levels)
    assert whole.shape == (EDGE // 4, EDGE // 4)
    rows, columns = ((boxes[:, axis] + 0.5) // 4 for axis in (0, 1))
    assert (whole[rows.astype(int), columns.astype(int)] == 1).all()
    np.testing.assert_array_equal(whole_heatmap(levels[:1]), levels[0].heatmap[0])


@pytest.mark.parametrize("heatmap", ["focal", "bce"])
def test_the_loss_counts_the_centres_of_all_levels_together(heatmap: str) -> None:
    boxes = boxes_in([(0, 0), (1, 3), (2, 2), (4, 4), (3, 1)], 3)
    levels = draw_levels(boxes, EDGE, TargetSettings(), 3)
    counts = [int(one.mask.sum()) for one in levels]
    assert all(counts)
    torch.manual_seed(0)
    maps = [(torch.randn(1, *one.heatmap.shape), *torch.randn(2, 1, *one.size.shape)) for one in levels]
    rules = LossSettings.model_validate({"heatmap": heatmap})

    def loss(said: Maps, truth: Targets) -> dict[str, torch.Tensor]:
        return detection_loss(Prediction(*said, torch.zeros(1)), Targets(*(part[None] for part in truth)), rules)

    together = loss(side_by_side(maps), draw_targets(boxes, EDGE, TargetSettings(), levels=3))
    apart = [loss(said, truth) for said, truth in zip(maps, levels, strict=True)]
    for name in ("heatmap", "size", "offset", "giou"):
        mean = sum(count * parts[name] for count, parts in zip(counts, apart, strict=True)) / sum(counts)
        torch.testing.assert_close(together[name], mean)
