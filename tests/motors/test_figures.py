from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from motor_ray.motors.figures import (
    FOUND,
    OUTSIDE,
    TRUE,
    CheckRow,
    MotorsPanel,
    close_up,
    dataset_check,
    motors_figure,
    validation_page,
)

NO_BOXES = np.empty((0, 4))
GREY = np.full((120, 150), 110, np.uint8)


def panel(title: str = "", **change: Any) -> MotorsPanel:
    plain = MotorsPanel(title, GREY, np.empty((0, 2)), np.empty((0, 3)), box_edge=30, voxel_spacing_angstrom=None)
    return plain._replace(**change)


def row(**change: Any) -> CheckRow:
    frame = np.full((144, 144), 90, np.uint8)
    return CheckRow("a row", GREY, frame, np.zeros((36, 36)), NO_BOXES, NO_BOXES)._replace(**change)


def pixels(path: Path) -> NDArray[np.uint8]:
    """The PNG as ``(y, x, 3)`` RGB; fails if it does not decode."""
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image[..., ::-1], dtype=np.uint8)


def count(path: Path, colour: str | tuple[int, ...]) -> int:
    """Pixels of exactly this colour."""
    wanted = np.round(np.array(to_rgb(colour)) * 255) if isinstance(colour, str) else np.array(colour)
    return int((pixels(path) == wanted).all(axis=-1).sum())


def test_found_and_true_motors_are_marked_each_in_its_colour(tmp_path: Path) -> None:
    marks = {
        "none": panel(),
        "found": panel(found=np.array([[60, 70, 0.87]])),
        "true": panel(true_yx=np.array([[60, 70]])),
    }
    paths = {name: tmp_path / f"{name}.png" for name in marks}
    for name, one in marks.items():
        motors_figure(str(paths[name]), [one])
    legend = {colour: count(paths["none"], colour) for colour in (FOUND, TRUE)}
    assert min(legend.values()) > 20
    assert count(paths["found"], FOUND) > legend[FOUND] + 200
    assert count(paths["found"], TRUE) == legend[TRUE]
    assert count(paths["true"], TRUE) > legend[TRUE] + 30
    assert count(paths["true"], FOUND) == legend[FOUND]


@pytest.mark.parametrize(("spacing", "voxels"), [(10.0, 100), (20.0, 50), (5.0, 0)])
def test_the_scale_bar_is_100_nm_long_or_left_out(tmp_path: Path, spacing: float, voxels: int) -> None:
    path = tmp_path / "bar.png"
    motors_figure(str(path), [panel(voxel_spacing_angstrom=spacing)])
    picture = pixels(path)
    grey = (picture == GREY[0, 0]).all(axis=-1)
    on_slice = picture[grey.any(axis=1)][:, grey.any(axis=0)]
    white = (on_slice == 255).all(axis=-1).sum(axis=1).max()
    assert white * GREY.shape[1] / on_slice.shape[1] == pytest.approx(voxels, abs=2)


def test_panels_fill_a_grid_and_no_more(tmp_path: Path) -> None:
    shapes = {}
    for number in (1, 3, 4):
        path = tmp_path / f"{number}.png"
        motors_figure(str(path), [panel(f"slice {index}") for index in range(number)])
        shapes[number] = pixels(path).shape[:2]
    assert shapes[3][1] == 3 * shapes[1][1]
    assert shapes[3][0] == shapes[1][0]
    assert shapes[4][1] == 2 * shapes[1][1]  # two by two rather than three and one
    assert shapes[4][0] > 1.8 * shapes[1][0]


def test_the_dataset_check_shows_boxes_and_the_heatmaps_peak(tmp_path: Path) -> None:
    heatmap = np.zeros((36, 36))
    heatmap[15:20, 15:20] = 1
    box = np.array([[60.0, 70, 40, 40]])
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    before = heatmap.copy()
    dataset_check(str(plain), [row()])
    dataset_check(str(marked), [row(heatmap=heatmap, raw_boxes=box, augmented_boxes=box), row(), row()])
    assert count(plain, FOUND) == 0
    assert count(marked, FOUND) > 400
    brightest = tuple(int(channel) for channel in colormaps["magma"](1.0, bytes=True)[:3])
    assert count(marked, brightest) > count(plain, brightest) + 3000
    assert pixels(marked).shape[0] > 2.5 * pixels(plain).shape[0]
    assert count(marked, (110, 110, 110)) > 100_000  # the slices' grey, as it is
    np.testing.assert_array_equal(heatmap, before)


def test_the_page_of_a_validation_has_a_row_of_panels_for_each_group_and_words_for_an_empty_one(tmp_path: Path) -> None:
    found, missed = panel(found=np.array([[60, 70, 0.87]])), panel(true_yx=np.array([[60, 70]]))
    pages = {
        "full": ([found] * 4, [missed] * 2, [found]),
        "nothing missed": ([found] * 4, [], [found]),
        "nothing at all": ([], [], []),
    }
    shapes, slices = {}, {}
    for name, groups in pages.items():
        path = tmp_path / f"{name}.png"
        counts = dict(zip(("found", "missed", "false"), map(len, groups), strict=True))
        validation_page(str(path), *groups, counts)
        shapes[name], slices[name] = pixels(path).shape, count(path, (110, 110, 110))
        assert len(np.unique(pixels(path))) > 50  # words, at least
    assert slices["full"] * 5 == pytest.approx(slices["nothing missed"] * 7, rel=0.05)
    assert slices["nothing at all"] == 0
    assert shapes["full"][0] > shapes["nothing missed"][0] > shapes["nothing at all"][0]
    assert shapes["full"][1] == shapes["nothing missed"][1]


def test_the_page_says_when_it_does_not_show_all(tmp_path: Path) -> None:
    for name, missed in (("all", 1), ("some", 40), ("unreadable", 0)):
        counts = {"found": 0, "missed": missed, "false": 0}
        validation_page(str(tmp_path / name), [], [panel()] if missed else [], [], counts)
    counts = {"found": 0, "missed": 3, "false": 0}
    validation_page(str(tmp_path / "none read"), [], [], [], counts)
    assert pixels(tmp_path / "all").shape == pixels(tmp_path / "some").shape
    assert (pixels(tmp_path / "all") != pixels(tmp_path / "some")).any()
    assert (pixels(tmp_path / "unreadable") != pixels(tmp_path / "none read")).any()


@given(st.floats(-30, 150), st.floats(-30, 180), st.integers(1, 80))
def test_in_a_close_up_things_lie_where_they_lay_and_the_motor_in_the_middle(y: float, x: float, edge: int) -> None:
    image = np.random.default_rng(0).integers(0, 100, (120, 150), np.uint8)
    corners = np.array([[0.0, 0], [119, 149], [20, 30], [y, x]])
    whole = panel(image=image, true_yx=corners, found=np.column_stack([corners, [0.1, 0.2, 0.3, 0.4]]))
    near = close_up(whole, y, x, edge)
    assert near.image.shape == (edge, edge)
    np.testing.assert_allclose(near.true_yx[-1], (edge - 1) / 2, atol=0.51)
    assert near.found[-1, 2] == 0.4
    for row, column, score in near.found[:-1]:
        before = corners[round(10 * score) - 1].astype(int)
        assert near.image[round(row), round(column)] == image[tuple(before)]
    assert set(np.unique(near.image)) <= {*np.unique(image), OUTSIDE}


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        motors_figure(str(tmp_path / name), [panel(found=np.array([[60, 70, 0.87]]))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        motors_figure(str(tmp_path / "a.png"), [])
    with pytest.raises(ValueError, match="at least one row"):
        dataset_check(str(tmp_path / "a.png"), [])
