import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.motors.matching import outcomes
from motor_ray.motors.metrics import motor_scores

TOMOGRAMS = pd.DataFrame({"tomo_id": ["a", "b", "c"], "voxel_spacing_angstrom": [10.0, 20.0, 10.0]})

places = st.tuples(st.sampled_from("abcd"), *[st.integers(0, 60)] * 3)


def table(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    columns = ["tomo_id", "z", "y", "x", "score"]
    return pd.DataFrame(rows, columns=columns[: len(rows[0])] if rows else columns)


def test_motors_are_told_apart_into_found_missed_and_false() -> None:
    true = table([("a", 5, 0, 0), ("a", 5, 50, 0), ("b", 1, 1, 1)])
    said = table([("a", 5, 0, 4, 0.8), ("a", 40, 90, 90, 0.6), ("b", 1, 1, 11, 0.9), ("b", 1, 1, 2, 0.1)])
    found, missed, false = outcomes(said, true, TOMOGRAMS, 0.5, 200)
    assert found.to_numpy().tolist() == [["b", 1, 1, 1, 0.9, 200], ["a", 5, 0, 0, 0.8, 40]]  # the better one first
    assert missed.to_numpy().tolist() == [["a", 5, 50, 0]]
    assert false.to_numpy().tolist() == [["a", 40, 90, 90, 0.6]]


def test_tomograms_that_were_not_looked_at_do_not_count() -> None:
    found, missed, false = outcomes(table([("d", 1, 1, 1, 0.9)]), table([("e", 1, 1, 1)]), TOMOGRAMS, 0.5, 200)
    assert len(found) == len(missed) == len(false) == 0
    assert list(found) == ["tomo_id", "z", "y", "x", "score", "distance_angstrom"]


@given(st.lists(places, max_size=8), st.lists(places.flatmap(lambda place: st.floats(0, 1).map(lambda s: (*place, s)))))
@settings(max_examples=30)
def test_every_motor_has_one_outcome_and_scores_count_them(
    true: list[tuple[object, ...]], said: list[tuple[object, ...]]
) -> None:
    came = outcomes(table(said), table(true), TOMOGRAMS, 0.4, 300)
    known = [place for place in true if place[0] != "d"]
    counted = [one for one in said if one[0] != "d" and isinstance(one[4], float) and one[4] >= 0.4]
    assert len(came.found) + len(came.missed) == len(known)
    assert len(came.found) + len(came.false) == len(counted)
    of_truth = pd.concat([came.found, came.missed])[["tomo_id", "z", "y", "x"]]
    assert sorted(of_truth.itertuples(index=False, name=None)) == sorted(known)
    assert (came.found["distance_angstrom"].to_numpy(dtype=float) <= 300).all()
    assert came.false["score"].is_monotonic_decreasing
    scores = motor_scores(table(said), table(true), TOMOGRAMS, 0.4, 300)
    assert [scores[name] for name in ("true_positives", "false_positives", "false_negatives")] == [
        len(came.found),
        len(came.false),
        len(came.missed),
    ]
