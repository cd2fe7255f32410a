"""Killed in the middle, and then the same tables as of a run that nothing happened to.

Each case has a seed that draws when, what, and how often is killed. Nothing dies but what the tests themselves started.
"""

import os
import random
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.distributed.detections import (
    SECONDS_TO_END,
    TOMOGRAMS,
    Driver,
    Task,
    Undisturbed,
    far_enough,
    in_bucket,
    simulated_task,
    struck,
    undisturbed_run,
)
from tests.distributed.killers import (
    LOADER,
    POLL_SECONDS,
    SCORER,
    WRITER,
    WRITING_SECONDS,
    Process,
    below,
    kill,
    left_of,
    raylet_of,
    titled,
    until,
    workers_below,
)
from tests.fault_proxy import faulty
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NODE = {"num_cpus": 5, "memory": 6 * 10**9, "object_store_memory": 100 * 10**6, "include_dashboard": False}
WHERE = ["of a cluster", "with a Ray of its own"]
LAST_FILES = 8
"""Of the files of a run, those that come too fast one after the other to be sure of a blow between them."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return simulated_task(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of one node with room for everything; tests add others."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(task: Task, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = undisturbed_run(task, str(tmp_path_factory.mktemp("undisturbed") / "out"), RAY_ADDRESS=cluster.address)
    counts = run.said["counts"]
    assert run.files >= 4
    assert (counts["corrupt"], counts["missing"], counts["failures"]) == (1, 1, 3)
    assert counts["planned"] > TOMOGRAMS * 10
    assert counts["motors"] > 0
    return run


@pytest.fixture
def idle(cluster: Cluster) -> Cluster:
    """The cluster, when those who worked for an earlier driver have ended."""
    workers = titled(below(raylet_of(cluster.head_node)), SCORER, LOADER, WRITER)
    assert not left_of(workers, SECONDS_TO_END)
    return cluster


def cases(*axes: Iterable[Any], quick: Collection[Any] = ()) -> list[Any]:
    """All combinations, of which the default suite runs the `quick` ones only."""
    return [pytest.param(*one, marks=[] if one in quick else pytest.mark.slow) for one in product(*axes)]


@pytest.mark.parametrize(("title", "seed"), cases([SCORER, LOADER, WRITER], [0, 1, 2]))
def test_killed_workers_change_nothing(title, seed, undisturbed, idle, tmp_path):
    """Each time another file has been committed, or Ray would take a constructor for broken."""
    chance = random.Random(f"{title} {seed}")
    moments = sorted(chance.sample(range(undisturbed.files - LAST_FILES), chance.randint(1, 3)))
    raylet = raylet_of(idle.head_node)
    with undisturbed.task.started(str(tmp_path / "out"), RAY_ADDRESS=idle.address) as driver:
        for files in moments:
            far_enough(driver, files)
            # A file is written in a blink, and there are only so many left.
            pause, at_it = (0, 0.02) if title == WRITER else (1, 0.1)
            time.sleep(chance.uniform(0, pause))
            catch(raylet, title, driver, chance.uniform(0, at_it))
            assert struck(title, driver, undisturbed) < undisturbed.slabs
        undisturbed.equals(driver)


def catch(raylet: int, title: str, driver: Driver, seconds: float) -> None:
    """Kill a worker so called that has been at it for so many seconds, as soon as there is one."""
    poll = WRITING_SECONDS if title == WRITER else POLL_SECONDS
    while True:
        victim = until(f"there was {title}", lambda: titled(below(raylet), title), driver.over, poll)[0]
        time.sleep(seconds)
        if titled([victim], title):
            return kill(victim)


@pytest.mark.parametrize("seed", cases([20, 21, 22, 23]))
def test_a_lost_node_changes_nothing(seed, undisturbed, idle, tmp_path):
    """What is left has room for all, for all but the tasks between actors, or not even for all actors at once."""
    chance = random.Random(seed)
    loaders, files = chance.choice([2, 3, 4]), chance.randrange(undisturbed.files - LAST_FILES)
    flags = ["--detect.scorers", "2", "--detect.loaders", str(loaders)]
    node = idle.add_node(**NODE)
    try:
        with undisturbed.task.started(str(tmp_path / "out"), *flags, RAY_ADDRESS=idle.address) as driver:
            far_enough(driver, files)
            until("an actor was there", lambda: titled(below(raylet_of(node)), SCORER, LOADER), driver.over)
            time.sleep(chance.uniform(0, 1))
            at_work = titled(below(raylet_of(node)), SCORER, LOADER, WRITER)
            idle.remove_node(node, allow_graceful=False)
            assert struck(f"node with {len(at_work)} workers of {loaders} + 2", driver, undisturbed) < undisturbed.slabs
            assert at_work
            if chance.random() < 0.5:
                idle.add_node(**NODE)
            undisturbed.equals(driver)
    finally:
        for node in list(idle.worker_nodes):
            idle.remove_node(node, allow_graceful=False)


@dataclass(frozen=True)
class Blow:
    """When a driver is killed: early, before anything is committed; in the middle; or late, when all slabs are."""

    phase: str
    seconds: float
    files: int
    all_files: int

    def wait(self, driver: Driver) -> None:
        if self.phase == "middle":
            far_enough(driver, self.files)
        if self.phase == "late":
            far_enough(driver, self.all_files)
        time.sleep(self.seconds)


def blow(phase: str, chance: random.Random, run: Undisturbed) -> Blow:
    longest = {"early": run.seconds_to_first_file, "middle": 1.0, "late": 0.2}[phase]
    return Blow(phase, chance.uniform(0, longest), chance.randrange(1, run.files - 1), run.files)


@dataclass(frozen=True)
class Remains:
    """What a killed driver has left."""

    slabs: int
    looks: dict[str, Any]
    files: dict[str, bytes]
    processes: list[Process]

    def looked_at(self, driver: Driver) -> int:
        """Slabs, of a slice each, that the run of `driver` looked at, which went on from here."""
        looks = driver.state()["looks"]
        return sum(look["slices"] - look["done_before"] for name, look in looks.items() if name not in self.looks)


def killed(phase: str, driver: Driver, run: Undisturbed, chance: random.Random) -> Remains:
    """End a driver, and only it, in a phase of its work."""
    blow(phase, chance, run).wait(driver)
    processes = workers_below(driver.process.pid)
    driver.process.kill()
    driver.process.wait()
    slabs = struck(f"{phase} driver", driver, run)
    return Remains(slabs, driver.state()["looks"], driver.files(), processes)


@pytest.mark.parametrize(
    ("where", "phases", "seed"),
    cases(WHERE, ["early", "middle", "late", "early, middle"], [40], quick=[(WHERE[0], "middle", 40)]),
)
def test_a_killed_driver_is_gone_on_with(where, phases, seed, undisturbed, idle, tmp_path):
    """The same command is given again at once, perhaps while what the first one started is still ending."""
    chance = random.Random(f"{seed} {phases} {where}")
    address = {"RAY_ADDRESS": idle.address} if where == WHERE[0] else {}
    for phase in phases.split(", "):
        with undisturbed.task.started(str(tmp_path / "out"), **address) as driver:
            remains = killed(phase, driver, undisturbed, chance)
    with undisturbed.task.started(str(tmp_path / "out"), **address) as driver:
        undisturbed.equals(driver)
        assert remains.looked_at(driver) <= undisturbed.slabs - remains.slabs
        assert remains.files.items() <= driver.files().items()
    assert not left_of(remains.processes, SECONDS_TO_END)


@pytest.mark.parametrize(("where", "phase", "seed"), cases(WHERE, ["early", "middle"], [50]))
def test_ctrl_c_ends_a_driver_and_all_that_it_started(where, phase, seed, undisturbed, idle, tmp_path):
    chance = random.Random(f"{seed} {phase} {where}")
    address = {"RAY_ADDRESS": idle.address} if where == WHERE[0] else {}
    with undisturbed.task.started(str(tmp_path / "out"), **address) as driver:
        until("it began", lambda: driver.state()["status"] == "running", driver.over)
        blow(phase, chance, undisturbed).wait(driver)
        started = workers_below(driver.process.pid)
        os.killpg(driver.process.pid, signal.SIGINT)
        code, complaint = driver.result()
        struck("Ctrl-C", driver, undisturbed)
        print(complaint)
        assert code == 130
        assert complaint.endswith("motor-ray: stopped\n")
        assert not left_of(started, SECONDS_TO_END)
    with undisturbed.task.started(str(tmp_path / "out"), **address) as driver:
        undisturbed.equals(driver)


@pytest.fixture(scope="module")
def stored(task: Task, s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same detection in a bucket, where nobody disturbed it."""
    stored = in_bucket(task, s3.folder(), tmp_path_factory.mktemp("stored") / "settings.yaml")
    return undisturbed_run(stored, s3.folder())


@pytest.mark.parametrize("seed", cases([60, 61, 62]))
def test_a_store_that_fails_some_requests_loses_nothing(seed, stored, s3):
    with faulty(s3.endpoint, seed, errors=0.05, resets=0.02, stalls=0.005, truncations=0.01) as proxy:
        with stored.task.started(s3.folder(), AWS_ENDPOINT_URL=proxy.endpoint) as driver:
            stored.equals(driver)
        counts = proxy.counts()
    looks = driver.state()["looks"].values()
    print(f"{dict(counts)}, {[look['retries'] for look in looks]} retries, {driver.state()['seconds']} s")
    assert counts["error"] > 10
    assert sum(look["retries"] for look in looks) > 10


@pytest.mark.parametrize("seed", cases([70, 71]))
def test_a_driver_that_is_killed_beside_a_failing_store_is_gone_on_with(seed, stored, s3):
    chance, out = random.Random(seed), s3.folder()
    with faulty(s3.endpoint, seed, errors=0.05, resets=0.02, stalls=0.005, truncations=0.01) as proxy:
        leads = {"AWS_ENDPOINT_URL": proxy.endpoint}
        with stored.task.started(out, **leads) as driver:
            remains = killed("middle", driver, stored, chance)
        with stored.task.started(out, **leads) as driver:
            stored.equals(driver)
            assert remains.looked_at(driver) <= stored.slabs - remains.slabs
            assert remains.files.items() <= driver.files().items()
    assert not left_of(remains.processes, SECONDS_TO_END)
