"""Where a job runs: the cluster it was submitted to, or a Ray of its own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data  # sets up the logger that is quietened below

LOCAL_SLOTS = 6
"""CPU slots of a Ray on this machine, at least: reading, scoring, training and writing must each get one, or a laptop
with two cores would wait for ever. The operating system shares the cores."""

QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray logs an error for every actor of Ray Data (ray issue 53727)
    "RAY_worker_maximum_startup_concurrency": str(LOCAL_SLOTS),  # or Ray warns that there are more slots than cores
}
"""What keeps a local Ray from writing between the lines of our own progress."""


@contextmanager
def connected() -> Iterator[None]:
    """A running Ray: the one that is there, else the cluster of RAY_ADDRESS, else a local one meanwhile."""
    if ray.is_initialized():
        yield
        return
    _hush_ray_data()
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
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


def _hush_ray_data() -> None:
    """Leave the terminal to our own progress; Ray Data's log file keeps everything."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
