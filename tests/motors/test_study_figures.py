import math
import warnings

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from motor_ray.motors.picture import BLUE, GREY, ORANGE
from motor_ray.motors.study_figures import Searched, VariantScores, ablation_figure, tuning_figure


def count(path, colour):
    """Pixels of exactly this colour."""
    image = cv2.imread(str(path))
    assert image is not None
    return int((image[..., ::-1] == np.round(np.array(to_rgb(colour)) * 255)).all(axis=-1).sum())


def searched(title="loss.size_weight", **change):
    plain = Searched(title, [0.02, 0.1, 0.5], [0.5, 0.6, 0.4], [True, True, False], (0.01, 1.0), True, 0.1)
    return plain._replace(**change)


def test_an_ablation_with_more_seeds_has_more_points(tmp_path):
    one = [VariantScores("plain", [1], [0.5]), VariantScores("+ CLAHE", [1], [0.6])]
    many = [VariantScores("plain", [1, 2], [0.5, 0.2]), VariantScores("+ CLAHE", [1, 2], [0.6, 0.3])]
    ablation_figure(str(tmp_path / "one.png"), one, "mAP@0.5")
    ablation_figure(str(tmp_path / "many.png"), many, "mAP@0.5")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "many.png").read_bytes()


def test_a_variant_without_a_score_is_an_empty_place(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ablation_figure(str(tmp_path / "a.png"), [VariantScores("plain", [], [])], "mAP@0.5")
        some = [VariantScores("plain", [], []), VariantScores("+ CLAHE", [2], [0.6])]
        ablation_figure(str(tmp_path / "b.png"), some, "mAP@0.5")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_search_marks_what_was_stopped_what_was_not_and_what_was_given(tmp_path):
    tuning_figure(str(tmp_path / "all.png"), [searched()], "mAP@0.5")
    assert all(count(tmp_path / "all.png", colour) > 20 for colour in (BLUE, GREY, ORANGE))
    # The legend has a mark of its own for each.
    tuning_figure(str(tmp_path / "done.png"), [searched(done=[True] * 3)], "mAP@0.5")
    assert count(tmp_path / "done.png", GREY) < count(tmp_path / "all.png", GREY)


@pytest.mark.parametrize("settings", [1, 2, 4, 5, 6])
def test_a_search_has_a_panel_for_each_setting(tmp_path, settings):
    uri = str(tmp_path / "search.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels = [searched(f"loss.weight_{number}", done=[True] * 3) for number in range(settings)]
        tuning_figure(uri, panels, "mAP@0.5", columns=3)
    image = cv2.imread(uri)
    assert image is not None
    lines = math.ceil(settings / 3)
    assert image.shape[0] > 400 * lines
    assert image.shape[1] > 450 * math.ceil(settings / lines)


def test_a_search_without_a_score_is_drawn_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning_figure(str(tmp_path / "none.png"), [searched(values=[], scores=[], done=[])], "mAP@0.5")
    assert cv2.imread(str(tmp_path / "none.png")) is not None


def test_nothing_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="at least one variant"):
        ablation_figure(str(tmp_path / "a.png"), [], "mAP@0.5")
    with pytest.raises(ValueError, match="at least one setting"):
        tuning_figure(str(tmp_path / "a.png"), [], "mAP@0.5")
