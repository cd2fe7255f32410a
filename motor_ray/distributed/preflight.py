"""Whether a cluster can ever run a detection, and with how many actors of each kind: asked before anything starts.

Ray places actors first and waits, without a word and for ever, if what is left does not hold the tasks that feed them
(ray issue 44687).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray

from motor_ray.config import DetectSettings
from motor_ray.distributed.cluster import holds, possible_nodes
from motor_ray.errors import RunError
from motor_ray.slab_plan import SLAB_BYTES

TASKS = 3
"""CPU slots for what comes and goes: reading the plan, and writing slabs, two files at a time."""

LOADER_BYTES, SCORER_BYTES = 600 * 10**6, 1500 * 10**6
"""Memory set aside for an actor: libraries and the slabs in its hands; and the network."""

NETWORK_BYTES = 400 * 10**6
"""What each further network takes: a ResNet-101 of 180 MB, and a copy of it while it is made ready."""

LOADER = {"CPU": 1, "memory": LOADER_BYTES}
"""What a loader is counted as."""

SLABS_AHEAD = 8
"""Slabs per actor that may wait between loading and scoring. Left alone, Ray fills a third of the memory with them:
98 slabs before a slow scorer, where this leaves 8."""

LOADERS_PER_GPU = 16
"""At most, if the CPUs are there: a slice takes 6 ms of a core to prepare, and a GPU perhaps half a millisecond."""

SPARE = 1.25
"""Loaders beyond what measured rates ask for, since some slices take longer than others."""

log = logging.getLogger(__name__)


class Room(NamedTuple):
    """What a cluster has, or may grow to have, in all, and on each node."""

    cpus: int
    gpus: int
    memory: int
    object_store: int
    nodes: Sequence[Mapping[str, float]] = ()
    """Resources of each node by Ray's names. Without any all is taken to be on one."""

    @property
    def resources(self) -> dict[str, float]:
        """All that there is, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}


class Pools(NamedTuple):
    """How many actors may run, at most, what each is given, and how many slabs may wait between them.

    Pools begin with these numbers; Ray Data takes idle actors away, down to one, and brings them back.
    """

    scorers: int
    loaders: int
    gpus_per_scorer: int
    bytes_ahead: int
    scorer_bytes: int = SCORER_BYTES

    def balanced(self, load_seconds: float, score_seconds: float) -> "Pools":
        """With just the loaders that keep the scorers busy, given how long each takes for a slice.

        That a loader has several slabs in hand is left out: scorers must not wait, and idle loaders cost little.
        """
        enough = math.ceil(SPARE * self.scorers * load_seconds / max(score_seconds, 1e-9))
        return self._replace(loaders=max(min(enough, self.loaders), 1))


def room() -> Room:
    """What the connected cluster has now, or what its autoscaler may add, whichever is more."""
    now = ray.cluster_resources()  # type: ignore[no-untyped-call]
    later = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    names = ("CPU", "GPU", "memory", "object_store_memory")
    cpus, gpus, memory, object_store = (int(max(now.get(name, 0), later.get(name, 0))) for name in names)
    return Room(cpus, gpus, memory, object_store, possible_nodes())


def scorer_bytes(networks: int) -> int:
    """Memory set aside for a scorer of so many networks."""
    return SCORER_BYTES + (networks - 1) * NETWORK_BYTES


def plan_pools(room: Room, settings: DetectSettings, networks: int = 1) -> Pools:
    """As many actors as were asked for, or as are apt, as far as there is room for them.

    Each scorer holds so many `networks`. Raises RunError, saying what is missing, if there is not even room for one of
    each and the tasks that feed them.
    """
    each = scorer_bytes(networks)
    _require(room, each)
    free_cpus = room.cpus - TASKS
    scorers = settings.scorers or max(room.gpus, 1)
    fitting = min(free_cpus - 1, room.gpus or scorers, _most_scorers(room, each))
    if scorers > fitting:
        log.info("room for %d of %d scorers", fitting, scorers)
        scorers = fitting
    loaders = settings.loaders or (LOADERS_PER_GPU * scorers if room.gpus else scorers)
    fitting = min(free_cpus - scorers, (room.memory - scorers * each) // LOADER_BYTES)
    if settings.loaders and loaders > fitting:
        log.info("room for %d of %d loaders", fitting, loaders)
    loaders = min(loaders, fitting)
    ahead = min(SLAB_BYTES * SLABS_AHEAD * (scorers + loaders), room.object_store // 2)
    return Pools(scorers, loaders, min(room.gpus, 1), ahead, each)


def local_slots(settings: DetectSettings) -> int:
    """CPU slots of a Ray on this machine in which what was asked for has room; the cores are shared."""
    return (settings.scorers or 1) + (settings.loaders or 1) + TASKS + 1


def _require(room: Room, each: int) -> None:
    """Raises RunError unless there is room for a scorer, a loader and tasks."""
    memory = LOADER_BYTES + each
    needed = [
        (room.cpus, TASKS + 2, "CPUs", 1, "add nodes, or start Ray with more (ray start --num-cpus)"),
        (room.memory, memory, "GB of memory", 1e9, "add nodes, or state what there is (ray start --memory)"),
        (room.object_store, 4 * SLAB_BYTES, "MB of object store", 1e6, "give Ray more (--object-store-memory)"),
    ]
    for there, least, what, unit, remedy in needed:
        if there < least:
            raise RunError(
                f"the cluster has {there / unit:.3g} {what}; one scorer, one loader and the tasks that feed them take "
                f"{least / unit:.3g}; {remedy}"
            )
    if not _most_scorers(room, each):
        scorer = _said(_scorer(room, each))
        raise RunError(
            f"the cluster has enough in all, but not on the same node: one needs {scorer} for a scorer, and it or "
            f"another {_said(LOADER)} for a loader; add larger nodes, or state what there is (ray start --memory)"
        )


def _said(taken: Mapping[str, float]) -> str:
    """What an actor takes, in words."""
    units = {"CPU": (1, "CPU"), "GPU": (1, "GPU"), "memory": (1e9, "GB of memory")}
    return ", ".join(f"{taken[name] / unit:g} {what}" for name, (unit, what) in units.items() if taken.get(name))


def _scorer(room: Room, each: int) -> dict[str, float]:
    """What a scorer takes of one node; beside a GPU it is content with what is left of the CPUs."""
    return {"CPU": 0 if room.gpus else 1, "GPU": min(room.gpus, 1), "memory": each}


def _most_scorers(room: Room, each: int) -> int:
    """How many scorers the nodes hold if one of these holds a loader, too."""
    nodes, scorer = room.nodes or [room.resources], _scorer(room, each)
    most = holds(nodes, scorer)
    taken = [holds([node], scorer) - holds([_less(node, LOADER)], scorer) for node in nodes if holds([node], LOADER)]
    return max(most - min(taken), 0) if taken else 0


def _less(node: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    """What is left of a node."""
    return {name: number - taken.get(name, 0) for name, number in node.items()}
