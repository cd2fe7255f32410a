import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import RunSettings
from motor_ray.errors import ConfigError, MetricError
from motor_ray.motors.calibrate import (
    BINS,
    best_threshold,
    bins_of,
    calibrate,
    expected_error,
    fit_platt,
)
from motor_ray.motors.calibration import Calibration, Origin, calibration_at, origin_of, quantile_threshold
from motor_ray.motors.metrics import count_tomograms
from motor_ray.motors.reliability import reliability_figure, wilson
from motor_ray.storage import write_json

RADIUS = 1000.0
ORIGIN = Origin("a" * 64, None, {"detect.tta": "off"})


def answers(rows: list[tuple[float, bool]], distances: float | list[float] = 0.0) -> pd.DataFrame:
    """The table of `best_motors` for tomograms of (score, has a motor); NaN says that nothing was found."""
    scores, has_motor = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "tomo_id": [f"t{number}" for number in range(len(rows))],
            "has_motor": np.array(has_motor, dtype=bool),
            "score": np.array(scores, dtype=float),
            "distance_angstrom": np.where(has_motor, distances, np.nan),
        }
    )


def drawn(count: int, seed: int = 0, steep: float = 8.0) -> pd.DataFrame:
    """Tomograms whose motors follow a logistic curve of the score around 0.4."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, count)
    return answers(list(zip(scores, rng.uniform(size=count) < 1 / (1 + np.exp(-steep * (scores - 0.4))), strict=True)))


def learned(best: pd.DataFrame, method: Any = "fitted", **given: Any) -> Calibration:
    usual: dict[str, Any] = {"threshold": 0.15, "quantile": 0.55, "origin": ORIGIN}
    return calibrate(best, method, RADIUS, **usual | given)


tables = st.lists(st.tuples(st.floats(0, 1) | st.just(float("nan")), st.booleans()), min_size=1, max_size=30)


@given(tables)
def test_no_threshold_has_a_better_f2_than_the_fitted_one(rows: list[tuple[float, bool]]) -> None:
    best = answers(rows)
    fitted = count_tomograms(best, best_threshold(best, RADIUS), RADIUS).f_beta(2) or 0.0
    tried = [*best["score"].dropna().tolist(), 0.0, 0.5, 1.0]
    assert all(fitted >= (count_tomograms(best, one, RADIUS).f_beta(2) or 0.0) for one in tried)


def test_the_fitted_threshold_lies_halfway_between_the_answers_that_it_parts() -> None:
    best = answers([(0.9, True), (0.6, True), (0.2, False), (0.1, False)])
    assert best_threshold(best, RADIUS) == pytest.approx(0.4)
    assert best_threshold(answers([(0.6, True), (np.nan, False)]), RADIUS) == pytest.approx(0.3)


def test_a_far_answer_neither_draws_the_threshold_down_nor_up() -> None:
    near = answers([(0.9, True), (0.2, False)])
    far = answers([(0.9, True), (0.2, False), (0.05, True)], [0.0, 0.0, 5000.0])
    assert best_threshold(near, RADIUS) == best_threshold(far, RADIUS)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40, unique=True), st.floats(0, 0.99))
def test_a_quantile_leaves_out_that_share_of_the_tomograms_of_a_run(scores: list[float], share: float) -> None:
    kept = np.array(scores) >= quantile_threshold(np.array(scores), share)
    assert kept.sum() == max(len(scores) - round(share * len(scores)), 1)


def test_tomograms_where_nothing_was_found_are_the_first_that_a_quantile_leaves_out() -> None:
    scores = np.array([np.nan, np.nan, 0.3, 0.8])
    assert quantile_threshold(scores, 0.5) == 0.3
    assert quantile_threshold(scores, 0.75) == 0.8
    assert quantile_threshold(np.empty(0), 0.5) == 0.0


def test_of_a_few_tomograms_a_quantile_says_nothing_and_the_learned_threshold_counts() -> None:
    calibration = learned(drawn(50), "quantile", quantile=0.5)
    assert calibration.threshold_of(np.array([0.02])) == calibration.threshold > 0.02


def test_the_threshold_of_a_quantile_is_that_of_the_run_at_hand_and_others_stay() -> None:
    run = np.repeat([0.1, 0.2, 0.3, 0.4], 3)
    assert learned(drawn(50), "quantile", quantile=0.5).threshold_of(run) == 0.3
    fixed = learned(drawn(50), "fixed", threshold=0.7)
    assert fixed.threshold_of(run) == fixed.threshold == 0.7
    assert fixed.threshold_interval == (0.7, 0.7)


def test_a_calibration_says_what_its_threshold_is_worth() -> None:
    best = drawn(80)
    found = learned(best)
    counts = count_tomograms(best, found.threshold, RADIUS)
    assert (found.f2, found.precision, found.recall) == (counts.f_beta(2), counts.precision, counts.recall)
    low, high = found.f2_interval
    assert low < found.f2 < high
    assert found.f2_out_of_bag is not None
    assert found.f2_out_of_bag < found.f2  # which flatters
    assert found == learned(best)


def test_intervals_narrow_with_more_tomograms() -> None:
    few, many = (learned(drawn(count)) for count in (60, 600))
    assert np.diff(many.f2_interval) < np.diff(few.f2_interval) / 2
    assert np.diff(many.threshold_interval) < np.diff(few.threshold_interval)


def test_the_fitted_curve_is_the_one_that_the_tomograms_follow_and_its_probabilities_err_less() -> None:
    best = drawn(4000, steep=8.0)
    curve = fit_platt(best)
    assert curve.slope == pytest.approx(8.0, rel=0.1)
    assert -curve.intercept / curve.slope == pytest.approx(0.4, abs=0.02)
    found = learned(best)
    assert found.error_of_probabilities < found.error_of_scores / 2
    # The best threshold for probabilities that are true is F2 / 5 (Lipton et al. 2014).
    assert found.threshold_by_probability == pytest.approx(found.threshold, abs=0.06)


def test_the_curve_is_finite_for_scores_that_part_the_kinds_and_flat_for_scores_that_mislead() -> None:
    apart = fit_platt(answers([(0.9, True)] * 5 + [(0.1, False)] * 5))
    assert 0.8 < apart(np.array([0.9]))[0] < 1
    misled = learned(answers([(0.1, True)] * 5 + [(0.9, False)] * 5))
    assert (misled.probability_slope, misled.threshold_by_probability) == (0, None)


def test_the_calibration_error_is_that_of_a_share_in_each_bin() -> None:
    assert expected_error(np.array([0.75, 0.75, 0.75, 0.75]), np.array([True, True, True, False])) == 0
    assert expected_error(np.array([1.0, 0.0]), np.array([False, True])) == 1
    assert bins_of(np.array([0.0, 0.0999, 0.1001, 1.0])).tolist() == [0, 0, 1, BINS - 1]


@given(st.integers(1, 200), st.data())
def test_intervals_of_shares_hold_the_share_and_stay_between_0_and_1(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = wilson(np.array([float(hits)]), np.array([float(count)]))
    assert 0 <= low[0] <= hits / count <= high[0] <= 1
    assert low[0] < high[0]


@pytest.mark.parametrize(("kind", "words"), [(True, "all of them have a motor"), (False, "none of them has a motor")])
def test_tomograms_of_one_kind_are_refused_with_the_reason(kind: bool, words: str) -> None:
    with pytest.raises(MetricError, match=f"12 labelled tomograms.*{words}.*with and without motors"):
        learned(answers([(0.5, kind)] * 12))


def test_a_run_that_found_no_motor_at_its_place_is_refused() -> None:
    with pytest.raises(MetricError, match=r"in none of the 1 tomograms with a motor.*check that labels"):
        learned(answers([(0.9, True), (0.2, False)], 5000.0))


def test_few_tomograms_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        learned(drawn(30))
        assert not caplog.records
        found = learned(answers([(0.9, True), (0.8, True), (0.1, False)]))
    assert "only 3 tomograms" in caplog.text
    assert found.threshold_interval[0] < found.threshold_interval[1]


def test_a_calibration_is_read_again_and_only_for_the_scores_that_it_is_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, found = str(tmp_path / "calibration.json"), learned(drawn(40))
    assert calibration_at(there, ORIGIN) is None
    write_json(there, found.model_dump(mode="json"))
    assert calibration_at(there, ORIGIN) == found
    assert not caplog.text
    assert calibration_at(there, ORIGIN._replace(model_sha256="b" * 64)) is None
    assert calibration_at(there, ORIGIN._replace(rescorer_sha256="c" * 64)) is None
    assert "run motor-ray calibrate again" in caplog.text


def test_a_calibration_of_other_settings_is_taken_with_a_warning_that_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, found = str(tmp_path / "calibration.json"), learned(drawn(40))
    write_json(there, found.model_dump(mode="json"))
    assert calibration_at(there, ORIGIN._replace(settings={"detect.tta": "full"})) == found
    assert "other settings (detect.tta was off, is full)" in caplog.text


def test_scores_depend_on_how_a_model_looks_and_links_and_not_on_how_the_run_is_done() -> None:
    usual = RunSettings()
    for group, changes, differs in (
        ("detect", {"tta": "fast"}, True),
        ("detect", {"exhaustive": True}, True),
        ("detect", {"ensemble": "logit"}, True),
        ("archive", {"repair": False}, True),
        ("detect", {"score_threshold": 0.02}, True),
        ("link", {"max_gap_angstrom": 50.0}, True),
        ("detect", {"loaders": 3}, False),
        ("archive", {"attempts": 2}, False),
    ):
        other = usual.model_copy(update={group: getattr(usual, group).model_copy(update=changes)})
        assert (origin_of(other, "a") != origin_of(usual, "a")) == differs


@pytest.mark.parametrize("damage", [{"threshold": 1.5}, {"threshold": None}, {"treshold": 0.2}, {"method": "guess"}])
def test_a_damaged_calibration_is_refused_by_name(tmp_path: Path, damage: dict[str, Any]) -> None:
    there = str(tmp_path / "calibration.json")
    write_json(there, learned(drawn(40)).model_dump(mode="json") | damage)
    with pytest.raises(ConfigError, match=rf"calibration\.json: {next(iter(damage))}"):
        calibration_at(there, ORIGIN)
    write_json(there, [1, 2])
    with pytest.raises(ConfigError, match=r"calibration\.json: method: Field required"):
        calibration_at(there, ORIGIN)


@pytest.mark.parametrize("best", [drawn(60), answers([(np.nan, False), (0.9, True)])], ids=["many", "two"])
def test_the_picture_of_a_calibration_is_drawn_and_the_same_again(tmp_path: Path, best: pd.DataFrame) -> None:
    found = learned(best)
    for name in ("a", "b"):
        reliability_figure(str(tmp_path / f"{name}.png"), best, found)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture is not None
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
