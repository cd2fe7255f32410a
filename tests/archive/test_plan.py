import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.plan import make_plan
from motor_ray.tables import MANIFEST, PLAN


def manifest_of(sizes: list[int]) -> pa.Table:
    rows = [
        {"tomo_id": f"tomo_{n}", "uri": f"{n}.mrc", "format": "mrc", "size_z": z, "size_y": 64, "size_x": 64}
        for n, z in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


@given(st.lists(st.integers(1, 60), max_size=5), st.integers(1, 20))
def test_every_slice_is_planned_exactly_once_in_slabs_that_fit_memory(sizes, slab_slices):
    plan = make_plan(manifest_of(sizes), slab_slices)
    planned = [(row["tomo_id"], z) for row in plan.to_pylist() for z in row["zs"]]
    assert sorted(planned) == sorted((f"tomo_{n}", z) for n, size in enumerate(sizes) for z in range(size))
    assert all(len(zs) <= slab_slices for zs in plan["zs"].to_pylist())
    assert plan.schema == PLAN


def test_slab_ids_are_unique_and_the_same_each_time():
    first, again = (make_plan(manifest_of([30, 30, 7]), 12)["slab_id"].to_pylist() for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first) == 7
