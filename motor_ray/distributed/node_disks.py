"""Folders on the disks of the cluster's nodes."""

import shutil

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from motor_ray.config import RunSettings
from motor_ray.distributed.cluster import alive
from motor_ray.distributed.worker import frames_below


def clear_frames(name: str, settings: RunSettings) -> None:
    """Remove the decoded frames of that name from every node; a node that is lost meanwhile keeps them."""
    clear = ray.remote(num_cpus=0, max_retries=0)(_clear)
    there = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in alive())
    tasks = [clear.options(scheduling_strategy=one).remote(name, settings) for one in there]
    ray.wait(tasks, num_returns=len(tasks))


def _clear(name: str, settings: RunSettings) -> None:
    for folder in frames_below(settings).glob(f"{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)
