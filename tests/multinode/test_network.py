"""Nodes with a network and disks of their own: what a single machine's nodes hide from one another.

The head has no CPUs for work, each of two others has five. The bucket is beyond the network, too.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

from motor_ray.client import Client
from motor_ray.distributed.serve_environment import variables
from motor_ray.service.settings import ServeSettings
from motor_ray.storage import filesystem
from tests.distributed.asking import assert_same, direct
from tests.distributed.detections import Task, far_enough, struck
from tests.distributed.killers import LOADER, SCORER, below, titled, until
from tests.fault_proxy import faulty
from tests.machines import Machine, machines

pytestmark = [pytest.mark.ray, pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(480)]

NETWORK = "10.77.7"
RAY_PORT, PORT = 6379, 8000
WORKERS = ("one", "two")

SECONDS_TO_START = 120
SECONDS_TO_RECOVER = 120

DETECTOR, INGRESS = (f"ray::ServeReplica:motor_ray:{kind}" for kind in ("Detector", "Ingress"))


class Farm:
    """Machines by name, the process on each that holds its Ray, and a folder that is another one on each."""

    def __init__(self, there: dict[str, Machine], disk: Path, store: str) -> None:
        self.machines, self.disk = there, disk
        self.environment = {"AWS_ENDPOINT_URL": store, "RAY_ADDRESS": f"{there['head'].address}:{RAY_PORT}"}
        self.rays: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, folder: str, log: Path) -> None:
        """Ray on a machine, whose disk is empty but for the head's, which is this process's, too."""
        machine = self.machines[name]
        role = ["--head", f"--port={RAY_PORT}", "--num-cpus=0", "--include-dashboard=false"]
        if name != "head":
            role = [f"--address={self.environment['RAY_ADDRESS']}", "--num-cpus=5", "--memory=4000000000"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", f"--temp-dir={folder}"]
        ray += [f"--node-ip-address={machine.address}", "--object-store-memory=100000000"]
        own_disk = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.disk)]
        command = machine.on(*([] if name == "head" else own_disk), *ray)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
        environment |= {"AWS_ENDPOINT_URL": self.environment["AWS_ENDPOINT_URL"]}
        environment |= variables(ServeSettings(host="0.0.0.0"))
        with log.open("wb") as file:
            self.rays[name] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def answers(self) -> bool:
        """Whether the head's Ray takes others in."""
        try:
            socket.create_connection((self.machines["head"].address, RAY_PORT), timeout=1).close()
        except OSError:
            return False
        return True

    def alive(self) -> int:
        """Nodes that Ray takes for alive."""
        options = GcsClientOptions.create(
            self.environment["RAY_ADDRESS"], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
        )
        state = GlobalState()
        state._initialize_global_state(options)
        return sum(node["Alive"] for node in state.node_table())

    def has(self, name: str, *titles: str) -> int:
        """Processes of such titles on a machine."""
        return len(titled(below(self.rays[name].pid), *titles))

    def task(self, task: Task) -> Task:
        """A detection whose driver runs on the head's machine."""
        return replace(task, environment=self.environment, where=tuple(self.machines["head"].on()))


@pytest.fixture
def farm(s3, tmp_path: Path) -> Iterator[Farm]:
    if not shutil.which("unshare"):
        pytest.skip("takes unshare, for disks of their own")
    names = ["head", *WORKERS]
    with ExitStack() as stack:
        there = stack.enter_context(machines([f"mr-{os.getpid()}-{name}" for name in names], NETWORK))
        proxy = stack.enter_context(faulty(s3.endpoint, 0, f"{NETWORK}.254"))
        (tmp_path / "disk").mkdir()
        farm = Farm(dict(zip(names, there, strict=True)), tmp_path / "disk", proxy.endpoint)
        try:
            for name in names:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
                farm.start(name, folder, tmp_path / f"{name}.log")
                if name == "head":
                    wait_for("head", farm.answers, SECONDS_TO_START)
            wait_for("all nodes", lambda: farm.alive() == len(names), SECONDS_TO_START)
            yield farm
        finally:
            for machine in farm.machines.values():
                machine.crash()
            for process in farm.rays.values():
                process.wait()


def wait_for(what: str, happens: Callable[[], Any], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < ends, f"no {what} in {seconds} s"
        time.sleep(0.2)


def test_a_disk_of_one_node_is_refused_before_any_work_is_done(farm, stored):
    for uri, name in ((stored.archive, "archive"), (stored.model, "model")):
        files, path = filesystem(uri)
        files.get(f"{path}/", f"{farm.disk / name}/", recursive=True)
    local = {"archive": str(farm.disk / "archive"), "model": str(farm.disk / "model")}
    for changed, out in (({"archive": local["archive"]}, "s3"), ({"model": local["model"]}, "s3"), ({}, "disk")):
        where = str(farm.disk / "out") if out == "disk" else stored.archive.replace("archive", "nowhere")
        with farm.task(replace(stored, **changed)).started(where) as driver:
            code, complaint = driver.result()
        assert code == 2, complaint
        assert "does not see what lies there; on several nodes data, model and results belong into" in complaint
        assert next(iter(changed.values()), where) in complaint
        assert driver.state()["status"] == "not begun"


def test_a_node_whose_link_is_cut_changes_nothing(farm, on_one_node, s3):
    """Nobody hangs up: the others only hear nothing any more, and the cut off ones go on until they notice."""
    flags = ["--detect.loaders", "3"]
    with farm.task(on_one_node.task).started(s3.folder(), *flags) as driver:
        far_enough(driver, 2)
        until("somebody worked there", lambda: farm.has("one", LOADER, SCORER), driver.over)
        farm.machines["one"].cut()
        cut = time.monotonic()
        assert struck("link of one node", driver, on_one_node) < on_one_node.slabs
        wait_for("lost node", lambda: farm.alive() == 2, 120)
        print(f"taken for dead after {time.monotonic() - cut:.0f} s")
        on_one_node.equals(driver)


def test_an_endpoint_on_several_nodes_answers_when_one_of_them_dies(farm, stored, s3):
    command = [sys.executable, "-m", "motor_ray.cli", "serve", "--model", stored.model, "--serve.insecure"]
    command += ["--host", "0.0.0.0", "--port", str(PORT), "--serve.ingresses", "2", "--serve.storage", s3.folder()]
    command += ["--serve.min-detectors", "2", "--serve.max-detectors", "2", "--serve.detector-cpus", "1"]
    environment = os.environ | farm.environment
    on_head = farm.machines["head"].on(*command)
    done = subprocess.run(on_head, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(farm.has(name, DETECTOR) == farm.has(name, INGRESS) == 1 for name in WORKERS)

    files, path = filesystem(stored.archive)
    images = [files.cat_file(one) for one in sorted(files.glob(f"{path}/*/slice_0010.jpg"))]
    expected = direct(stored.model, images)
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(f"http://{farm.machines[name].address}:{PORT}", retries=12))
            for name in WORKERS
        }
        for client in clients.values():
            for image, answer in zip(images, expected, strict=True):
                assert_same(client.slice(image), answer)
        assert [client.retried for client in clients.values()] == [0, 0]

        pool = stack.enter_context(ThreadPoolExecutor(3))
        asked = pool.map(lambda number: clients["two"].slice(images[number % len(images)]), range(300))
        answers = []
        for number, answer in enumerate(asked):
            if number == 30:
                farm.machines["one"].crash()
            answers.append(answer)
        print(f"{clients['two'].retried} of 300 requests were sent again")
        for number, answer in enumerate(answers):
            assert_same(answer, expected[number % len(images)])
        before = clients["two"].retried
        wait_for("lost node", lambda: farm.alive() == 2, SECONDS_TO_RECOVER)
        for image, answer in zip(images, expected, strict=True):
            assert_same(clients["two"].slice(image), answer)
        assert clients["two"].retried == before
