from itertools import chain

import pyarrow as pa
import pytest

from motor_ray.distributed.pipeline import FILES, SLABS_PER_FILE, rows_left, slabs_per_file
from motor_ray.storage import write_table
from motor_ray.tables import PLAN

FIELDS = dict.fromkeys(PLAN.names)


def plan_at(folder, slabs: int) -> str:
    rows = [FIELDS | {"slab_id": f"t:{n}", "zs": [n]} for n in range(slabs)]
    write_table(pa.Table.from_pylist(rows, PLAN), str(folder / "plan.parquet"))
    return str(folder / "plan.parquet")


@pytest.mark.parametrize("done", [set(), {"t:3"}, {"t:0", "t:9", "another:1"}, {f"t:{n}" for n in range(10)}])
def test_what_is_done_is_left_out_of_a_plan_and_nothing_else(tmp_path, done):
    pieces = list(rows_left(plan_at(tmp_path, 10), pa.array(done, pa.string())))
    assert [piece.schema for piece in pieces] == [PLAN] * len(pieces)
    left = list(chain.from_iterable(piece["slab_id"].to_pylist() for piece in pieces))
    assert left == [f"t:{n}" for n in range(10) if f"t:{n}" not in done]


@pytest.mark.parametrize("slabs", [1, FILES - 1, FILES, 100, SLABS_PER_FILE * FILES, 10_000])
def test_a_kill_costs_no_more_than_an_eighth_of_a_small_archive_nor_than_one_file_of_a_large_one(tmp_path, slabs):
    together = slabs_per_file(plan_at(tmp_path, slabs))
    assert 1 <= together <= max(slabs // FILES, 1)
    assert together == min(max(slabs // FILES, 1), SLABS_PER_FILE)
