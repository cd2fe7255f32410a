"""What Ray Train starts on each training worker: decoded frames onto the node's disk, then training until it ends.

Every collective call here is made by all workers, the same number of times.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray.data
import ray.train
import ray.train.collective
import torch
from ray.data import ActorPoolStrategy

from motor_ray.archive.labels import Part, read_labels
from motor_ray.config import RunSettings
from motor_ray.distributed.collectives import AgreedError, gathered
from motor_ray.distributed.frame_store import FrameStore, fill, is_filled, require_room, store_name
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.progress import Board
from motor_ray.distributed.samples import Samples
from motor_ray.distributed.training_loop import TrainingLoop
from motor_ray.errors import MotorRayError, OutageError, RunError
from motor_ray.storage import join, read_table, write_table
from motor_ray.tables import FAILURES

ROWS_AT_A_TIME = 8
"""Slices that are loaded, and that a worker takes from Ray Data, at a time: a few megabytes."""

PARTS: tuple[Part, ...] = ("train", "validation")


class Job(NamedTuple):
    """What every worker is told."""

    name: str
    run_uri: str
    settings: RunSettings
    frames: str
    """What the run's folders of decoded frames, on the nodes' disks, are called."""

    board: Board


def train_worker(config: dict[str, Any]) -> None:
    """Train together with the other workers until done, or no longer better, or there is a reason to give up."""
    guarded(Job(**config), run)


def guarded(job: Job, work: Callable[[Job], None]) -> None:
    """Do a worker's part of the run, and tell the board why if it cannot be done."""
    torch.set_num_threads(job.settings.train.worker_cpus)
    if job.board.read().reason:
        return  # Ray tries again after any error, but it would only happen again
    try:
        work(job)
    except OutageError:
        raise
    except AgreedError as error:
        job.board.give_up(str(error))
    except MotorRayError as error:
        job.board.give_up(str(error))
        raise  # the other workers know nothing of it, and would wait for this one for ever


def run(job: Job) -> None:
    """One worker's part of the training of a detector."""
    plans, store = stored(job)
    labels = read_labels(join(job.run_uri, "labels.csv"))
    samples, held_out = (Samples(plan, labels, job.settings, store) for plan in plans)
    TrainingLoop(job.name, job.run_uri, job.settings, samples, held_out, job.board).run()


def stored(job: Job) -> tuple[list[pa.Table], FrameStore]:
    """The plans of the run's PARTS, and their frames on this node's disk; what cannot be read is written down."""
    plans = [read_table(join(job.run_uri, f"plan_{part}.parquet")) for part in PARTS]
    store = node_frames(job, pa.concat_tables(plans))
    # What one node could not read no worker takes: they must agree about the samples.
    unread = {row["slab_id"]: row for row in gathered(store.unread)}
    store.leave_out(unread)
    if ray.train.get_context().get_world_rank() == 0:
        rows = [unread[slab_id] for slab_id in sorted(unread)]
        write_table(pa.Table.from_pylist(rows, schema=FAILURES), join(job.run_uri, "failures.parquet"))
    return plans, store


def node_frames(job: Job, plan: pa.Table) -> FrameStore:
    """The frames of a plan of single slices on this node's disk, where one of its workers writes them if need be.

    Raises AgreedError if a node's disk is too small.
    """
    context = ray.train.get_context()
    folder = frames_below(job.settings) / f"{job.frames}-{store_name(plan, job.settings)}"
    problem = None
    if context.get_local_rank() == 0:
        try:
            with locked(folder):
                if not is_filled(folder):
                    require_room(folder, plan, job.settings)
                    fill(folder, tables_of(plan, job.settings), job.settings, teller(job, len(plan)))
        except RunError as error:
            problem = f"node {context.get_node_rank()}: {error}"
    ray.train.collective.barrier()  # which unlike torch's does not lose patience with a large archive
    if problems := [one for one in gathered([problem]) if one]:
        raise AgreedError(problems[0])
    return FrameStore(folder, job.settings)


def frames_below(settings: RunSettings) -> Path:
    """The folder for decoded frames on this node: that of the settings, else one of this user's for what may go."""
    return Path(settings.train.cache or Path(tempfile.gettempdir(), f"motor-ray-frames-{os.getuid()}"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, to ourselves: trials on one node may want the same frames."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror}); name another folder with --train.cache") from None
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tables_of(plan: pa.Table, settings: RunSettings) -> Iterator[pa.Table]:
    """The FRAMES of a plan, through the same LoadSlab as detection.

    A node that is about to be taken away gets no new actors; there the slices are read in this process.
    """
    blocks = [plan.slice(start, ROWS_AT_A_TIME) for start in range(0, len(plan), ROWS_AT_A_TIME)]
    frames = ray.data.from_arrow(blocks).map_batches(
        LoadSlab,
        fn_constructor_kwargs={"settings": settings},
        batch_size=ROWS_AT_A_TIME,
        batch_format="pyarrow",
        num_cpus=0,  # workers that come and go may hold all CPUs; reading must begin all the same
        compute=ActorPoolStrategy(min_size=1, max_size=settings.detect.loaders or 2),
    )
    tables = iter(frames.iter_batches(batch_size=ROWS_AT_A_TIME, batch_format="pyarrow"))
    try:
        first = next(tables)
    except ray.exceptions.ActorUnschedulableError:
        yield from map(LoadSlab(settings), blocks)
    else:
        yield first
        yield from tables


def teller(job: Job, slices: int) -> Any:
    """What is told how many slices have been read; only one node speaks of it."""
    speaks = ray.train.get_context().get_world_rank() == 0
    return lambda read: job.board.show(0, f"reading slices, {read:,} of {slices:,}") if speaks else None
