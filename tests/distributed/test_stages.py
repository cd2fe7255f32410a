from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.manifest import make_manifest
from motor_ray.config_values import settings_from
from motor_ray.detector.inference import FEATURES
from motor_ray.detector.looks import Look
from motor_ray.distributed.frame_store import FrameStore, fill
from motor_ray.distributed.frames import FRAMES, frames_table, pixels_of
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.scoring import ScoreFrames, images_of, merge_frames, slice_of
from motor_ray.errors import OutageError
from motor_ray.slab_plan import first_look
from motor_ray.slices.channels import channel_step, channels_of, with_neighbours
from motor_ray.slices.frame import frames_of
from motor_ray.tables import PLAN, SLABS


def changed(settings, **groups):
    values = settings.model_dump(mode="json")
    return settings_from({name: group | groups.get(name, {}) for name, group in values.items()})


@pytest.fixture(scope="module")
def plan(archive, settings):
    return next(first_look(make_manifest(archive.uri, settings.archive), settings)).slice(0, 3)


def test_rows_keep_their_ids_and_types_from_plan_to_slabs(plan, settings, checkpoint):
    frames = LoadSlab(settings)(plan)
    slabs = ScoreFrames(settings, checkpoint)(frames)
    assert (frames.schema, slabs.schema) == (FRAMES, SLABS)
    assert frames["slab_id"] == slabs["slab_id"] == plan["slab_id"]
    for planned, slab in zip(plan["zs"].to_pylist(), slabs["slices"].to_pylist(), strict=True):
        assert [one["z"] for one in slab] == planned
        assert all(one["status"] == "ok" and 0 <= one["presence"] <= 1 for one in slab)
        assert any(one["detections"] for one in slab)


def test_features_are_kept_with_each_detection_and_change_nothing_else(plan, settings, checkpoint):
    seeing = changed(settings, detect={"features": True})
    frames = LoadSlab(settings)(plan)
    plain, seen = (ScoreFrames(one, checkpoint)(frames).to_pylist() for one in (settings, seeing))
    pairs = [
        (a, b)
        for one, two in zip(plain, seen, strict=True)
        for here, there in zip(one["slices"], two["slices"], strict=True)
        for a, b in zip(here["detections"], there["detections"], strict=True)
    ]
    assert pairs
    assert all(a["features"] is None and len(b["features"]) == 2 * 2 * FEATURES for a, b in pairs)
    assert all(a == b | {"features": None} for a, b in pairs)
    assert len({b["features"] for _, b in pairs}) > len(pairs) / 2


def test_a_slab_without_any_good_slice_still_has_its_row(plan, settings, checkpoint, tmp_path):
    nowhere = plan.set_column(2, "uri", pa.array([f"{tmp_path}/slice_{{z:04d}}.jpg"] * len(plan)))
    slabs = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(nowhere)).to_pylist()
    assert [slab["slab_id"] for slab in slabs] == plan["slab_id"].to_pylist()
    slices = [one for slab in slabs for one in slab["slices"]]
    assert {one["status"] for one in slices} == {"missing"}
    assert all(one["error"] and one["detections"] == [] and one["presence"] is None for one in slices)


def test_missing_and_corrupt_slices_have_a_status_and_the_others_their_own_detections(damaged, settings, checkpoint):
    plan = next(first_look(make_manifest(damaged, settings.archive), settings)).slice(0, 1)
    [slab] = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(plan)).to_pylist()
    status = {one["z"]: one["status"] for one in slab["slices"]}
    assert status == {0: "ok", 1: "ok", 2: "ok", 3: "missing", 4: "corrupt"}
    alone = plan.set_column(plan.schema.get_field_index("zs"), "zs", pa.array([[2]], pa.list_(pa.int32())))
    [lone] = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(alone)).to_pylist()
    own, expected = lone["slices"][0]["detections"], slab["slices"][2]["detections"]
    assert len(own) == len(expected) > 1
    for one, other in zip(own, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)  # how many frames share a call may change the last bit of a score


def test_an_unreadable_tomogram_is_a_status_of_each_of_its_slices(settings, tmp_path):
    (tmp_path / "broken.mrc").write_bytes(b"not a tomogram")
    row = {"slab_id": "a", "tomo_id": "a", "uri": str(tmp_path / "broken.mrc"), "format": "mrc", "zs": [0, 1]}
    loaded = LoadSlab(settings).load(row | {"size_z": 2, "size_y": 9, "size_x": 9, "voxel_spacing_angstrom": None})
    assert [entry["status"] for entry in loaded["loaded"]] == ["corrupt", "corrupt"]
    assert "broken.mrc" in loaded["loaded"][0]["error"]


def test_three_channels_are_the_slice_between_its_neighbours_also_at_the_ends(plan, settings):
    three = changed(settings, model={"in_slices": 3, "slice_step": 2})
    row = plan.to_pylist()[0] | {"zs": [0, 1, 2]}
    loaded = LoadSlab(three).load(row)
    assert with_neighbours([0, 1, 2], 20, step=2) == [0, 1, 2, 3, 4]
    # frame n holds slice n here, so the places are slice numbers
    assert np.reshape(loaded["channels"], (3, 3)).tolist() == [[0, 0, 2], [0, 1, 3], [0, 2, 4]]


@pytest.mark.parametrize(("spacing", "step"), [(6.5, 6), (13.1, 3), (19.7, 2), (39.0, 1), (300.0, 1), (None, 4)])
def test_a_step_in_angstrom_is_the_nearest_number_of_slices_and_at_least_one(settings, spacing, step):
    asked = changed(
        settings, model={"in_slices": 3, "slice_step_angstrom": 40.0}, link={"assumed_spacing_angstrom": 10}
    )
    assert channel_step(spacing, asked) == step
    assert channel_step(spacing, changed(settings, model={"in_slices": 3, "slice_step": 2})) == 2
    assert channel_step(spacing, settings) == 0


@given(st.sets(st.integers(0, 29), min_size=1, max_size=8), st.integers(30, 40), st.sampled_from([0, 1, 2, 7, 100]))
def test_what_is_read_of_a_slab_is_its_channels_and_nothing_else(zs, size_z, step):
    read = with_neighbours(zs, size_z, step)
    assert read == sorted(set(read))
    assert set(read) == {channel for z in zs for channel in channels_of(z, size_z, step)}
    assert 0 <= read[0] <= read[-1] < size_z
    for z in zs:
        below, itself, above = channels_of(z, size_z, step) if step else [z] * 3
        assert itself == z
        assert below == (z - step if z >= step else 0)
        assert above == (z + step if z + step < size_z else size_z - 1)


@pytest.mark.parametrize("spacing", [24.0, 8.0, None])
def test_training_and_detection_see_the_same_channels(plan, settings, spacing, tmp_path):
    asked = changed(settings, model={"in_slices": 3, "slice_step_angstrom": 50.0})
    [tomogram] = plan.slice(0, 1).to_pylist()
    tomogram["voxel_spacing_angstrom"], size_z = spacing, tomogram["size_z"]
    zs = [0, 1, 3, 9, 18, 19]
    slab = LoadSlab(asked).load(tomogram | {"zs": zs})
    detected = images_of(slab, slab["frames"], 1, asked)
    singles = [tomogram | {"slab_id": str(z), "zs": [z]} for z in zs]
    fill(tmp_path, [LoadSlab(asked)(pa.Table.from_pylist(singles, schema=PLAN))], asked, print)
    store = FrameStore(tmp_path, asked)
    every = LoadSlab(settings).load(tomogram | {"zs": list(range(size_z))})["frames"][:, 0]
    step = {24.0: 2, 8.0: 6, None: 4}[spacing]
    for image, z in zip(detected, zs, strict=True):
        assert (image == store.frame(f"{z}/0")).all()
        assert (image == every[[max(z - step, 0), z, min(z + step, size_z - 1)]]).all()


@pytest.mark.parametrize("in_slices", [1, 3])
def test_for_full_augmentation_each_image_comes_with_clahe_switched(plan, settings, in_slices):
    full = changed(settings, detect={"tta": "full"}, model={"in_slices": in_slices})
    off = changed(full, detect={"tta": "off"})
    plain = changed(off, preprocess={"clahe": False})
    tiled = {"frame": {"size": 96, "mode": "spacing", "spacing_angstrom": 16.0}}
    row = plan.to_pylist()[0] | {"zs": [0, 1, 5], "voxel_spacing_angstrom": 24.0}
    for tiles, way in ((1, {}), (4, tiled)):
        with_both, as_ever, without = (changed(one, **way) for one in (full, off, plain))
        both = LoadSlab(**loader_arguments(with_both)).load(row)
        images = images_of(both, both["frames"].ravel(), tiles, with_both)
        assert images.shape == (3 * tiles, 2 * in_slices, 96, 96)
        for half, alone in ((images[:, :in_slices], as_ever), (images[:, in_slices:], without)):
            loaded = LoadSlab(**loader_arguments(alone)).load(row)
            np.testing.assert_array_equal(half, images_of(loaded, loaded["frames"].ravel(), tiles, alone))


def test_training_reads_no_more_than_it_looks_at(plan, settings):
    row = plan.to_pylist()[0]
    full = LoadSlab(changed(settings, detect={"tta": "full"})).load(row)
    np.testing.assert_array_equal(full["frames"], LoadSlab(settings).load(row)["frames"])


def test_a_missing_neighbour_is_replaced_by_the_slice_itself(damaged, settings):
    three = changed(settings, model={"in_slices": 3})
    plan = next(first_look(make_manifest(damaged, settings.archive), settings))
    loaded = LoadSlab(three).load(plan.to_pylist()[0] | {"zs": [2]})
    assert loaded["channels"] == [0, 1, 1]


@pytest.fixture
def placement(settings):
    tiled = changed(settings, frame={"mode": "spacing", "size": 64, "spacing_angstrom": 24.0}).frame
    frames = frames_of((96, 96), 24.0, tiled)
    assert len(frames) == 4
    return frames


def looks_at(placement, motors):
    """What four frames say of motors (y, x, score) in slice voxels that each frame sees whole."""
    boxes = [frame.boxes_to_frame([[y, x, 20, 20] for y, x, _ in motors]) for frame in placement]
    scores = np.array([score for *_, score in motors])
    return [Look(own, scores - 0.01 * number, 0.9, True) for number, own in enumerate(boxes)]


def test_several_frames_of_a_slice_give_one_list_in_which_each_motor_stands_once(placement):
    looks = looks_at(placement, [(48, 48, 0.9), (60, 48, 0.8)])  # nearer than their boxes are wide
    boxes, scores, _ = merge_frames(looks, placement, radius=8.0)
    np.testing.assert_allclose(boxes[:, :2], [[48, 48], [60, 48]], atol=1e-6)
    np.testing.assert_allclose(scores, [0.9, 0.8])


def test_of_several_frames_each_detection_keeps_the_features_of_its_own(placement):
    looks = looks_at(placement, [(48, 48, 0.9), (60, 48, 0.8)])
    features = [np.array([[number, 0], [number, 1]], np.float16) for number in range(4)]
    seen = slice_of([look._replace(features=own) for look, own in zip(looks, features, strict=True)], placement, 8.0, 9)
    told = [np.frombuffer(one["features"], np.float16).tolist() for one in seen["detections"]]
    assert told == [[0, 0], [0, 1]]
    assert "features" not in slice_of(looks, placement, 8.0, 9)["detections"][0]


def test_two_boxes_of_one_frame_are_two_motors_however_near(placement):
    look = Look(np.array([[30.0, 30, 20, 20], [33, 30, 20, 20]]), np.array([0.9, 0.8]), 0.9, True)
    boxes, *_ = merge_frames([look], placement[:1], radius=8.0)
    assert len(boxes) == 2


def test_an_answer_that_is_not_finite_is_an_error_of_its_slice_not_an_empty_one(placement):
    looks = [look._replace(is_sound=number != 2) for number, look in enumerate(looks_at(placement, [(48, 48, 0.9)]))]
    found = slice_of(looks, placement, radius=8.0, most=5)
    assert (found["status"], found["detections"]) == ("corrupt", [])
    assert "not finite" in found["error"]


def test_the_best_detections_are_kept(placement):
    looks = looks_at(placement, [(48, 48, 0.5), (80, 80, 0.9), (20, 20, 0.7)])
    kept = slice_of(looks, placement, radius=8.0, most=2)["detections"]
    assert [round(one["score"], 2) for one in kept] == [0.9, 0.7]


def test_slices_seen_in_several_frames_are_scored_too(plan, settings, checkpoint):
    tiled = changed(settings, frame={"mode": "spacing", "size": 64, "spacing_angstrom": 24.0})
    spaced = plan.set_column(
        plan.schema.get_field_index("voxel_spacing_angstrom"), "voxel_spacing_angstrom", pa.array([24.0] * len(plan))
    )
    [first, *_] = ScoreFrames(tiled, checkpoint)(LoadSlab(tiled)(spaced)).to_pylist()
    for one in first["slices"]:
        assert all(-1 <= found["y"] <= 97 and -1 <= found["x"] <= 97 for found in one["detections"])
        scores = [found["score"] for found in one["detections"]]
        assert scores == sorted(scores, reverse=True)


def test_what_was_scored_is_reported_by_tomogram(plan, settings, checkpoint):
    told: list[tuple[str, int]] = []
    scorer = ScoreFrames(settings, checkpoint, report=lambda tomo_id, slices, _: told.append((tomo_id, slices)))
    scorer(LoadSlab(settings)(plan))
    assert told == [(row["tomo_id"], len(row["zs"])) for row in plan.to_pylist()]


def test_a_note_on_repaired_grey_levels_travels_to_the_slab(plan, settings, checkpoint, tmp_path):
    wrapped = plan.to_pylist()[0]
    folder = tmp_path / "wrapped"
    folder.mkdir()
    for z in wrapped["zs"]:
        image = np.asarray(cv2.imread(wrapped["uri"].format(z=z), cv2.IMREAD_GRAYSCALE), np.uint8)
        cv2.imwrite(str(folder / f"slice_{z:04d}.png"), image ^ np.uint8(0x80))
    row = wrapped | {"uri": str(folder / "slice_{z:04d}.png")}
    [slab] = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(pa.Table.from_pylist([row], PLAN))).to_pylist()
    assert all("wrapped" in one["note"] for one in slab["slices"])
    as_they_are = changed(settings, archive={"repair": False})
    assert all(entry["note"] is None for entry in LoadSlab(as_they_are).load(row)["loaded"])


def test_an_outage_is_not_a_fault_of_the_slices(plan, settings, monkeypatch):
    def silent(*_: object) -> None:
        raise OutageError("no answer")

    monkeypatch.setattr("motor_ray.distributed.loading.open_tomogram", silent)
    with pytest.raises(OutageError):
        LoadSlab(settings)(plan)


def test_pixels_travel_without_a_copy_and_unchanged(plan, settings):
    loader = LoadSlab(settings)
    row = loader.load(plan.to_pylist()[0])
    table = frames_table([row])
    assert pixels_of(table)[0].ctypes.data == row["frames"].ctypes.data
    nothing = frames_table([row | {"frames": np.empty(0, np.uint8)}])
    together = pa.concat_tables([table, nothing, table])
    for some in (together, together.combine_chunks()):
        first, empty, last = pixels_of(some)
        assert len(empty) == 0
        np.testing.assert_array_equal(first, row["frames"].ravel())
        np.testing.assert_array_equal(first, last)
        np.testing.assert_array_equal(pixels_of(some.slice(2))[0], last)


def test_calls_that_overlap_share_one_device_and_one_that_fails_spoils_no_other(plan, settings, checkpoint):
    frames, scorer = LoadSlab(settings)(plan), ScoreFrames(settings, checkpoint)
    alone, at_work, most = scorer(frames), [], []
    look = scorer.look

    def watched(images):
        at_work.append(1)
        most.append(len(at_work))
        try:
            if len(most) == 3:
                raise ValueError("the device is gone")
            return look(images)
        finally:
            at_work.pop()

    scorer.look = watched
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(scorer, frames.slice(n, 1)) for n in range(len(plan)) for _ in range(3)]
        ended = [call.exception() for call in calls]
    assert max(most) == 1
    assert [str(error) for error in ended if error] == ["the device is gone"]
    for number, call in enumerate(calls):
        assert ended[number] or call.result() == alone.slice(number // 3, 1)
