"""Rows of a plan weigh little, whatever the tomograms and the network are like."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config_values import settings_from
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.slab_plan import SLAB_BYTES, first_look, plan_of
from motor_ray.slices.channels import channel_step, slice_bytes, with_neighbours
from motor_ray.tables import MANIFEST


def manifest_of(shape, spacing=13.1, count=1):
    sizes = dict(zip(("size_z", "size_y", "size_x"), shape, strict=True))
    rows = [{"tomo_id": f"tomo_{n}", "uri": f"{n}.mrc", "format": "mrc", **sizes} for n in range(count)]
    return pa.Table.from_pylist([row | {"voxel_spacing_angstrom": spacing} for row in rows], schema=MANIFEST)


def weight_of(slab, settings):
    """Bytes of all the frames that are made to look at a slab."""
    spacing = slab["voxel_spacing_angstrom"]
    read = with_neighbours(slab["zs"], slab["size_z"], channel_step(spacing, settings))
    return len(read) * slice_bytes((slab["size_y"], slab["size_x"]), spacing, settings)


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(64, 2000), st.integers(64, 2000)),
    spacing=st.floats(5, 30),
    frame=st.sampled_from([{}, {"size": 1440}, {"size": 96}, {"mode": "spacing"}]),
    model=st.sampled_from([{}, {"in_slices": 3}, {"in_slices": 3, "slice_step_angstrom": 40.0}]),
    detect=st.fixed_dictionaries({"exhaustive": st.booleans(), "tta": st.sampled_from(["off", "full"])}),
)
def test_a_row_weighs_ten_megabytes_at_most_unless_it_is_a_single_slice(shape, spacing, frame, model, detect):
    settings = settings_from({"frame": frame, "model": model, "detect": detect})
    for slab in pa.concat_tables(first_look(manifest_of(shape, spacing), settings)).to_pylist():
        assert weight_of(slab, settings) <= SLAB_BYTES or len(slab["zs"]) == 1


@pytest.mark.parametrize(
    ("groups", "slices"),
    [
        ({}, 19),
        ({"detect": {"tta": "full"}}, 9),
        ({"frame": {"size": 1440}}, 4),
        ({"model": {"in_slices": 3}}, 17),  # of adjacent slices nearly all channels are shared
        ({"model": {"in_slices": 3}, "detect": {"z_stride": 9}}, 6),
    ],
)
def test_slabs_are_shorter_where_slices_weigh_more(groups, slices):
    settings = settings_from({**groups, "detect": {"z_stride": 1, **groups.get("detect", {})}})
    [plan] = first_look(manifest_of((300, 960, 928)), settings)
    assert max(map(len, plan["zs"].to_pylist())) == slices


@pytest.mark.parametrize("groups", [{}, {"frame": {"mode": "spacing", "size": 64}}, {"model": {"in_slices": 3}}])
def test_what_a_row_is_thought_to_weigh_is_what_is_loaded(groups, tmp_path):
    settings = settings_from({"frame": {"size": 96}, "detect": {"tta": "full"}, **groups})
    simulate_archive(str(tmp_path), 1, 1, (20, 96, 96), voxel_spacing_angstrom=24.0, processes=1)
    manifest = make_manifest(str(tmp_path / "train"), settings.archive)
    [tomogram] = manifest.to_pylist()
    zs = [0, 7, 8, 19]
    [row] = plan_of([tomogram | {"voxel_spacing_angstrom": 24.0}], {tomogram["tomo_id"]: zs}, settings).to_pylist()
    loaded = LoadSlab(**loader_arguments(settings)).load(row)
    assert loaded["frames"].nbytes == weight_of(row, settings)


def test_slices_that_no_frames_can_be_made_of_are_planned_all_the_same():
    nowhere = manifest_of((40, 960, 928), spacing=None)
    plan = next(first_look(nowhere, settings_from({"frame": {"mode": "spacing"}, "detect": {"exhaustive": True}})))
    assert sum(map(len, plan["zs"].to_pylist())) == 40


def test_slab_ids_are_unique_and_the_same_each_time():
    every = settings_from({"detect": {"exhaustive": True}})
    first, again = (
        [
            slab
            for piece in first_look(manifest_of((30, 64, 64), count=3), every)
            for slab in piece["slab_id"].to_pylist()
        ]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == len(first) == 6
