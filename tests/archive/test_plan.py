import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.plan import LAYER_SLICES, looks, make_plan, slabs, z_stride
from motor_ray.config_values import settings_from
from motor_ray.tables import MANIFEST, PLAN

USUAL = settings_from({})


def manifest_of(sizes: list[int], spacing: float | None = 13.1) -> pa.Table:
    rows = [
        {"tomo_id": f"tomo_{n}", "uri": f"{n}.mrc", "format": "mrc", "size_z": z, "size_y": 64, "size_x": 64}
        for n, z in enumerate(sizes)
    ]
    return pa.Table.from_pylist([row | {"voxel_spacing_angstrom": spacing} for row in rows], schema=MANIFEST)


def rows_of(manifest):
    return manifest.to_pylist()


@given(st.lists(st.integers(1, 60), max_size=5), st.integers(1, 20), st.integers(1, 20))
def test_every_slice_is_planned_exactly_once_in_slabs_that_fit_memory(sizes, slab_slices, fitting):
    everything = {f"tomo_{n}": range(size) for n, size in enumerate(sizes)}
    plan = make_plan(rows_of(manifest_of(sizes)), everything, slab_slices, dict.fromkeys(everything, fitting))
    planned = [(row["tomo_id"], z) for row in plan.to_pylist() for z in row["zs"]]
    assert sorted(planned) == sorted((f"tomo_{n}", z) for n, size in enumerate(sizes) for z in range(size))
    assert all(len(zs) <= min(slab_slices, fitting) for zs in plan["zs"].to_pylist())
    assert plan.schema == PLAN


@given(
    zs=st.sets(st.integers(0, 400), max_size=200).map(sorted),
    depth=st.integers(1, 300),
    slab_slices=st.integers(1, 40),
    fitting=st.integers(1, 64),
)
def test_slices_of_one_chunk_layer_are_read_together_unless_they_are_too_many(zs, depth, slab_slices, fitting):
    cut = list(slabs(zs, depth, slab_slices, fitting))
    assert [z for slab in cut for z in slab] == zs
    assert all(len(slab) <= min(max(slab_slices, LAYER_SLICES), fitting) for slab in cut)
    slabs_of_layer: dict[int, int] = {}
    for slab in cut:
        for layer in {z // depth for z in slab}:
            slabs_of_layer[layer] = slabs_of_layer.get(layer, 0) + 1
    longest = min(LAYER_SLICES if depth > 1 else slab_slices, fitting)
    for layer, times in slabs_of_layer.items():
        slices = sum(z // depth == layer for z in zs)
        assert times == 1 or slices > longest - min(slab_slices, fitting)


@given(size=st.integers(1, 500), stride=st.integers(1, 40))
def test_no_slice_is_farther_than_half_the_stride_from_a_look(size, stride):
    zs = looks(size, stride)
    assert zs == sorted(set(zs))
    assert all(0 <= z < size for z in zs)
    assert all(min(abs(z - look) for look in zs) <= stride / 2 for z in range(size))


@pytest.mark.parametrize(("spacing", "stride"), [(6.5, 18), (13.1, 9), (15.6, 7), (19.7, 6), (None, 6), (500.0, 1)])
def test_looks_are_so_close_that_every_motor_shows_on_one(spacing, stride):
    assert z_stride(spacing, USUAL) == stride
    reach = USUAL.targets.reach_angstrom
    assert stride == 1 or stride * (spacing or 20.0) / 2 <= reach


def test_the_stride_is_as_asked_and_exhaustive_wins():
    assert z_stride(13.1, settings_from({"detect": {"z_stride": 4}})) == 4
    assert z_stride(13.1, settings_from({"detect": {"z_stride": 4, "exhaustive": True}})) == 1
