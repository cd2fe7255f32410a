import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.config_values import settings_from
from motor_ray.distributed.frames import pixels_of
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.samples import (
    CLEARANCE_ANGSTROM,
    Samples,
    batches,
    deals,
    epoch_order,
    readable,
    sample_plan,
    with_labelled_spacing,
)
from motor_ray.errors import LabelsError, RunError


@pytest.fixture(scope="module")
def manifest(archive, settings):
    return with_labelled_spacing(make_manifest(archive.uri, settings.archive), archive.labels)


class Loaded:
    """Frames in memory, of slices of one frame each."""

    def __init__(self, plan, settings):
        self.frames = {}
        for row, pixels in zip(plan.to_pylist(), pixels_of(LoadSlab(settings)(plan)), strict=True):
            self.frames[f"{row['slab_id']}/0"] = pixels.reshape(1, 96, 96) if len(pixels) else None

    def frame(self, slice_id):
        return self.frames[slice_id]


@pytest.fixture(scope="module")
def plan(manifest, archive, settings):
    return sample_plan(manifest, archive.labels, settings, 420)


@pytest.fixture(scope="module")
def store(plan, archive, settings):
    return Samples(plan, archive.labels, settings, Loaded(plan, settings))


def test_samples_show_a_motor_or_are_clearly_away_from_any(manifest, archive, settings):
    shown = empty = 0
    for row in sample_plan(manifest, archive.labels, settings, 420).to_pylist():
        [z] = row["zs"]
        distances = np.abs(archive.labels.motors_of(row["tomo_id"])[:, 0] - z) * row["voxel_spacing_angstrom"]
        near = distances.size and distances.min() <= settings.targets.reach_angstrom
        assert near or (distances > CLEARANCE_ANGSTROM).all()
        shown, empty = shown + bool(near), empty + (not near)
    assert 0 < empty <= shown
    assert shown <= settings.train.slices_per_motor * len(archive.labels.motors)


def test_every_motor_is_on_some_sample(manifest, archive, settings):
    sampled = {
        (row["tomo_id"], row["zs"][0]) for row in sample_plan(manifest, archive.labels, settings, 420).to_pylist()
    }
    for tomo_id, z in archive.labels.motors[["tomo_id", "z"]].itertuples(index=False):
        reach = int(settings.targets.reach_angstrom / 24.0)
        assert any((tomo_id, round(z) + step) in sampled for step in range(-reach, reach + 1))


def test_the_same_labels_and_settings_choose_the_same_samples(manifest, archive, settings):
    assert sample_plan(manifest, archive.labels, settings, 420) == sample_plan(manifest, archive.labels, settings, 420)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_slices_without_a_motor_come_from_tomograms_without_one_in_the_asked_share(manifest, archive, settings, share):
    """In tomograms that are tall enough for slices far from any motor."""
    tall = manifest.set_column(manifest.schema.get_field_index("size_z"), "size_z", pa.array([200] * len(manifest)))
    asked = settings_from(settings.model_dump() | {"train": settings.train.model_dump() | {"empty_share": share}})
    rows = sample_plan(tall, archive.labels, asked, 420).to_pylist()
    negatives = [row for row in rows if not shows(row, archive.labels, settings)]
    of_empty = sum(not len(archive.labels.motors_of(row["tomo_id"])) for row in negatives)
    assert of_empty == round(share * len(negatives))


def shows(row, labels, settings):
    distances = np.abs(labels.motors_of(row["tomo_id"])[:, 0] - row["zs"][0]) * row["voxel_spacing_angstrom"]
    return bool((distances <= settings.targets.reach_angstrom).any())


SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))


@given(SHAPES)
def test_every_sample_is_dealt_in_an_epoch_and_all_workers_get_as_many(shape):
    samples, workers, batch, accumulate = shape
    order = epoch_order(samples, 420, 3)
    hands = [list(deals(order, 0, rank, workers, batch, accumulate)) for rank in range(workers)]
    for step in zip(*hands, strict=True):
        assert len({tuple(map(len, deal.batches)) for deal in step}) == 1
        assert max(map(len, step[0].batches)) <= batch
    dealt = [place for hand in hands for deal in hand for group in deal.batches for place in group]
    assert set(dealt) == set(range(samples))
    assert len(dealt) - samples < workers


@given(SHAPES, st.data())
def test_a_step_is_made_of_the_same_samples_whatever_the_number_of_workers(shape, data):
    """And an epoch can be gone on with by another number of workers."""
    samples, workers, batch, accumulate = shape
    order = epoch_order(samples, 420, 0)
    position = data.draw(st.integers(0, samples - 1))
    several = [next(deals(order, position, rank, workers, batch, accumulate)) for rank in range(workers)]
    alone = next(deals(order, position, 0, 1, batch * workers, accumulate))
    assert {deal.position for deal in several} == {alone.position}
    seen = {place for deal in several for group in deal.batches for place in group}
    expected = {place for group in alone.batches for place in group}
    assert seen >= expected == set(order[position : alone.position])
    assert len(seen - expected) < workers


def test_epochs_come_in_different_orders_and_the_same_one_in_the_same():
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0) != epoch_order(50, 1, 1)


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
        for y, x, height, width, peak in store[place].boxes:  # frames here are the slices themselves
            assert np.abs(motors[:, 1:] - (y, x)).max(axis=1).min() < 1e-6
            assert height == width == settings.targets.box_pixels
            assert peak == 1


def by_fours(order):
    return [order[start : start + 4] for start in range(0, len(order), 4)]


def test_a_batch_is_the_same_in_whatever_order_and_company_its_samples_come(store, settings):
    epoch, order = 3, list(range(len(store)))
    whole: dict[str, torch.Tensor] = {}
    for batch in batches(store, by_fours(order), settings, epoch):
        whole |= zip(batch.slice_ids, batch.images, strict=True)
    for batch in batches(store, by_fours(order[::-1][:7]), settings, epoch, threads=3):
        for name, image in zip(batch.slice_ids, batch.images, strict=True):
            assert (image == whole[name]).all()


def test_epochs_differ_and_validation_is_not_augmented(store, settings):
    [first], [second], [plain] = ([*batches(store, [[0]], settings, epoch)] for epoch in (0, 1, None))
    assert (first.images != second.images).any()
    assert (plain.images[0].numpy() == store[0].frame).all()


def test_batches_come_in_the_order_asked_for_and_each_once(store, settings):
    order = [5, 2, 9, 0, 7, 3]
    seen = [name for batch in batches(store, by_fours(order), settings, None) for name in batch.slice_ids]
    assert seen == [store[place].slice_id for place in order]
    assert [store[place].slice_id for place in range(len(store))] == sorted(
        store[place].slice_id for place in range(len(store))
    )


def test_a_slice_that_cannot_be_read_is_replaced_by_the_next(plan, archive, settings):
    whole = Loaded(plan, settings)
    first, second = sorted(whole.frames)[:2]
    whole.frames[first] = None
    samples = Samples(plan, archive.labels, settings, whole)
    assert samples[0] is None
    assert readable(samples, 0).slice_id == readable(samples, 1).slice_id == second
    [batch] = batches(samples, [[0, 1]], settings, 0)
    assert batch.slice_ids == [second, second]


def test_a_plan_of_which_nothing_can_be_read_is_refused(plan, archive, settings):
    nothing = Loaded(plan, settings)
    nothing.frames = dict.fromkeys(nothing.frames)
    samples = Samples(plan, archive.labels, settings, nothing)
    with pytest.raises(RunError, match=f"none of {len(plan)} slices can be read"):
        list(batches(samples, [[0]], settings, 0))


def test_targets_fade_with_the_distance_from_the_centre(plan, archive, settings):
    fading = settings_from(settings.model_dump() | {"targets": settings.targets.model_dump() | {"fade_angstrom": 40.0}})
    samples = Samples(plan, archive.labels, fading, Loaded(plan, settings))
    seen = 0
    for sample, row in zip(samples, sorted(plan.to_pylist(), key=lambda row: f"{row['slab_id']}/0"), strict=True):
        motors = archive.labels.motors_of(row["tomo_id"])
        assert sample
        for y, x, _, _, peak in sample.boxes:
            [motor] = [motor for motor in motors if np.allclose(motor[1:], (y, x))]
            assert peak == pytest.approx(np.exp(-(((motor[0] - row["zs"][0]) * 24.0) ** 2) / (2 * 40.0**2)))
            seen += peak < 0.9
    assert seen


def test_slices_near_something_doubtful_are_not_learned_from(manifest, archive, settings):
    """Neither as showing a motor nor as showing none; other tomograms keep theirs."""
    [tomogram, *_] = [name for name, own in archive.labels.motors.groupby("tomo_id") if len(own) == 1]
    tall = manifest.set_column(manifest.schema.get_field_index("size_z"), "size_z", pa.array([200] * len(manifest)))
    [[z, y, x]] = archive.labels.motors_of(tomogram)
    unsure = pd.DataFrame([(tomogram, 120.0, y, x), (tomogram, z, y + 30, x)], columns=["tomo_id", "z", "y", "x"])
    all_negatives = settings_from(
        settings.model_dump() | {"train": settings.train.model_dump() | {"negatives_per_positive": 1000}}
    )

    def slices(labels, *, of):
        rows = sample_plan(tall, labels, all_negatives, 420).to_pylist()
        return {(row["tomo_id"], row["zs"][0]) for row in rows if (row["tomo_id"] == tomogram) == of}

    doubted = Labels(archive.labels.tomograms, archive.labels.motors, doubtful=unsure)
    before, after = slices(archive.labels, of=True), slices(doubted, of=True)
    assert after < before
    assert not any(abs(slice_z - z) * 24.0 <= settings.targets.reach_angstrom for _, slice_z in after)
    assert not any(abs(slice_z - 120) * 24.0 <= CLEARANCE_ANGSTROM for _, slice_z in after)
    assert slices(doubted, of=False) == slices(archive.labels, of=False)
