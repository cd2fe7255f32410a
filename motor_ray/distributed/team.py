"""What training workers take of a cluster, and whether it can ever hold them: asked before anything starts."""

import logging

from motor_ray.config import RunSettings
from motor_ray.distributed.cluster import alive, gpus, holds
from motor_ray.distributed.preflight import local_slots, plan_pools, room
from motor_ray.errors import RunError
from motor_ray.machine import cores

log = logging.getLogger(__name__)

READERS = 2
"""CPUs for reading slices, and for what comes and goes."""


def worker_resources(settings: RunSettings) -> dict[str, float]:
    """What a worker takes, by Ray's names: CPUs, a GPU if there are any, and what the settings name."""
    train = settings.train
    return {"CPU": train.worker_cpus, **({"GPU": 1} if gpus() else {}), **train.worker_resources}


def slots_for(workers: int, settings: RunSettings) -> int:
    """CPUs that training takes in all, with looks at tomograms beside it."""
    looks = local_slots(settings.detect) if settings.train.tomograms == "during" else 0
    return workers * settings.train.worker_cpus + READERS + looks


def team_of_this_machine(workers: tuple[int, int], settings: RunSettings) -> tuple[int, int]:
    """The fewest and the most workers for a Ray of our own, whose CPUs are only said to be there."""
    fewest, most = workers
    apt = max(cores() // settings.train.worker_cpus, 1)
    if fewest > apt:
        log.warning("%d workers of %d CPUs share this machine's %d", fewest, settings.train.worker_cpus, cores())
    return fewest, max(fewest, min(most, apt))


def require_team(workers: tuple[int, int], settings: RunSettings) -> None:
    """Raises RunError if the cluster can never hold the fewest workers, and reading: Ray would wait for ever."""
    train, worker = settings.train, worker_resources(settings)
    nodes = [node["Resources"] for node in alive()]
    there = holds(nodes, worker)
    spare = sum(node.get("CPU", 0) for node in nodes) - workers[0] * train.worker_cpus
    if train.batch_norm == "sync" and not gpus():
        raise RunError("--train.batch-norm sync: needs GPUs, and the cluster has none; take frozen")
    if workers[0] <= there and spare >= READERS:
        return require_room_for_looks(workers, settings)
    asked = ", ".join(f"{number:g} {name}" for name, number in worker.items())
    fit = max(min(there, int((spare + workers[0] * train.worker_cpus - READERS) // train.worker_cpus)), 0)
    raise RunError(
        f"--workers {workers[0]}: a worker takes {asked}, reading slices {READERS} CPUs; of that the cluster's "
        f"{len(nodes)} nodes hold {fit} workers; " + (f"ask for --workers {fit}, or add nodes" if fit else "add nodes")
    )


def require_room_for_looks(workers: tuple[int, int], settings: RunSettings) -> None:
    """Raises RunError if whole tomograms can never be looked at when the settings want it."""
    train = settings.train
    if train.tomograms == "no":
        return
    cluster = room()
    beside = train.tomograms == "during"
    if beside and cluster.gpus and cluster.gpus <= workers[1]:
        raise RunError(
            f"--train.tomograms during: needs a GPU beside those of {workers[1]} workers, the cluster has "
            f"{cluster.gpus}; ask for fewer workers, or take --train.tomograms end"
        )
    taken = workers[1] * train.worker_cpus if beside else 0
    try:
        plan_pools(cluster._replace(cpus=cluster.cpus - taken), settings.detect)
    except RunError as error:
        raise RunError(f"--train.tomograms {train.tomograms}: {error}; or take --train.tomograms no") from None
