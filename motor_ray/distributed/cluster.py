"""Where a job runs: the cluster it was submitted to, or a Ray of its own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray

from motor_ray.storage import filesystem

LOCAL_SLOTS = 6
"""CPU slots of a Ray on this machine, at least: reading, scoring, training and writing must each get one, or a laptop
with two cores would wait for ever. The operating system shares the cores."""


@contextmanager
def connected() -> Iterator[None]:
    """A running Ray: the one that is there, else the cluster of RAY_ADDRESS, else a local one meanwhile."""
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=max(LOCAL_SLOTS, cores()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """`uri` as Ray Data wants it: a pyarrow file system, and a path on it."""
    files, path = filesystem(uri)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path


def write_table(table: pa.Table, uri: str) -> None:
    """Write a small table to the parquet file `uri`."""
    files, path = arrow_filesystem(uri)
    pq.write_table(table, path, filesystem=files)


def read_table(uri: str) -> pa.Table:
    """A small table from the parquet file `uri`."""
    files, path = arrow_filesystem(uri)
    return pq.read_table(path, filesystem=files)
