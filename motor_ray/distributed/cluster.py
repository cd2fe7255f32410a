"""Where a job runs: the cluster it was submitted to, or a Ray of its own on this machine."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.data  # sets up the logger that is quietened below
from ray.exceptions import RayError

from motor_ray.errors import RunError
from motor_ray.machine import cores

LOCAL_SLOTS = 6
"""CPU slots of a Ray on this machine, at least: reading, scoring, training and writing must each get one, or a laptop
with two cores would wait for ever. The operating system shares the cores."""

MOST_NODES = 1000
"""Where the autoscaler has no limit."""

QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray logs an error for every actor of Ray Data (ray issue 53727)
    "RAY_worker_maximum_startup_concurrency": str(LOCAL_SLOTS),  # or Ray warns that there are more slots than cores
}
"""What keeps a local Ray from writing between the lines of our own progress."""


@contextmanager
def connected(slots: int = LOCAL_SLOTS) -> Iterator[None]:
    """A running Ray: the one that is there, else the cluster of RAY_ADDRESS, else one of `slots` CPUs here, meanwhile.

    Raises RunError if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    _set_up_ray_data()
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            where = os.environ["RAY_ADDRESS"]
            raise RunError(f"RAY_ADDRESS {where}: no Ray cluster answers ({' '.join(str(error).split())})") from None
    else:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=max(LOCAL_SLOTS, slots, cores()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def object_store_limit(limit: int) -> Iterator[None]:
    """Ray Data pipelines that are built in the block hold at most so many bytes at a time between their operators."""
    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=limit)
    try:
        yield
    finally:
        options.resource_limits = before


def alive() -> list[dict[str, Any]]:
    """What Ray says of each node that is there."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def nodes() -> int:
    """Nodes of the cluster that have CPUs for work."""
    return max(len([node for node in alive() if node["Resources"].get("CPU", 0) > 0]), 1)


def possible_nodes() -> list[dict[str, float]]:
    """Resources, by Ray's names, of each node that is there or that the autoscaler may add."""
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else []
    added = [
        {"memory": math.inf} | dict(group.resources)  # not every launcher says how much memory its nodes have
        for group in groups
        for _ in range(group.max_count if group.max_count >= 0 else MOST_NODES)
    ]
    return [node["Resources"] for node in alive()] + added


def holds(nodes: Iterable[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """How many workers that take these resources fit on nodes with such."""
    asked = {name: number for name, number in worker.items() if number > 0}
    return sum(int(min(node.get(name, 0) // number for name, number in asked.items())) for node in nodes)


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def _set_up_ray_data() -> None:
    """Leave the terminal to our own progress, while Ray Data's log file keeps everything; and fail rather than hang."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # An actor that cannot start says why; by default Ray tries again for ever.
    context.actor_init_retry_on_errors = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)


def root_cause(error: BaseException) -> str:
    """The innermost reason of a failure that travelled through Ray, in one line."""
    worker_failures = getattr(error, "worker_failures", None)
    if worker_failures:
        return root_cause(next(iter(worker_failures.values())))
    inner = getattr(error, "cause", None) or error.__cause__
    if isinstance(inner, BaseException) and str(inner):
        return root_cause(inner)
    if isinstance(error, ray.exceptions.ActorDiedError):
        # All that is left of what the constructor raised is its traceback, as text.
        return str(error).strip().splitlines()[-1].split("Error: ", 1)[-1]
    return " ".join(str(error).split()) or type(error).__name__
