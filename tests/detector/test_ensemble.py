import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import Averaging
from motor_ray.detector.ensemble import average, mean_logits
from motor_ray.detector.model import Prediction

WAYS: list[Averaging] = ["logit", "probability"]
LOGITS = st.lists(st.floats(-60, 60), min_size=1, max_size=6)


def said(heatmap: float = 0.0, size: float = 10.0, offset: float = 0.5, presence: float = 0.0) -> Prediction:
    """The same of every cell of a frame of 2 x 3 cells."""
    maps = [torch.full((1, n, 2, 3), float(value)) for n, value in ((1, heatmap), (2, size), (2, offset))]
    return Prediction(maps[0], maps[1], maps[2], torch.full((1,), float(presence)))


def random(seed: int) -> Prediction:
    generator = torch.manual_seed(seed)
    shapes = (2, 1, 4, 5), (2, 2, 4, 5), (2, 2, 4, 5), (2,)
    return Prediction(*(4 * torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("how", WAYS)
def test_one_prediction_stays_the_very_same(how: Averaging) -> None:
    alone = random(0)
    assert average([alone], how) is alone


@pytest.mark.parametrize("how", WAYS)
def test_the_same_prediction_several_times_is_that_prediction(how: Averaging) -> None:
    torch.testing.assert_close(average([random(0)] * 3, how), random(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_the_order_of_the_members_does_not_matter(how: Averaging) -> None:
    some = [random(seed) for seed in range(4)]
    torch.testing.assert_close(average(some, how), average(some[::-1], how))


@given(LOGITS)
def test_probabilities_are_averaged_as_probabilities_however_small_or_near_one(logits: list[float]) -> None:
    found = mean_logits(torch.tensor(logits, dtype=torch.float64), "probability").item()
    # each side by the smaller of p and 1 - p, of which doubles hold all that is asked here
    below, above = (sum(1 / (1 + math.exp(-sign * x)) for x in logits) / len(logits) for sign in (1, -1))
    assert found == pytest.approx(math.log(below) - math.log(above), abs=1e-6)


@given(LOGITS)
def test_a_mean_lies_between_the_least_and_the_most(logits: list[float]) -> None:
    for how in WAYS:
        found = mean_logits(torch.tensor(logits), how).item()
        assert min(logits) - 1e-3 <= found <= max(logits) + 1e-3


def test_one_that_is_sure_to_see_nothing_silences_others_by_logits_only() -> None:
    two = torch.tensor([3.0, -12.0])
    assert mean_logits(two, "logit").sigmoid() < 0.02
    assert mean_logits(two, "probability").sigmoid() == pytest.approx(0.476, abs=1e-3)


def test_boxes_are_those_of_the_members_that_see_a_motor_there() -> None:
    found = average([said(heatmap=6, size=20, offset=0.25), said(heatmap=-8, size=2, offset=0.9)], "probability")
    torch.testing.assert_close(found.size, torch.full((1, 2, 2, 3), 20.0), atol=0.01, rtol=0)
    torch.testing.assert_close(found.offset, torch.full((1, 2, 2, 3), 0.25), atol=0.001, rtol=0)
    evenly = average([said(heatmap=-200, size=20), said(heatmap=-200, size=10)], "logit")
    torch.testing.assert_close(evenly.size, torch.full((1, 2, 2, 3), 15.0))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_member_whose_answer_is_no_number_is_not_outvoted(how: Averaging, broken: float) -> None:
    found = average([said(), said(heatmap=broken, presence=broken), said()], how)
    assert not found.heatmap.isfinite().any()
    assert not found.presence.isfinite().any()
