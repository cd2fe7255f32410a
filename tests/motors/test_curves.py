from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from motor_ray.motors.curves import epochs_of, training_curve
from motor_ray.motors.picture import BLACK, BLUE, ORANGE, VERMILION

PARTS = ("total", "heatmap", "offset", "size", "giou", "presence")


def line(epoch: int, step: int | None = None) -> dict[str, Any]:
    share = 1 / (epoch + 2)
    losses = {f"loss_{part}": share * (number + 1) for number, part in enumerate(PARTS)}
    scores = {"mAP@0.5": 0.9 - share, "mAP@0.7": 0.7 - share, "mAP@0.9": 0.5 - share / 2}
    step = 10 * (epoch + 1) if step is None else step
    return {"epoch": epoch, "step": step, "learning_rate": 1e-3 * share, **losses, **scores}


def drawn(path: Path, colour: str) -> NDArray[np.bool_]:
    """Where the PNG has exactly this colour; fails if it does not decode."""
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray((image[..., ::-1] == np.round(np.array(to_rgb(colour)) * 255)).all(axis=-1))


@pytest.mark.parametrize("number", [1, 2, 100])
def test_a_curve_is_drawn_of_any_number_of_lines(tmp_path: Path, number: int) -> None:
    path = tmp_path / "curve.png"
    training_curve(str(path), [line(epoch) for epoch in range(number)])
    assert drawn(path, BLUE).sum() > 100
    assert drawn(path, VERMILION).sum() > 100


def test_tomograms_are_points_beside_the_scores_of_slices(tmp_path: Path) -> None:
    lines = [line(epoch) for epoch in range(5)]
    tomograms: list[dict[str, Any]] = [{"epoch": 1, "f2": 0.4}, {"epoch": 3, "f2": None}]
    training_curve(str(tmp_path / "without"), lines)
    training_curve(str(tmp_path / "with"), lines, tomograms)
    assert drawn(tmp_path / "with", ORANGE).sum() > drawn(tmp_path / "without", ORANGE).sum() + 100


def test_the_best_is_ringed_where_it_is(tmp_path: Path) -> None:
    places = []
    for best in (1, 8):
        plain = {"loss_heatmap": None}  # which has the ring's colour
        lines = [line(epoch) | plain | {"mAP@0.5": 0.9 if epoch == best else 0.3} for epoch in range(10)]
        training_curve(str(tmp_path / "curve"), lines)
        ring = drawn(tmp_path / "curve", VERMILION)
        ring[:, -ring.shape[1] // 4 :] = False  # the legend
        places.append(np.nonzero(ring)[1].mean() / ring.shape[1])
    assert places[0] < 0.3
    assert places[1] > 0.55


def test_scores_that_are_not_defined_and_losses_of_nothing_leave_gaps(tmp_path: Path) -> None:
    nothing = {"mAP@0.5": None, "mAP@0.7": None, "mAP@0.9": None, "loss_giou": 0.0, "learning_rate": 0.0}
    training_curve(str(tmp_path / "curve"), [line(0) | nothing, line(1) | nothing])
    assert drawn(tmp_path / "curve", BLACK).sum() > 1000


def test_lines_within_an_epoch_lie_within_it() -> None:
    lines = [line(0, 3), line(0, 6), line(0, 9), line(1, 12), line(1, 18), line(2, 24)]
    np.testing.assert_allclose(epochs_of(lines), [1 / 3, 2 / 3, 1, 4 / 3, 2, 3])


def test_the_same_curve_has_the_same_bytes_and_one_of_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        training_curve(str(tmp_path / name), [line(0), line(1)], [{"epoch": 0, "f2": 0.5}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="at least one line"):
        training_curve(str(tmp_path / "c"), [])
