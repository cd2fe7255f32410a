import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import PseudoSettings
from motor_ray.config_values import settings_from
from motor_ray.errors import ConfigError
from motor_ray.motors.pseudo import Choice, Limits, Sure, choose, compare_choices, sure_scores

SURE = Sure(0.7, 0.2)
FREE = Limits(100, 100)
SPACINGS = dict.fromkeys("abcdefgh", 10.0)


def motors_of(*found: tuple[str, float, int], z: float = 10.0) -> pd.DataFrame:
    """Motors as (tomogram, score, slices), beside one another."""
    rows = [(name, z, 100.0 * n, 50.0, score, slices) for n, (name, score, slices) in enumerate(found)]
    return pd.DataFrame(rows, columns=["tomo_id", "z", "y", "x", "score", "n_slices"])


def chosen(motors: pd.DataFrame, tomo_ids: str, limits: Limits = FREE, unreadable: str = "", seed: int = 0) -> Choice:
    return choose(motors, set(tomo_ids), set(unreadable), limits, SURE, 4, seed)


def test_what_is_sure_is_believed_and_what_is_neither_is_left_out():
    choice = chosen(motors_of(("a", 0.9, 9), ("b", 0.5, 9), ("c", 0.1, 9)), "abcd")
    assert choice.with_motor == ["a"]
    assert choice.negatives == ("c", "d")
    assert choice.counts == {
        "looked_at": 4, "sure_of_motors": 1, "sure_of_none": 2, "undecided": 1, "unreadable": 0,
    }  # fmt: skip


def test_a_high_score_on_few_slices_is_not_sure_and_no_negative_either():
    choice = chosen(motors_of(("a", 0.99, 3)), "a")
    assert (choice.with_motor, choice.negatives, choice.counts["undecided"]) == ([], (), 1)


def test_beside_a_sure_motor_those_in_between_are_doubtful_and_the_low_ones_nothing():
    choice = chosen(motors_of(("a", 0.9, 9), ("a", 0.5, 9), ("a", 0.95, 2), ("a", 0.1, 9), ("b", 0.5, 9)), "ab")
    assert choice.motors["score"].tolist() == [0.9]
    assert choice.doubtful[["tomo_id", "score"]].to_numpy().tolist() == [["a", 0.5], ["a", 0.95]]


def test_a_tomogram_that_cannot_be_read_is_never_taken_for_empty_but_may_hold_a_sure_motor():
    choice = chosen(motors_of(("a", 0.9, 9)), "abc", unreadable="ab")
    assert (choice.with_motor, choice.negatives) == (["a"], ("c",))
    assert (choice.counts["unreadable"], choice.counts["undecided"]) == (2, 0)


def test_the_surest_come_first_within_the_limits():
    motors = motors_of(("a", 0.8, 9), ("b", 0.95, 9), ("c", 0.9, 9), ("d", 0.15, 9), ("e", 0.05, 9))
    choice = chosen(motors, "abcde", Limits(2, 3))
    assert choice.with_motor == ["b", "c"]
    assert choice.negatives == ("e",)
    assert (choice.counts["sure_of_motors"], choice.counts["sure_of_none"]) == (3, 2)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 1000))
def test_no_more_than_the_limits_are_chosen_and_the_same_seed_chooses_the_same(with_motor, in_all, seed):
    limits = Limits(min(with_motor, in_all), in_all)
    motors = motors_of(*[(name, 0.9, 9) for name in "abc"])
    choice = chosen(motors, "abcdefgh", limits, seed=seed)
    assert len(choice.with_motor) <= limits.with_motor
    assert len(choice.with_motor) + len(choice.negatives) <= in_all
    assert chosen(motors, "hgfedcba", limits, seed=seed).negatives == choice.negatives


def test_of_tomograms_that_are_equally_empty_not_always_the_same_names_are_taken():
    taken = {chosen(motors_of(), "abcdefgh", Limits(1, 1), seed=seed).negatives for seed in range(20)}
    assert len(taken) > 3


def test_the_first_choice_is_all_new():
    choice = chosen(motors_of(("a", 0.9, 9), ("a", 0.8, 9)), "ab")
    assert compare_choices(None, choice, SPACINGS, 400.0) == (2, 0, 0, 2, 0)


def test_what_changed_is_counted():
    before = chosen(motors_of(("a", 0.9, 9), ("b", 0.9, 9), ("c", 0.9, 9)), "abcd")
    now = chosen(motors_of(("a", 0.8, 9), ("c", 0.5, 9), ("d", 0.9, 9), ("a", 0.9, 9), z=12.0), "abcde")
    changes = compare_choices(before, now, SPACINGS, 400.0)
    assert (changes.tomograms_added, changes.tomograms_dropped) == (1, 1)  # e; c
    assert changes.tomograms_changed == 3  # a has one more, b none any more, d one instead of none
    assert (changes.motors_added, changes.motors_dropped) == (2, 2)


def test_the_same_motors_a_little_off_are_no_change():
    before, now = (chosen(motors_of(("a", 0.9, 9), z=z), "ab") for z in (10.0, 12.0))
    assert compare_choices(before, now, SPACINGS, 400.0) == (0, 0, 0, 0, 0)


def test_scores_without_room_for_doubt_are_refused():
    with pytest.raises(ConfigError, match=r"negative_score 0\.8 must not exceed positive_score 0\.7"):
        settings_from({"pseudo": {"negative_score": 0.8, "positive_score": 0.7}})


def sure(found: pd.DataFrame, true: str, empty: str = "", **given: float) -> Sure:
    """What is learned where the first motor of each tomogram `true` is one; `empty` have none."""
    motors = found.groupby("tomo_id").head(1)
    motors = motors[motors["tomo_id"].isin(list(true))][["tomo_id", "z", "y", "x"]]
    lost = pd.DataFrame(
        [(name, 0.0, 0.0, 0.0) for name in sorted({*true} - {*motors["tomo_id"]})], columns=motors.columns
    )
    tomograms = pd.DataFrame({"tomo_id": [*true, *empty], "voxel_spacing_angstrom": 10.0})
    settings = PseudoSettings(precision=given.pop("precision", 1.0), **given)
    return sure_scores(found, pd.concat([motors, lost]), tomograms, settings, 400.0)


def test_a_score_is_sure_from_which_on_all_that_validates_is_true_and_empty_below_all_motors():
    found = motors_of(("a", 0.6, 9), ("b", 0.3, 9), ("c", 0.25, 9), ("a", 0.2, 9), ("d", 0.1, 9))
    assert sure(found, "ab", "cd") == (0.3, 0.3)
    assert sure(found, "abd", "c") == (0.3, 0.1)
    assert sure(found, "abc", "d") == (0.25, 0.25)


def test_a_share_of_errors_may_be_borne():
    found = motors_of(*[(name, 0.9 - 0.1 * n, 9) for n, name in enumerate("abcdefg")])
    assert sure(found, "abdefg", "c").positive == pytest.approx(0.8)
    assert sure(found, "abdefg", "c", precision=0.8).positive == pytest.approx(0.3)
    assert sure(found, "abdefg", "c", precision=0.8, positive_score=0.9).negative == pytest.approx(0.4)


def test_nothing_is_sure_of_a_model_that_is_wrong_at_its_best_and_nothing_empty_where_a_motor_was_missed():
    assert sure(motors_of(("c", 0.9, 9), ("a", 0.5, 9)), "a", "c").positive == float("inf")
    assert sure(motors_of(("a", 0.5, 9)), "ab").negative == 0.0
    assert sure(motors_of(), "a").positive == float("inf")


def test_motors_on_few_slices_teach_nothing_about_what_is_sure():
    found = motors_of(("a", 0.6, 9), ("c", 0.9, 2))
    assert sure(found, "a", "c").positive == 0.6


def test_scores_that_are_given_stay():
    found = motors_of(("a", 0.6, 9), ("c", 0.9, 9))
    assert sure(found, "a", "c", positive_score=0.7, negative_score=0.2) == (0.7, 0.2)
    assert sure(found, "a", "c", positive_score=0.5) == (0.5, 0.5)
