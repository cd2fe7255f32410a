"""The pipeline on Ray Data, from a file of slabs to files of results, each slab once.

    plan (parquet) -> LoadSlab (CPU actors) -> ScoreFrames (GPU actors) -> slabs/*.parquet

A row is a slab from the first file to the last, so that Ray Data can note its id when it is written
(ray.data.checkpoint), and the same plan, when it is run again, is read without what is noted. Rows are a few megabytes
and few wait between the operators, so memory does not grow with the archive.
"""

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.exceptions import ExecutionTimeoutError

from motor_ray.distributed.cluster import object_store_limit, root_cause
from motor_ray.distributed.preflight import LOADER_BYTES, Pools
from motor_ray.errors import UnfinishedError
from motor_ray.storage import arrow_filesystem, open_dataset
from motor_ray.tables import PLAN

SLABS_PER_FILE = 64
"""Rows are gathered to so many before they are written: a file per slab would be a million small files."""

FILES = 8
"""A small archive is written in so many files all the same: rows that are not written are lost with a killed run."""

LOADER_CPUS = 0.1
"""What a loader asks of Ray, although it is counted as a whole CPU when actors are planned: when a node is lost, its
loaders move in with the others instead of taking the slots without which nothing goes on (ray issue 44687)."""

NO_PROGRESS_SECONDS = 600.0
"""After so long without any result the run ends and says so; Ray would wait for half an hour."""

INIT_DEATHS = 2
"""Actors in a row that may die while they start, from being killed for instance, before the run is given up."""


class Stage(NamedTuple):
    """A class whose instances turn tables into tables, and its constructor's arguments, which are small."""

    operator: type
    arguments: dict[str, Any]


class Places(NamedTuple):
    """URIs of what a run of the pipeline reads and writes; in ``notes`` Ray Data keeps the ids of slabs written."""

    plan: str
    slabs: str
    notes: str


class PlanFile(Datasource):
    """What is left of a plan, for one task to read; Ray's own reader of parquet files sends another one ahead."""

    def __init__(self, plan: str, done: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        # Not read from the notes by the task: run again, because a node was lost, it has to give the same rows.
        self._done = ray.put(pa.array(done, pa.string()))

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown, and small."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One, whatever is asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=(self._plan,))
        return [ReadTask(partial(_read_plan, self._plan, self._done), unknown, schema=PLAN)]


def _read_plan(plan: str, done: "ray.ObjectRef[pa.Array]") -> Iterator[pa.Table]:
    return rows_left(plan, ray.get(done))


def rows_left(plan: str, done: pa.Array) -> Iterator[pa.Table]:
    """The rows of a plan but for the slabs that are `done`, in pieces."""
    for batch in open_dataset(plan, PLAN).to_batches():
        table = pa.Table.from_batches([batch])
        yield table.filter(pc.invert(pc.is_in(table["slab_id"], done)))


class SettledNotes(CheckpointManager):
    """Tells Ray that there is nothing to leave out, for `rows_left` has done so, and `settle` tidied up.

    Ray would do it with an actor that holds all ids, and hand on an empty block for each slab that is done: with
    one row to a block that takes minutes for tens of thousands of them.
    """

    def load_checkpoint(self, *_: Any, **__: Any) -> tuple[None, int]:
        """Nothing."""
        return None, 0


def slabs_per_file(plan: str) -> int:
    """How many slabs of a plan are written together."""
    rows: int = open_dataset(plan, PLAN).count_rows()
    return min(max(rows // FILES, 1), SLABS_PER_FILE)


def run_pipeline(
    places: Places, done: Collection[str], loader: Stage, scorer: Stage, pools: Pools, calls: int
) -> float:
    """Score every slab of the plan whose id is not among those `done`; returns for how many seconds loaders were busy.

    Loaders work on `calls` slabs at a time. Raises UnfinishedError, with the innermost reason, if it breaks; what was
    written stays, and the same call goes on from there.
    """
    files, folder = arrow_filesystem(places.slabs)
    with _ray_data(places.notes), object_store_limit(pools.bytes_ahead):
        slabs = _build(PlanFile(places.plan, done), loader, scorer, pools, calls)
        try:
            slabs.write_parquet(folder, filesystem=files, min_rows_per_file=slabs_per_file(places.plan))
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
            raise UnfinishedError(f"{places.slabs}: detection stopped: {root_cause(error)}") from error
        return _busy_seconds(slabs, loader.operator)


def _build(plan: PlanFile, loader: Stage, scorer: Stage, pools: Pools, calls: int) -> Dataset:
    """The dataset of SLABS, lazily."""
    frames: Dataset = ray.data.read_datasource(plan, override_num_blocks=1).map_batches(
        loader.operator,
        fn_constructor_kwargs=loader.arguments,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=LOADER_CPUS,
        memory=LOADER_BYTES,
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=pools.loaders,
            initial_size=pools.loaders,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
            max_tasks_in_flight_per_actor=calls + 1,
        ),
    )
    slabs: Dataset = frames.map_batches(
        scorer.operator,
        fn_constructor_kwargs=scorer.arguments,
        batch_size=1,
        batch_format="pyarrow",
        memory=pools.scorer_bytes,
        # Loaders that came first may have taken a share of the last CPU beside a GPU, which would then stay idle.
        num_cpus=0 if pools.gpus_per_scorer else 1,
        num_gpus=pools.gpus_per_scorer,
        # One slab is scored at a time, but the next is at hand when it ends.
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=pools.scorers,
            initial_size=pools.scorers,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
    )
    return slabs


@contextlib.contextmanager
def _ray_data(notes: str) -> Iterator[None]:
    """Ray Data as this pipeline needs it, with its notes of what is done in `notes`; and as before when it ends."""
    context = DataContext.get_current()
    files, path = arrow_filesystem(notes)
    checkpoint = CheckpointConfig(
        id_column="slab_id",
        checkpoint_path=path,
        override_filesystem=files,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=SettledNotes,
    )
    wanted = {
        "checkpoint_config": checkpoint,
        # One row to a block, whatever a row weighs: Ray hands on a block only when all of it is done. A repartition
        # would do the same in tasks of its own, and start processes for them.
        "target_max_block_size": 1,
        "max_consecutive_actor_init_deaths": INIT_DEATHS,
        "memory_usage_poll_interval_s": None,  # it takes a thread for each slab, and preflight knows what they need
        "execution_no_progress_timeout_s": NO_PROGRESS_SECONDS,
        "raise_original_map_exception": True,  # or the reason would be lost on the way
    }
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _busy_seconds(slabs: Dataset, operator: type) -> float:
    """Seconds that all calls of `operator` took together, from Ray Data's own statistics."""
    for one in _operators(slabs.get_stats_summary()):
        if f"({operator.__name__})" in one.operator_name and one.function_body_time:
            return float(one.function_body_time.sum)
    return 0.0


def _operators(summary: Any) -> Iterator[Any]:
    """The statistics of every operator of a pipeline; Ray nests each in that of the next."""
    yield from summary.operators_stats
    for parent in summary.parents:
        yield from _operators(parent)
