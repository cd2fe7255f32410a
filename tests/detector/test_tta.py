import numpy as np
import pytest
import torch

from motor_ray.config import HEATMAP_STRIDE, PASSES
from motor_ray.detector.decode import decode
from motor_ray.detector.ensemble import average
from motor_ray.detector.model import Prediction
from motor_ray.detector.tta import COLUMNS, GAMMA, ROWS, VIEWS, View, brightened
from motor_ray.errors import ConfigError

CASES = [
    (view, shape)
    for view in VIEWS["full"]
    for shape in ((48, 48), (32, 48))
    if not view.transposed or len({*shape}) == 1
]


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.manual_seed(5)).to(torch.uint8)


def stand_in(frames: torch.Tensor) -> Prediction:
    """A predictor that turns as its frames turn: of each cell it says where the grey around it has its centre."""
    grey = frames.double().mean(dim=1, keepdim=True) + 1
    edge = HEATMAP_STRIDE
    cells = grey.unfold(2, edge, edge).unfold(3, edge, edge)  # b, 1, h, w, y, x
    mass = cells.sum(dim=(4, 5))
    places = (torch.arange(edge, dtype=torch.float64) + 0.5) / edge
    y, x = (cells.sum(dim=5) * places).sum(dim=4) / mass, (cells.sum(dim=4) * places).sum(dim=4) / mass
    rough = [(cells.diff(dim=axis) ** 2).sum(dim=(4, 5)) / mass for axis in (4, 5)]
    return Prediction(mass, torch.cat(rough, 1), torch.cat([y, x], 1), grey.flatten(1).std(dim=1))


@pytest.mark.parametrize(("view", "shape"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_what_is_seen_in_a_view_is_moved_back_exactly(view: View, shape: tuple[int, int]) -> None:
    frames = noise(2, 1, *shape)
    there = view._replace(gamma=1.0, switches_clahe=False)
    torch.testing.assert_close(there.inverse(stand_in(there.forward(frames))), stand_in(frames), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("view", "shape"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_boxes_decoded_from_a_view_lie_where_the_boxes_of_the_frame_lie(view: View, shape: tuple[int, int]) -> None:
    frames = noise(2, 3, *shape)
    there = view._replace(gamma=1.0, switches_clahe=False)
    expected = decode(stand_in(frames), 5, 0.0)
    for found, own in zip(decode(there.inverse(stand_in(there.forward(frames))), 5, 0.0), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_the_views_of_full_are_all_different_and_those_of_fast_are_among_them() -> None:
    frames, switched = noise(1, 1, 16, 16), noise(2, 1, 16, 16)[1:]
    shown = [view.forward(frames, switched) for view in VIEWS["full"]]
    assert all(not torch.equal(one, other) for n, one in enumerate(shown) for other in shown[:n])
    assert set(VIEWS["off"]) < set(VIEWS["fast"]) < set(VIEWS["full"])
    assert {name: len(views) for name, views in VIEWS.items()} == PASSES


def test_turned_views_show_what_numpy_turns() -> None:
    frames = noise(1, 1, 8, 8)
    turned = {view.name: view.forward(frames)[0, 0].numpy() for view in VIEWS["full"] if view.name.startswith("turned")}
    for times, name in enumerate(turned, start=1):
        assert name == f"turned by {90 * times} degrees"
        np.testing.assert_array_equal(turned[name], np.rot90(frames[0, 0].numpy(), times))


def test_a_view_leaves_frames_and_predictions_as_they_were() -> None:
    frames = noise(1, 1, 16, 16)
    said = stand_in(frames)
    before, words = frames.clone(), [part.clone() for part in said]
    for view in VIEWS["full"]:
        view.forward(frames, frames)
        view.inverse(said)
    assert torch.equal(frames, before)
    assert all(torch.equal(one, other) for one, other in zip(said, words, strict=True))


def test_gamma_keeps_black_white_and_order_and_draws_dark_greys_apart() -> None:
    levels = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16)
    shown = brightened(levels, GAMMA).flatten().tolist()
    assert (shown[0], shown[255]) == (0, 255)
    assert shown == sorted(shown)
    assert shown[64] - shown[0] > 64 > shown[255] - shown[191]
    assert torch.equal(brightened(levels, 1.0), levels)


def test_averaging_the_views_of_a_predictor_that_turns_along_changes_nothing() -> None:
    frames = noise(2, 1, 32, 32)
    views = [view._replace(gamma=1.0, switches_clahe=False) for view in VIEWS["full"]]
    said = average([view.inverse(stand_in(view.forward(frames))) for view in views], "logit")
    torch.testing.assert_close(said, stand_in(frames))


@pytest.mark.parametrize(
    ("view", "shape", "why"),
    [
        (View("t", transposed=True), (16, 32), r"'t' needs square frames, got 16 x 32 pixels; set --detect.tta fast"),
        (View("m", mirrored=(ROWS,)), (18, 32), r"'m' .* multiples of 4 pixels, got 18 x 32; set --detect.tta off"),
        (View("m", mirrored=(COLUMNS,)), (16, 30), r"'m' .* multiples of 4 pixels, got 16 x 30"),
    ],
)
def test_views_that_frames_do_not_bear_are_refused(view: View, shape: tuple[int, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        view.forward(noise(1, 1, *shape))


def test_looking_without_clahe_takes_frames_that_were_made_so() -> None:
    with pytest.raises(ValueError, match="'CLAHE switched' needs frames with CLAHE switched, got none"):
        VIEWS["full"][-1].forward(noise(1, 1, 8, 8))
