from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.plan import slab_of
from motor_ray.config import settings_from
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.samples import (
    CLEARANCE_ANGSTROM,
    FrameStore,
    batches,
    pad_to_multiple,
    sample_plan,
    with_labelled_spacing,
)
from motor_ray.errors import LabelsError
from motor_ray.tables import PLAN


@pytest.fixture(scope="module")
def manifest(archive, settings):
    return with_labelled_spacing(make_manifest(archive.uri, settings.archive), archive.labels)


@pytest.fixture(scope="module")
def store(manifest, archive, settings):
    plan = sample_plan(manifest, archive.labels, settings)
    store = FrameStore([LoadSlab(settings)(plan)], archive.labels, settings)
    yield store
    store.close()


def test_samples_show_a_motor_or_are_clearly_away_from_any(manifest, archive, settings):
    shown = empty = 0
    for row in sample_plan(manifest, archive.labels, settings).to_pylist():
        [z] = row["zs"]
        distances = np.abs(archive.labels.motors_of(row["tomo_id"])[:, 0] - z) * row["voxel_spacing_angstrom"]
        near = distances.size and distances.min() <= settings.targets.reach_angstrom
        assert near or (distances > CLEARANCE_ANGSTROM).all()
        shown, empty = shown + bool(near), empty + (not near)
    assert 0 < empty <= shown
    assert shown <= settings.train.slices_per_motor * len(archive.labels.motors)


def test_every_motor_is_on_some_sample(manifest, archive, settings):
    sampled = {(row["tomo_id"], row["zs"][0]) for row in sample_plan(manifest, archive.labels, settings).to_pylist()}
    for tomo_id, z in archive.labels.motors[["tomo_id", "z"]].itertuples(index=False):
        reach = int(settings.targets.reach_angstrom / 24.0)
        assert any((tomo_id, round(z) + step) in sampled for step in range(-reach, reach + 1))


def test_the_same_labels_and_settings_choose_the_same_samples(manifest, archive, settings):
    assert sample_plan(manifest, archive.labels, settings) == sample_plan(manifest, archive.labels, settings)


@given(st.integers(1, 40), st.integers(1, 9))
def test_padding_makes_an_even_split_and_loses_nothing(rows, workers):
    plan = pa.table({"slab_id": [f"{row}" for row in range(rows)]})
    padded = pad_to_multiple(plan, workers)
    assert len(padded) % workers == 0
    assert 0 <= len(padded) - rows < workers
    assert set(padded["slab_id"].to_pylist()) == set(plan["slab_id"].to_pylist())


def test_labels_of_other_tomograms_are_refused(manifest, archive):
    others = archive.labels.tomograms.assign(tomo_id=lambda table: "other_" + table["tomo_id"])
    with pytest.raises(LabelsError, match="none of the 12 tomograms of the archive is labelled"):
        with_labelled_spacing(manifest, Labels(others, archive.labels.motors))


def test_a_shape_that_is_not_the_files_is_refused(manifest, archive):
    taller = archive.labels.tomograms.assign(size_z=21)
    with pytest.raises(LabelsError, match=r"the files hold \[20, 96, 96\] voxels \(z, y, x\), the labels say \[21, "):
        with_labelled_spacing(manifest, Labels(taller, archive.labels.motors))


def test_stored_boxes_stand_where_the_labels_say(store, archive, settings):
    assert any(len(store[place].boxes) for place in range(len(store)))
    for place in range(len(store)):
        tomo_id, _, _ = store[place].slice_id.split("/")
        motors = archive.labels.motors_of(tomo_id)
        for y, x, height, width in store[place].boxes:  # frames here are the slices themselves
            assert np.abs(motors[:, 1:] - (y, x)).max(axis=1).min() < 1e-6
            assert height == width == settings.targets.box_pixels


def test_a_batch_is_the_same_in_whatever_order_and_company_its_samples_come(store, settings):
    epoch, order = 3, list(range(len(store)))
    whole: dict[str, torch.Tensor] = {}
    for batch in batches(store, order, settings, epoch):
        whole |= zip(batch.slice_ids, batch.images, strict=True)
    for batch in batches(store, order[::-1][:7], settings, epoch):
        for name, image in zip(batch.slice_ids, batch.images, strict=True):
            assert (image == whole[name]).all()


def test_epochs_differ_and_validation_is_not_augmented(store, settings):
    [first], [second], [plain] = ([*batches(store, [0], settings, epoch)] for epoch in (0, 1, None))
    assert (first.images != second.images).any()
    assert (plain.images[0].numpy() == store[0].frame).all()


def test_batches_come_in_the_order_asked_for_and_each_once(store, settings):
    order = [5, 2, 9, 0, 7, 3]
    seen = [name for batch in batches(store, order, settings, None) for name in batch.slice_ids]
    assert seen == [store[place].slice_id for place in order]
    assert seen == [sorted(store.ids)[place] for place in order]


def test_slices_that_cannot_be_read_are_left_out_and_reported(damaged, archive, settings):
    manifest = with_labelled_spacing(make_manifest(damaged, settings.archive), archive.labels)
    first = manifest.to_pylist()[0]
    plan = pa.Table.from_pylist([slab_of(first, [z]) for z in (2, 3, 4)], schema=PLAN)
    store = FrameStore([LoadSlab(settings)(plan)], archive.labels, settings)
    assert [(row["tomo_id"], row["z"]) for row in store.unread] == [(first["tomo_id"], 3), (first["tomo_id"], 4)]
    assert len(store) == 1
    store.close()


def test_three_neighbouring_slices_are_kept_together(manifest, archive, settings):
    three = settings_from(settings.model_dump() | {"model": settings.model.model_dump() | {"in_slices": 3}})
    plan = pa.Table.from_pylist([slab_of(manifest.to_pylist()[0], [z]) for z in (0, 1, 2)], schema=PLAN)
    store = FrameStore([LoadSlab(three)(plan)], archive.labels, three)
    frames = [store[place].frame for place in range(3)]
    assert all(frame.shape == (3, 96, 96) for frame in frames)
    assert (frames[1][2] == frames[2][1]).all()
    assert (frames[0][0] == frames[0][1]).all()  # at the end of the tomogram the slice stands for its neighbour
    store.close()


def test_a_closed_store_leaves_nothing_on_the_disk(manifest, archive, settings):
    store = FrameStore([LoadSlab(settings)(sample_plan(manifest, archive.labels, settings))], archive.labels, settings)
    folder = Path(store.folder.name)
    assert (folder / "frames").stat().st_size == len(store) * 96 * 96
    store.close()
    assert not folder.exists()
