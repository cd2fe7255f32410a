import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import CareSettings
from motor_ray.config_values import settings_from
from motor_ray.errors import ConfigError, LabelsError
from motor_ray.motors.label_care import SUSPECTS, Suspects, find_suspects
from motor_ray.tables import MOTORS, SLABS

SPACING = 10.0
CARE = CareSettings(missing_score=0.5)
TOMOGRAMS = pd.DataFrame({"tomo_id": ["a", "b"], "voxel_spacing_angstrom": [SPACING, SPACING]})
Place = tuple[float, float, float]


def labels_at(*places: Place, tomo_id: str = "a") -> pd.DataFrame:
    return pd.DataFrame([(tomo_id, *place) for place in places], columns=["tomo_id", "z", "y", "x"])


def motors_at(*found: tuple[float, float, float, float], tomo_id: str = "a") -> pa.Table:
    more = {"tomo_id": tomo_id, "height": 40.0, "width": 40.0, "n_slices": 5, "voxel_spacing_angstrom": SPACING}
    return pa.Table.from_pylist(
        [dict(zip("zyx", one, strict=False)) | {"score": one[3]} | more for one in found], MOTORS
    )


def slabs_of(
    peaks: dict[int, list[tuple[float, float, float]]] | None = None, unread: tuple[int, ...] = (), step: int = 1
) -> pa.Table:
    """Slices 0 to 99 of "a", with peaks (y, x, score) by z."""

    def slice_at(z: int) -> dict[str, object]:
        boxes = [
            {"y": y, "x": x, "height": 40, "width": 40, "score": score} for y, x, score in (peaks or {}).get(z, [])
        ]
        status = "corrupt" if z in unread else "ok"
        return {"z": z, "status": status, "error": None, "note": None, "presence": 0.0, "detections": boxes}

    row = {"slab_id": "a/0", "tomo_id": "a", "slices": [slice_at(z) for z in range(0, 100, step)]}
    return pa.Table.from_pylist([row], SLABS)


def suspects(
    motors: pa.Table, labels: pd.DataFrame, slabs: pa.Table | None = None, care: CareSettings = CARE
) -> Suspects:
    slabs = slabs_of() if slabs is None else slabs
    return find_suspects(slabs, motors, labels, TOMOGRAMS, reach_angstrom=60.0, settings=care)


def kinds(came: Suspects) -> list[str]:
    return [str(kind) for kind in came.table["kind"].to_pylist()]


def test_labels_that_are_where_motors_are_found_are_not_suspect():
    came = suspects(motors_at((50, 100, 100, 0.4)), labels_at((52, 110, 100)))
    assert came.table.schema == SUSPECTS
    assert len(came.table) == 0
    assert came.counts["labels"] == came.counts["found"] == 1
    assert (came.counts["not_looked_at"], came.counts["not_labelled"]) == (1, 0)


def test_a_sure_motor_without_a_label_is_a_missing_one_and_an_unsure_one_is_not():
    came = suspects(motors_at((50, 100, 100, 0.9), (50, 400, 400, 0.4)), labels_at())
    [row] = came.table.to_pylist()
    assert (row["kind"], row["z"], row["y"], row["x"], row["score"]) == ("missing", 50, 100, 100, 0.9)
    assert (row["distance_angstrom"], row["n_slices"], row["rank"]) == (None, 5, 1)


def test_one_label_accounts_for_one_motor():
    """Two motors may lie within the radius of each other; one label is not enough for them."""
    came = suspects(motors_at((50, 100, 100, 0.9), (50, 160, 100, 0.8)), labels_at((50, 100, 100)))
    [row] = came.table.to_pylist()
    assert (row["kind"], row["y"], row["distance_angstrom"]) == ("missing", 160, 600)


def test_a_label_far_from_what_is_found_is_doubtful_and_both_places_are_told():
    came = suspects(motors_at((50, 100, 100, 0.9)), labels_at((50, 150, 100)))
    [row] = came.table.to_pylist()
    assert (row["kind"], row["y"], row["found_y"], row["distance_angstrom"]) == ("doubtful", 150, 100, 500)


def test_a_label_where_nothing_is_seen_is_wrong():
    came = suspects(motors_at((50, 400, 400, 0.3)), labels_at((50, 100, 100)))
    [row] = came.table.to_pylist()
    assert (row["kind"], row["score"], row["found_z"], row["n_slices"]) == ("wrong", 0, None, 13)
    assert row["distance_angstrom"] == pytest.approx(np.hypot(300, 300) * SPACING)


def test_a_label_seen_on_a_single_slice_is_not_wrong():
    """Linking drops what shows on one slice only; the label is not contradicted by that."""
    assert kinds(suspects(motors_at(), labels_at((50, 100, 100)), slabs_of({52: [(105, 100, 0.2)]}))) == []
    assert kinds(suspects(motors_at(), labels_at((50, 100, 100)), slabs_of({52: [(105, 100, 0.05)]}))) == ["wrong"]


@pytest.mark.parametrize("slabs", [slabs_of(unread=(53,)), slabs_of(step=40)], ids=["not readable", "not looked at"])
def test_a_label_whose_slices_were_not_all_seen_is_not_judged(slabs):
    came = suspects(motors_at(), labels_at((58, 100, 100), (52, 400, 400)), slabs)
    assert came.counts["unjudged"] == 2
    assert kinds(came) == []


def test_a_model_that_sees_few_labels_says_little_about_the_others():
    found = [(50.0, 100.0, 100.0 + 200 * n, 0.9) for n in range(4)]
    good = suspects(motors_at(*found), labels_at(*(one[:3] for one in found), (50, 900, 900)))
    poor = suspects(motors_at(found[0]), labels_at(*(one[:3] for one in found), (50, 900, 900)))
    assert kinds(good) == ["wrong"]
    assert kinds(poor) == ["wrong"] * 4
    assert good.table["suspicion"][0].as_py() == pytest.approx(0.8)
    assert poor.table["suspicion"][0].as_py() == pytest.approx(0.2)


@given(st.permutations([(50, 100, 100, 0.55), (20, 300, 300, 0.95), (80, 700, 700, 0.7)]))
def test_the_most_suspicious_comes_first_whatever_the_order_of_the_tables(found):
    came = suspects(motors_at(*found), labels_at())
    assert came.table["score"].to_pylist() == [0.95, 0.7, 0.55]
    assert came.table["rank"].to_pylist() == [1, 2, 3]


def test_a_run_in_other_tomograms_is_refused():
    other = TOMOGRAMS.assign(tomo_id=["c", "d"])
    with pytest.raises(LabelsError, match=r"none of the 1 tomograms that were looked at is labelled; .* c, d"):
        find_suspects(slabs_of(), motors_at(), labels_at(), other, reach_angstrom=60.0, settings=CARE)


def test_scores_that_contradict_one_another_are_refused():
    with pytest.raises(ConfigError, match=r"wrong_score 0\.6 must not exceed missing_score 0\.2"):
        settings_from({"care": {"wrong_score": 0.6}})
