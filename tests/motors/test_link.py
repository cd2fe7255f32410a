import itertools
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from motor_ray.archive.plan import looks
from motor_ray.config import LinkSettings
from motor_ray.errors import ManifestError
from motor_ray.motors.failures import failed_slices, failed_tomograms
from motor_ray.motors.link import SLICES, detections_of, link_slabs, slices_of
from motor_ray.motors.tracks import Motor, link_candidates
from motor_ray.tables import FAILURES, MANIFEST, MOTORS, SLABS

SPACING = 13.3
SETTINGS = LinkSettings()
ALL = np.arange(300)

Found = NDArray[np.float64]


def track(
    z: float,
    y: float,
    x: float,
    *,
    drift: tuple[float, float] = (0, 0),
    best: float = 0.9,
    sigma: float = 4.0,
    reach: int = 6,
    skip: tuple[int, ...] = (),
) -> Found:
    """Detections ``(n, 6)`` of a motor that fades away from `z` and moves by `drift` (y, x) voxels a slice."""
    zs = np.array([cut for cut in range(int(z) - reach, int(z) + reach + 1) if cut not in skip and cut >= 0])
    off = zs - z
    scores = best * np.exp(-(off**2) / (2 * sigma**2))
    columns = [zs, y + drift[0] * off, x + drift[1] * off, np.full(len(zs), 128), np.full(len(zs), 120), scores]
    return np.column_stack(columns).astype(float)


def link(*tracks: Found, looked_at: Any = ALL, spacing: float = SPACING, rules: LinkSettings = SETTINGS) -> list[Motor]:
    found = link_candidates(np.concatenate(tracks), np.asarray(looked_at), spacing, rules)
    assert all(one.motor.n_slices == len(one.detections) for one in found)
    return [one.motor for one in found]


def slabs_of(detections: Found, zs: Any, tomo_id: str = "tomo_a", per_slab: int = 12) -> list[dict[str, Any]]:
    """Rows of SLABS with `detections` ``(n, 6)`` on the slices `zs`."""
    slices = [
        {
            "z": int(z),
            "status": "ok",
            "error": None,
            "note": None,
            "presence": 0.5,
            "detections": [
                dict(zip(("y", "x", "height", "width", "score"), row[1:].tolist(), strict=True))
                for row in detections
                if row[0] == z
            ],
        }
        for z in zs
    ]
    return [
        {"slab_id": f"{tomo_id}-{start}", "tomo_id": tomo_id, "slices": slices[start : start + per_slab]}
        for start in range(0, len(slices), per_slab)
    ]


def manifest(*tomo_ids: str, spacing: float | None = SPACING) -> pa.Table:
    row = {"format": "mrc", "size_z": 300, "size_y": 960, "size_x": 928, "voxel_spacing_angstrom": spacing}
    rows = [row | {"tomo_id": tomo_id, "uri": f"s3://b/{tomo_id}.mrc"} for tomo_id in tomo_ids]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SLABS)


@pytest.mark.parametrize("drift", [(0, 0), (1, 0), (-0.7, 0.7)], ids=["straight", "tilted", "tilted both ways"])
@pytest.mark.parametrize("z", [100.0, 100.4, 57.75])
def test_a_drawn_track_is_one_motor_where_it_was_drawn(z: float, drift: tuple[float, float]) -> None:
    (motor,) = link(track(z, 400, 500, drift=drift))
    assert motor.z == pytest.approx(z, abs=0.5)
    assert (motor.y, motor.x) == pytest.approx((400, 500), abs=0.5)
    assert (motor.height, motor.width) == pytest.approx((128, 120))
    assert motor.n_slices == len(track(z, 0, 0))


@given(
    z=st.floats(20, 280),
    drift=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    spacing=st.sampled_from([6.5, 13.3, 19.7]),
    jitter=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_a_jittered_track_is_one_motor_within_half_a_slice(
    z: float, drift: tuple[float, float], spacing: float, jitter: int
) -> None:
    detections = track(z, 400, 500, drift=drift, reach=8)
    detections[:, 1:3] += np.random.default_rng(jitter).normal(0, 1, (len(detections), 2))
    (motor,) = link(detections, spacing=spacing)
    assert motor.z == pytest.approx(z, abs=0.5)
    assert np.hypot(motor.y - 400, motor.x - 500) < 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_the_order_of_detections_slices_and_slabs_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = np.column_stack([rng.integers(0, 60, 200), rng.uniform(0, 300, (200, 2)), rng.uniform(50, 99, (200, 2))])
    noise = np.column_stack([noise, rng.choice([0.31, 0.5, 0.7], 200)])  # few scores, so that there are ties
    detections = np.concatenate([noise, track(30, 150, 150)])
    straight = link_slabs(table(slabs_of(detections, range(60))), manifest("tomo_a"))
    slices = rng.permutation(60)
    rows = slabs_of(detections[rng.permutation(len(detections))], slices, per_slab=7)
    shuffled = link_slabs(table([rows[i] for i in rng.permutation(len(rows))]), manifest("tomo_a"))
    assert shuffled.equals(straight)
    assert straight.num_rows > 0


@pytest.mark.parametrize("direction", [(0, 1, 0), (0, 0, 1), (1, 0, 0), (0.6, 0.8, 0)])
def test_two_motors_432_angstrom_apart_stay_two(direction: tuple[float, float, float]) -> None:
    far = np.array(direction) * 432 / SPACING
    motors = link(track(100, 400, 500), track(100 + far[0], 400 + far[1], 500 + far[2], best=0.8))
    assert [motor.z for motor in motors] == pytest.approx([100, 100 + far[0]], abs=0.5)
    assert [motor.y for motor in motors] == pytest.approx([400, 400 + far[1]], abs=0.5)


@pytest.mark.parametrize("direction", [(0, 1, 0), (1, 0, 0)])
def test_two_tracks_300_angstrom_apart_are_one_motor(direction: tuple[float, float, float]) -> None:
    near = np.array(direction) * 300 / SPACING
    (motor,) = link(track(100, 400, 500), track(100 + near[0], 400 + near[1], 500, best=0.6))
    assert motor.z == pytest.approx(100, abs=0.5)


def test_motors_in_line_along_z_are_cut_in_the_valley_between_them() -> None:
    upper, lower = track(100, 400, 500, reach=20, sigma=8), track(140, 400, 500, reach=19, sigma=8, best=0.7)
    joined = np.concatenate([upper, lower])
    assert len(np.unique(joined[:, 0])) == len(joined)
    assert [motor.z for motor in link(joined)] == pytest.approx([100, 140], abs=0.5)
    assert len(link(joined, rules=LinkSettings(merge_distance_angstrom=560))) == 1


def test_a_motor_cut_by_the_first_slice_is_told_from_one_in_line_with_it() -> None:
    upper, lower = track(0, 400, 500, reach=16, sigma=8), track(40, 400, 500, reach=23, sigma=8)
    assert len(link(upper, lower)) == 2


@pytest.mark.parametrize("skip", [(98, 99, 100, 101), (96, 98, 100, 102, 104), (97, 98, 99, 100, 101, 102, 103)])
def test_a_motor_seen_with_gaps_is_one(skip: tuple[int, ...]) -> None:
    (motor,) = link(track(100, 400, 500, skip=skip, reach=9))
    assert motor.z == pytest.approx(100, abs=0.5)
    assert motor.n_slices == 19 - len(skip)


def test_a_gap_beyond_the_limit_still_gives_one_motor_within_the_merge_distance() -> None:
    (motor,) = link(track(100, 400, 500), track(128, 400, 500, best=0.7))
    assert motor.n_slices == 13
    assert motor.z == pytest.approx(100, abs=0.5)


def test_every_third_slice_is_enough() -> None:
    zs = np.arange(0, 300, 3)
    detections = track(100, 400, 500, reach=9)
    (motor,), (whole,) = link(detections[np.isin(detections[:, 0], zs)], looked_at=zs), link(detections)
    assert motor.z == pytest.approx(100, abs=0.5)
    assert motor.score == pytest.approx(whole.score, abs=0.03)


def test_a_closer_look_elsewhere_changes_nothing_about_a_motor_seen_from_afar() -> None:
    """The first look's detections below `candidate_score` have no second look around them."""
    zs = np.array(looks(300, 9))
    faint = track(107.5, 400, 500, best=0.3, sigma=20, reach=9)
    faint = faint[np.isin(faint[:, 0], zs)]
    elsewhere = np.arange(20, 60)
    sure = track(40, 100, 100, reach=9)
    (alone,) = link(faint, looked_at=zs)
    found = link(faint, sure, looked_at=np.union1d(zs, elsewhere))
    assert found[1:] == [alone]
    (close,) = link(sure, looked_at=np.arange(300))
    assert found[0] == close


@pytest.mark.parametrize("spacing", [13.1, 16.0, 19.7, 22.0])
@pytest.mark.parametrize("size_z", [38, 39, 40, 41])
def test_a_last_look_that_is_nearer_than_the_others_changes_no_score(size_z: int, spacing: float) -> None:
    zs = np.array(looks(size_z, 3))
    detections = track(19, 400, 500, reach=9)
    seen = detections[np.isin(detections[:, 0], zs)]
    needed = max(round(160 / (3 * spacing)), 1)
    (motor,) = link(seen, looked_at=zs, spacing=spacing)
    assert motor.score == pytest.approx(np.sort(seen[:, 5])[-needed:].sum() / needed)


def test_what_is_seen_for_a_third_of_the_asked_length_scores_a_third() -> None:
    short = track(100, 400, 500, best=0.9, sigma=1000, reach=2)
    (motor,) = link(short, rules=LinkSettings(evidence_angstrom=15 * SPACING))
    assert motor.score == pytest.approx(0.3, rel=1e-3)
    (motor,) = link(short, rules=LinkSettings(evidence_angstrom=5 * SPACING))
    assert motor.score == pytest.approx(0.9, rel=1e-3)


def test_doubled_boxes_on_a_slice_count_once() -> None:
    detections = track(100, 400, 500)
    beside = detections + np.array([0, 3, 3, 0, 0, -0.05])
    assert link(detections, beside) == link(detections)


def test_a_steady_track_beats_a_spurious_box_however_sure() -> None:
    steady = link(track(100, 400, 500, best=0.5, sigma=100))[0]
    spurious = link(track(100, 400, 500, best=0.99, reach=0), rules=LinkSettings(min_slices=1))[0]
    assert spurious.score < 0.25 < steady.score


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), st.integers(0, 11), st.floats(0, 1))
@settings(max_examples=60)
def test_more_evidence_never_lowers_the_score(scores: list[float], index: int, more: float) -> None:
    def score_of(values: list[float]) -> float:
        zs = np.arange(100, 100 + len(values))
        (motor,) = link(np.column_stack([zs, np.tile([400, 500, 128, 128], (len(zs), 1)), values]))
        return motor.score

    base = score_of(scores)
    index %= len(scores)
    raised = [*scores[:index], max(scores[index], more), *scores[index + 1 :]]
    assert 0 <= base <= score_of(raised) <= 1
    assert base <= score_of([*scores, more]) + 1e-12  # sums of more numbers round otherwise


def test_too_few_slices_drop_a_motor_unless_the_tomogram_has_no_more() -> None:
    box = track(0, 400, 500, reach=0)
    assert link(box) == []
    (motor,) = link(box, looked_at=[0])
    assert motor == pytest.approx(Motor(0, 400, 500, 128, 120, 0.9, 1))


def test_scores_of_zero_still_have_a_place() -> None:
    (motor,) = link(track(100, 400, 500, best=0))
    assert motor.z == pytest.approx(100)
    assert motor.score == 0


def test_nothing_found_gives_an_empty_typed_table() -> None:
    nothing = link_slabs(SLABS.empty_table(), MANIFEST.empty_table())
    assert nothing.schema.equals(MOTORS)
    assert nothing.num_rows == 0
    no_boxes = link_slabs(table(slabs_of(np.empty((0, 6)), range(20))), manifest("tomo_a"))
    assert no_boxes.equals(nothing)


def test_tomograms_are_linked_apart_and_ordered_by_id_then_score() -> None:
    rows = [
        slabs_of(np.concatenate([track(30, 100, 100, best=0.6), track(30, 300, 300)]), range(60), tomo_id)
        for tomo_id in ("tomo_b", "tomo_a")
    ]
    mixed = [row for pair in zip(*rows, strict=True) for row in pair]
    motors = link_slabs(table(mixed), manifest("tomo_a", "tomo_b", "tomo_unseen"))
    assert motors["tomo_id"].to_pylist() == ["tomo_a", "tomo_a", "tomo_b", "tomo_b"]
    assert motors["y"].to_pylist() == pytest.approx([300, 100, 300, 100])
    assert motors["voxel_spacing_angstrom"].to_pylist() == [SPACING] * 4


def test_an_unknown_spacing_is_assumed_but_not_claimed() -> None:
    detections = np.concatenate([track(30, 100, 100), track(30, 125, 100)])
    slabs = table(slabs_of(detections, range(60)))
    unknown = manifest("tomo_a", spacing=None)
    assert link_slabs(slabs, unknown).num_rows == 1  # 25 voxels of 13.3 angstrom are within the merge distance
    coarse = link_slabs(slabs, unknown, LinkSettings(assumed_spacing_angstrom=20))
    assert coarse.num_rows == 2
    assert coarse["voxel_spacing_angstrom"].to_pylist() == [None, None]


def test_slices_that_could_not_be_read_bridge_a_motor_and_become_failures() -> None:
    rows = slabs_of(track(30, 100, 100), range(60))
    for z, status, error in ((30, "corrupt", "premature end of JPEG"), (28, "missing", None)):
        rows[z // 12]["slices"][z % 12] |= {"status": status, "error": error, "detections": None}
    slabs = table(rows)
    assert link_slabs(slabs, manifest("tomo_a"))["n_slices"].to_pylist() == [11]
    failures = failed_slices(slabs, manifest("tomo_a"))
    assert failures.schema.equals(FAILURES)
    uri = "s3://b/tomo_a.mrc"
    assert failures.to_pylist() == [
        {"tomo_id": "tomo_a", "z": 28, "uri": uri, "error": "the slice is missing"},
        {"tomo_id": "tomo_a", "z": 30, "uri": uri, "error": "premature end of JPEG"},
    ]


def test_a_tomogram_with_too_few_good_slices_is_a_failure_itself() -> None:
    rows = slabs_of(track(30, 100, 100), range(60)) + slabs_of(track(30, 100, 100), range(60), "tomo_b")
    for z in range(31):
        rows[5 + z // 12]["slices"][z % 12] |= {"status": "missing", "detections": None}
    known = manifest("tomo_a", "tomo_b")
    [failure] = failed_tomograms(table(rows), known, good_share=0.5).to_pylist()
    assert (failure["tomo_id"], failure["z"]) == ("tomo_b", None)
    assert "only 29 of the 60 slices" in failure["error"]
    assert failed_tomograms(table(rows), known, good_share=29 / 60).num_rows == 0


def test_a_run_without_failures_has_an_empty_typed_table_of_them() -> None:
    failures = failed_slices(table(slabs_of(track(5, 1, 1), range(12))), manifest("tomo_a"))
    assert failures.equals(FAILURES.empty_table())


def test_unnested_slices_are_the_slabs_own() -> None:
    rows = [*slabs_of(track(30, 100, 100), range(60)), {"slab_id": "empty", "tomo_id": "tomo_b", "slices": []}]
    slabs = pa.concat_tables([table(rows[:3]), table(rows[3:])])  # two chunks
    slices = slices_of(slabs)
    assert slices.schema.equals(SLICES)
    expected = [
        {"slab_id": row["slab_id"], "tomo_id": row["tomo_id"], "z": cut["z"]} for row in rows for cut in row["slices"]
    ]
    assert slices.select(["slab_id", "tomo_id", "z"]).to_pylist() == expected
    found = detections_of(slices)
    assert found.slice_index.tolist() == list(range(24, 37))
    np.testing.assert_allclose(found.boxes, track(30, 100, 100)[:, 1:5])


def test_a_tomogram_that_the_manifest_does_not_know_is_named() -> None:
    slabs = table(slabs_of(track(30, 100, 100), range(60)))
    for use in (link_slabs, failed_slices, partial(failed_tomograms, good_share=0.5)):
        with pytest.raises(ManifestError, match=r"tomo_a; give the manifest"):
            use(slabs, manifest("tomo_b"))


def test_no_two_motors_are_nearer_than_the_merge_distance() -> None:
    rng = np.random.default_rng(3)
    zs = np.repeat(np.arange(60), 10)
    places = rng.uniform(0, 300, (600, 2))
    noise = np.column_stack([zs, places, np.full((600, 2), 100), rng.uniform(0.3, 1, 600)])
    motors = link(noise)
    assert len(motors) > 5
    for a, b in itertools.combinations(motors, 2):
        assert np.linalg.norm(np.subtract(a[:3], b[:3])) * SPACING >= SETTINGS.merge_distance_angstrom
    scores = [motor.score for motor in motors]
    assert scores == sorted(scores, reverse=True)
