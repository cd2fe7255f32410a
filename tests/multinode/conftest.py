"""A cluster of four nodes on this machine, whose data, models and results are in object storage."""

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.distributed.detections import Task, Undisturbed, in_bucket, simulated_task, undisturbed_run
from tests.distributed.killers import below, raylet_of, titled
from tests.object_store import ObjectStore

HEAD: dict[str, Any] = {"num_cpus": 0, "memory": 10**9, "include_dashboard": False}
CPUS: dict[str, Any] = {"num_cpus": 5, "memory": 4 * 10**9}
GPU: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1, "memory": 4 * 10**9}
"""What nodes say that they have; no GPU is behind that of the last."""

POLL_SECONDS = 0.1
SECONDS_TO_NOTICE = 60


class Nodes:
    """A head without CPUs for work, and whatever workers a test adds, by name. Each has a folder of its own for Ray."""

    def __init__(self) -> None:
        self._folders: list[tempfile.TemporaryDirectory[str]] = []
        self.cluster = Cluster(initialize_head=True, head_node_args=self._own_folder(HEAD))
        self.workers: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, name: str, node: Mapping[str, Any]) -> None:
        self.workers[name] = self.cluster.add_node(**self._own_folder(node))

    def lose(self, *names: str) -> None:
        """As when the power fails: nobody gets to say goodbye, and Ray takes a while to notice."""
        for name in names:
            self.cluster.remove_node(self.workers.pop(name), allow_graceful=False)

    def lose_all(self) -> None:
        """Lose the workers; returns when Ray has noticed, so that nobody counts on them any more."""
        self.lose(*self.workers)
        ends = time.monotonic() + SECONDS_TO_NOTICE
        while sum(node["Alive"] for node in self.cluster.global_state.node_table()) > 1:
            assert time.monotonic() < ends
            time.sleep(POLL_SECONDS)

    def at_work(self, name: str, *titles: str) -> bool:
        """Whether somebody of that title is on a node."""
        return bool(titled(below(raylet_of(self.workers[name])), *titles))

    @contextmanager
    def watched(self, *titles: str) -> Iterator[dict[str, set[str]]]:
        """On which nodes each of `titles` is seen while the block runs."""
        seen: dict[str, set[str]] = defaultdict(set)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_SECONDS):
                for name, node in list(self.workers.items()):
                    there = below(raylet_of(node)) if node.any_processes_alive() else []
                    for title in titles:
                        if titled(there, title):
                            seen[title].add(name)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield seen
        finally:
            over.set()
            watcher.join()

    def shutdown(self) -> None:
        self.cluster.shutdown()
        for folder in self._folders:
            folder.cleanup()

    def _own_folder(self, node: Mapping[str, Any]) -> dict[str, Any]:
        # Names of Unix sockets may have about 100 bytes, fewer than a test's folder easily takes.
        self._folders.append(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        return {"object_store_memory": 100 * 10**6, "temp_dir": self._folders[-1].name, **node}


@pytest.fixture(scope="session")
def head(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """A head; its processes, and all that join it, know the way to the object storage."""
    request.getfixturevalue("s3")
    nodes = Nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    """A head, two nodes with CPUs, and one with a GPU."""
    for name, node in {"cpus1": CPUS, "cpus2": CPUS, "gpu": GPU}.items():
        head.add(name, node)
    yield head
    head.lose_all()


@pytest.fixture(scope="session")
def stored(s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A detection whose archive and model are in a bucket."""
    folder: Path = tmp_path_factory.mktemp("task")
    return in_bucket(simulated_task(folder), s3.folder(), folder / "bucket.yaml")


@pytest.fixture(scope="session")
def on_one_node(stored: Task, s3: ObjectStore) -> Undisturbed:
    """What it ends with on a Ray of its own, of a single node."""
    return undisturbed_run(stored, s3.folder())
