import numpy as np
import pytest
import torch

from motor_ray.detector.decode import Detections
from motor_ray.detector.descriptor import describe


def found(*boxes: tuple[float, ...]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.ones(len(boxes)))


def test_the_middle_of_a_box_comes_first_and_then_the_mean_around_it() -> None:
    features = torch.zeros(1, 2, 30, 30)
    features[0, 0, 12:15, 15:18] = 1  # cells of the middle third of a box around cell (13, 16)
    features[0, 1, 9:18, 12:21] = 3
    features[0, 1, 12:15, 15:18] = 7
    [numbers] = describe(features, [found((4 * 13.5 - 0.5, 4 * 16.5 - 0.5, 36, 36))])
    assert numbers.dtype == np.float16
    middle, around = numbers[0, :2].astype(float), numbers[0, 2:].astype(float)
    assert middle[0] > 0.7
    assert around[0] < 0.1
    assert middle[1] > 5.5
    assert 2.5 < around[1] < 4


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_turning_or_mirroring_the_frame_with_its_box_changes_nothing(turn: int) -> None:
    features = torch.randn(1, 5, 20, 20, generator=torch.Generator().manual_seed(0))
    y, x = 31.0, 47.0
    last = 4 * 20 - 1
    turned = {1: (last - x, y), 2: (last - y, last - x), 3: (x, last - y)}[turn]
    [one] = describe(features, [found((y, x, 24, 24))])
    [two] = describe(features.rot90(turn, (2, 3)), [found((*turned, 24, 24))])
    np.testing.assert_allclose(one.astype(float), two.astype(float), atol=2e-3)
    [mirrored] = describe(features.flip(3), [found((y, last - x, 24, 24))])
    np.testing.assert_allclose(one.astype(float), mirrored.astype(float), atol=2e-3)


def test_each_frame_has_its_own_numbers_also_none() -> None:
    features = torch.stack([torch.full((3, 10, 10), float(number)) for number in range(3)])
    first, none, last = describe(features, [found((20, 20, 8, 8)), found(), found((5, 5, 8, 8), (30, 30, 0, 0))])
    assert (first.shape, none.shape, last.shape) == ((1, 6), (0, 6), (2, 6))
    assert (first == 0).all()
    assert (last == 2).all()


def test_numbers_beyond_float16_are_its_largest() -> None:
    [numbers] = describe(torch.full((1, 1, 8, 8), 1e9), [found((16, 16, 8, 8))])
    assert np.isfinite(numbers).all()
