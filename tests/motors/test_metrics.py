import doctest
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.errors import MetricError
from motor_ray.motors import metrics
from motor_ray.motors.matching import match_motors
from motor_ray.motors.metrics import (
    AXES,
    Counts,
    best_motors,
    count_tomograms,
    motor_scores,
    official_counts,
    official_f_beta,
    tomogram_scores,
)

NO = (-1, -1, -1)
AT = (100, 200, 300)


def answers(places: Mapping[str, tuple[float, ...]], spacing: float | None = None) -> pd.DataFrame:
    """A solution (with spacing) or submission in Kaggle's columns."""
    table = pd.DataFrame([{"tomo_id": name, **dict(zip(AXES, at, strict=True))} for name, at in places.items()])
    return table if spacing is None else table.assign(**{"Voxel spacing": spacing})


def counts(true: tuple[float, ...], said: tuple[float, ...], spacing: float = 10.0) -> tuple[int, int, int]:
    found = official_counts(answers({"a": true}, spacing), answers({"a": said}))
    return found.true_positives, found.false_positives, found.false_negatives


def motors(rows: list[tuple[str, float, float, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["tomo_id", "z", "y", "x", "score"])


def tomograms(*tomo_ids: str, spacing: float = 10.0) -> pd.DataFrame:
    return pd.DataFrame({"tomo_id": tomo_ids, "voxel_spacing_angstrom": spacing})


def test_the_official_example_gives_the_official_value() -> None:
    assert doctest.testmod(metrics) == (0, 5)
    assert Counts(1, 1, 2).f_beta(2) == pytest.approx(0.3571428571428571, rel=1e-15)


def test_rule_1_ids_must_match_one_to_one() -> None:
    solution = answers({"a": AT, "b": NO}, 10)
    for submission in ({"a": AT}, {"a": AT, "c": NO}, {"a": AT, "b": NO, "c": NO}):
        with pytest.raises(MetricError, match="only one of solution and submission"):
            official_f_beta(solution, answers(submission))
    doubled = pd.concat([answers({"a": AT, "b": NO}), answers({"a": NO})])
    with pytest.raises(MetricError, match="submission: tomogram a has several rows"):
        official_f_beta(solution, doubled)
    with pytest.raises(MetricError, match="solution: tomogram a has several rows"):
        official_f_beta(doubled.assign(**{"Voxel spacing": 10}), answers({"a": AT, "b": NO}))


def test_rule_1_the_order_of_rows_does_not_matter() -> None:
    solution = answers({"a": AT, "b": NO, "c": (1, 2, 3)}, 10)
    submission = answers({"a": AT, "b": NO, "c": NO})
    assert official_f_beta(solution, submission[::-1]) == official_f_beta(solution, submission) == 5 / 9


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rule_2_minus_one_on_any_axis_says_no_motor(axis: int) -> None:
    said = tuple(-1 if index == axis else value for index, value in enumerate(AT))
    assert counts(AT, said) == (0, 0, 1)
    assert counts(NO, said) == (0, 0, 0)


@pytest.mark.parametrize(("spacing", "reach"), [(10.0, 100), (20.0, 50), (13.328, 75)])
def test_rule_3_within_1000_angstrom_is_a_hit_and_beyond_is_one_miss_and_no_alarm(spacing: float, reach: int) -> None:
    assert counts(AT, (100, 200 + reach, 300), spacing) == (1, 0, 0)
    assert counts(AT, (100, 200, 300 + reach + 1), spacing) == (0, 0, 1)


def test_rule_4_an_alarm_needs_a_tomogram_without_motor() -> None:
    assert counts(NO, AT) == (0, 1, 0)
    assert counts(NO, NO) == (0, 0, 0)


def test_rule_5_always_answering_motor_scores_0_864_on_the_train_mix() -> None:
    places = {f"t{i}": NO if i < 286 else AT for i in range(648)}
    solution, submission = answers(places, 13.1), answers(dict.fromkeys(places, AT))
    assert official_f_beta(solution, submission) == pytest.approx(0.864, abs=5e-4)
    assert official_counts(solution, submission).precision == pytest.approx(362 / 648)


def test_nothing_to_find_and_nothing_found_scores_zero_officially() -> None:
    assert official_f_beta(answers({"a": NO}, 10), answers({"a": NO})) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Motor axis 1": float("nan")}, "submission: tomogram a holds something that is not a finite number"),
        ({"Motor axis 1": "many"}, "submission: tomogram a holds something that is not a finite number"),
    ],
)
def test_a_submission_that_is_not_numbers_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        official_f_beta(answers({"a": AT}, 10), answers({"a": AT}).assign(**change))


def test_missing_columns_and_spacings_are_named() -> None:
    with pytest.raises(MetricError, match="solution: has no column 'Voxel spacing'"):
        official_f_beta(answers({"a": AT}), answers({"a": AT}))
    with pytest.raises(MetricError, match="'Voxel spacing' must be positive, got 0"):
        official_f_beta(answers({"a": AT}, 0), answers({"a": AT}))
    with pytest.raises(MetricError, match="no voxel spacing, such as b"):
        best_motors(motors([]), motors([]), tomograms("b", spacing=float("nan")))
    with pytest.raises(MetricError, match="tomogram b occurs twice"):
        best_motors(motors([]), motors([]), tomograms("b", "b"))


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(st.sampled_from([NO, AT]), st.sampled_from([NO, AT, (100, 200, 500)]), st.floats(0.1, 0.9)),
        min_size=1,
    ),
    st.floats(0, 1),
)
@settings(max_examples=40)
def test_tomogram_counts_are_the_official_ones(rows: dict[str, Any], threshold: float) -> None:
    truth = motors([(name, *true, 1) for name, (true, _, _) in rows.items() if true != NO])
    found = motors([(name, *said, score) for name, (_, said, score) in rows.items() if said != NO])
    solution = answers({name: true for name, (true, _, _) in rows.items()}, 10)
    submission = answers({name: said if score >= threshold else NO for name, (_, said, score) in rows.items()})
    best = best_motors(found, truth.drop(columns="score"), tomograms(*rows))
    assert count_tomograms(best, threshold, 1000) == official_counts(solution, submission)


def test_the_best_motor_answers_for_its_tomogram_and_any_true_motor_is_right() -> None:
    found = motors([("a", 0, 0, 0, 0.3), ("a", 50, 90, 0, 0.8), ("c", 1, 1, 1, 0.6)])
    truth = pd.DataFrame({"tomo_id": ["a", "a", "b"], "z": [0, 50, 1], "y": [0, 60, 1], "x": [0, 0, 1]})
    best = best_motors(found, truth, tomograms("a", "b", "c"))
    assert best["has_motor"].tolist() == [True, True, False]
    np.testing.assert_allclose(best["score"], [0.8, np.nan, 0.6])
    np.testing.assert_allclose(best["distance_angstrom"], [300, np.nan, np.nan])


def test_the_curve_trades_recall_for_precision_and_holds_the_best_threshold() -> None:
    found = motors([("a", 0, 0, 0, 0.9), ("b", 0, 0, 0, 0.4), ("c", 0, 0, 0, 0.6), ("d", 0, 0, 0, 0.35)])
    truth = motors([("a", 0, 0, 0, 1), ("b", 0, 0, 0, 1)])
    scores: Any = tomogram_scores(best_motors(found, truth, tomograms(*"abcd")), 0.5, 1000)
    assert (scores["precision"], scores["recall"]) == (0.5, 0.5)
    assert (scores["best"]["threshold"], scores["best"]["recall"]) == (0.4, 1.0)
    recalls = [at["recall"] for at in scores["curve"]]
    assert recalls == sorted(recalls, reverse=True)
    assert scores["curve"][0]["false_positives"] == 2
    assert scores["curve"][-1]["precision"] is None


@pytest.mark.parametrize("truth", [[], [("a", 0, 0, 0, 1)]])
@pytest.mark.parametrize("found", [[], [("a", 0, 0, 0, 0.9)]])
@pytest.mark.parametrize("names", ["", "a"])
def test_without_truth_or_detections_every_score_is_valid_json(truth: Any, found: Any, names: str) -> None:
    tables = motors(found if names else []), motors(truth if names else []), tomograms(*names)
    at_tomograms = tomogram_scores(best_motors(*tables), 0.5, 1000)
    at_motors = motor_scores(*tables, 0.5, 1000)
    json.dumps([at_tomograms, at_motors], allow_nan=False)
    if not len(tables[0]):
        assert at_tomograms["precision"] is at_motors["precision"] is None
        assert at_motors["localisation_error_angstrom_median"] is None
    if not len(tables[1]):
        assert at_tomograms["recall"] is at_motors["recall"] is None


def test_motors_are_matched_one_to_one_within_the_radius() -> None:
    found = motors([("a", 0, 0, 0, 0.9), ("a", 0, 0, 4, 0.8), ("a", 0, 0, 300, 0.7), ("b", 0, 0, 0, 0.2)])
    truth = motors([("a", 0, 0, 1, 1), ("a", 0, 0, 120, 1), ("b", 0, 0, 0, 1)])
    scores = motor_scores(found, truth, tomograms("a", "b"), 0.5, 1000)
    assert (scores["true_positives"], scores["false_positives"], scores["false_negatives"]) == (1, 2, 2)
    assert scores["localisation_error_angstrom_median"] == 10
    assert scores["n_motors"] == 3


def test_the_matching_prefers_more_pairs_to_nearer_ones() -> None:
    found = np.array([[0.0, 0, 0], [0, 0, 9]])
    truth = np.array([[0.0, 0, 9.5], [0, 0, 18]])
    assert sorted(match_motors(found, truth, 10).distances) == [9, 9.5]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_matching_is_symmetric_and_within_the_radius(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0, 10, (n, 3)), rng.uniform(0, 10, (m, 3))
    pairs, turned = match_motors(a, b, 5), match_motors(b, a, 5)
    np.testing.assert_allclose(np.sort(pairs.distances), np.sort(turned.distances))
    np.testing.assert_allclose(pairs.distances, np.linalg.norm(a[pairs.found] - b[pairs.truth], axis=1))
    assert len(set(pairs.found)) == len(set(pairs.truth)) == len(pairs.distances) <= min(n, m)
    assert (pairs.distances <= 5).all()
