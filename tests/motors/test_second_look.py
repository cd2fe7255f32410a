import pyarrow as pa
from hypothesis import assume, given
from hypothesis import strategies as st

from motor_ray.archive.plan import looks
from motor_ray.config import DetectSettings
from motor_ray.motors.second_look import neighbours, second_look
from motor_ray.tables import SLABS

SETTINGS = DetectSettings(candidate_score=0.2)


def slabs(scores: dict[int, float | None], tomo_id: str = "a") -> pa.Table:
    """A first look: the best score of each slice; 0 for none, None for a slice that could not be read."""
    slices = [
        {
            "z": z,
            "status": "corrupt" if score is None else "ok",
            "detections": [{"y": 1, "x": 1, "height": 9, "width": 9, "score": score}] if score else [],
        }
        for z, score in scores.items()
    ]
    return pa.Table.from_pylist([{"slab_id": tomo_id, "tomo_id": tomo_id, "slices": slices}], schema=SLABS)


def again(scores: dict[int, float | None], stride: int = 5, size: int = 100) -> list[int]:
    return second_look(slabs(scores), {"a": size}, {"a": stride}, SETTINGS).get("a", [])


def test_the_slices_between_a_candidate_and_the_looks_beside_it_are_looked_at():
    assert again({10: 0, 15: 0.3, 20: 0}) == [11, 12, 13, 14, 16, 17, 18, 19]


def test_no_slice_is_looked_at_twice():
    assert again({10: 0.3, 15: 0.3, 20: 0.1}) == [6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 19]


def test_what_is_too_faint_is_left_alone():
    assert again({10: 0.19, 15: 0}) == []


def test_a_look_that_could_not_be_read_is_followed_up_for_it_may_hide_a_motor():
    assert again({10: 0, 15: None, 20: 0}) == [11, 12, 13, 14, 16, 17, 18, 19]


def test_a_tomogram_of_which_hardly_anything_can_be_read_is_not_searched_slice_by_slice():
    assert again({5: 0.9, 10: None, 15: None}) == []


def test_an_exhaustive_look_leaves_nothing_to_look_at():
    assert again(dict.fromkeys(range(100), 0.9), stride=1) == []


def test_each_tomogram_has_its_own_stride_and_size():
    both = pa.concat_tables([slabs({2: 0.5}, "a"), slabs({2: 0.5}, "b")])
    assert second_look(both, {"a": 4, "b": 90}, {"a": 9, "b": 2}, SETTINGS) == {"a": [0, 1, 3], "b": [1, 3]}


@given(centre=st.floats(0, 99), reach=st.floats(0.5, 20), stride=st.integers(1, 40))
def test_every_slice_of_a_motor_is_looked_at_once_it_shows_on_its_looks(centre, reach, stride):
    assume(stride <= 2 * reach)
    shown = {z for z in range(100) if abs(z - centre) <= reach}
    seen_on = [z for z in looks(100, stride) if z in shown]
    assert shown <= neighbours(seen_on, stride, 100)
