import pyarrow as pa
import pytest

from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.plan import slab_of
from motor_ray.config_values import settings_from
from motor_ray.distributed.frame_store import FrameStore, fill, is_filled, require_room, store_name
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.samples import with_labelled_spacing
from motor_ray.errors import RunError
from motor_ray.tables import PLAN


def plan_of(uri, labels, settings, zs):
    first = with_labelled_spacing(make_manifest(uri, settings.archive), labels).to_pylist()[0]
    return pa.Table.from_pylist([slab_of(first, [z]) for z in zs], schema=PLAN)


def filled(folder, plan, settings, show=print):
    fill(folder, (LoadSlab(settings)(plan.slice(start, 2)) for start in range(0, len(plan), 2)), settings, show)
    return FrameStore(folder, settings)


def test_frames_are_what_was_loaded_under_the_name_of_their_slice(archive, settings, tmp_path):
    plan = plan_of(archive.uri, archive.labels, settings, [4, 7, 2])
    told: list[int] = []
    store = filled(tmp_path, plan, settings, told.append)
    for row in plan.to_pylist():
        expected = LoadSlab(settings).load(row)["frames"]
        assert (store.frame(f"{row['slab_id']}/0") == expected[:, 0]).all()
    assert told == [2, 3]
    assert store.unread == []
    assert (tmp_path / "frames").stat().st_size == 3 * 96 * 96


def test_slices_that_cannot_be_read_are_remembered_with_the_reason(damaged, archive, settings, tmp_path):
    store = filled(tmp_path, plan_of(damaged, archive.labels, settings, [2, 3, 4]), settings)
    assert [row["z"] for row in store.unread] == [3, 4]
    assert all(row["error"] for row in store.unread)
    [tomo_id] = {row["tomo_id"] for row in store.unread}
    assert store.frame(f"{tomo_id}/0003/0") is None


def test_three_neighbouring_slices_are_kept_together(archive, settings, tmp_path):
    three = settings_from(settings.model_dump() | {"model": settings.model.model_dump() | {"in_slices": 3}})
    plan = plan_of(archive.uri, archive.labels, settings, [0, 1, 2])
    store = filled(tmp_path, plan, three)
    frames = [store.frame(f"{row['slab_id']}/0") for row in plan.to_pylist()]
    assert all(frame.shape == (3, 96, 96) for frame in frames)
    assert (frames[1][2] == frames[2][1]).all()
    assert (frames[0][0] == frames[0][1]).all()  # at the end of the tomogram the slice stands for its neighbour


def test_a_folder_counts_as_filled_only_when_all_of_it_was_written(archive, settings, tmp_path):
    plan = plan_of(archive.uri, archive.labels, settings, [0, 1])

    def broken():
        yield LoadSlab(settings)(plan.slice(0, 1))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fill(tmp_path, broken(), settings, print)
    assert not is_filled(tmp_path)
    filled(tmp_path, plan, settings)
    assert is_filled(tmp_path)


def test_only_settings_that_change_pixels_change_the_name_of_a_store(archive, settings):
    plan = plan_of(archive.uri, archive.labels, settings, [0, 1])

    def name(group, **values):
        changed = {group: getattr(settings, group).model_dump() | values}
        return store_name(plan, settings_from(settings.model_dump() | changed))

    same = store_name(plan, settings)
    assert name("train", learning_rate=1e-3) == name("augment", flips=True) == name("targets", sigma=3.0) == same
    others = [name("preprocess", clahe=False), name("frame", size=128), name("model", in_slices=3)]
    others += [name("model", in_slices=3, slice_step_angstrom=step) for step in (30.0, 60.0)]
    assert len({same, *others, store_name(plan.slice(1), settings)}) == 7


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(archive, settings, tmp_path):
    plan = plan_of(archive.uri, archive.labels, settings, [0, 1])
    require_room(tmp_path, plan, settings)
    huge = pa.concat_tables([plan] * 500)
    wide = settings_from(settings.model_dump() | {"frame": {"mode": "spacing", "spacing_angstrom": 0.25, "size": 4096}})
    with pytest.raises(RunError, match=r"decoded frames take [\d.]+ GB, there are .* GB to spare; name a folder"):
        require_room(tmp_path, huge, wide)
    assert not list(tmp_path.iterdir())


def test_an_empty_store_has_no_frames(settings, tmp_path):
    fill(tmp_path, [], settings, print)
    assert FrameStore(tmp_path, settings).frame("tomo/0001/0") is None
