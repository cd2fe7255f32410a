"""Training that is interrupted in every way goes on, and ends as if nothing had happened.

Nothing dies but what the tests themselves started. Nodes have a resource "slot" in place of a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.description import describe_checkpoint
from motor_ray.storage import exists, filesystem, join, list_names, write_bytes
from tests.distributed.killers import TRAINER, below, kill, left_of, raylet_of, titled, until, workers_below
from tests.distributed.trainings import SECONDS_TO_END, SLOT, Labelled, Training, goes_through_all_samples
from tests.fault_proxy import faulty

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NODE: dict[str, Any] = {
    "num_cpus": 4,
    "memory": 4 * 10**9,
    "object_store_memory": 100 * 10**6,
    "include_dashboard": False,
}
EPOCHS = 4


@pytest.fixture(scope="module")
def quick(settings: RunSettings) -> RunSettings:
    """A checkpoint after every other step, so that there is always something to lose and something to go on from."""
    train = {"epochs": EPOCHS, "checkpoint_steps": 2, "ema_decay": 0.9, "tensorboard": False}
    return settings_from(settings.model_dump() | {"train": settings.train.model_dump() | train})


@pytest.fixture(scope="module")
def start(archive, quick, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a training of that name, which does not outlive the block."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "settings.yaml").write_text(quick.model_dump_json())
    return Labelled(archive.uri, archive.labels_csv, str(folder), folder / "settings.yaml").started


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A node with room for two workers, and for reading."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def slots(cluster: Cluster) -> Iterator[list[Any]]:
    """Two more nodes with a slot each."""
    nodes = [cluster.add_node(**SLOT) for _ in range(2)]
    yield nodes
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def undisturbed(start, cluster):
    with start("undisturbed", "--workers", "2", RAY_ADDRESS=cluster.address) as training:
        training.ends_well()
    return training


def end_alike(one: Training, other: Training) -> None:
    """Assert that two runs have the same weights to the last bit, and the same metrics but for the time they took."""
    for name in ("best", "last"):
        ends = [load_checkpoint(join(run.folder, name)).state_dict() for run in (one, other)]
        for key, tensor in ends[0].items():
            torch.testing.assert_close(tensor, ends[1][key], rtol=0, atol=0, msg=f"{name} {key}")
    timeless = [
        [{key: line[key] for key in line if key not in ("images_per_second", "wait_share")} for line in run.lines()]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


def test_a_killed_worker_changes_nothing(start, cluster, undisturbed):
    with start("killed-worker", "--workers", "2", RAY_ADDRESS=cluster.address) as training:
        until("it had validated", training.has_validated(1), training.over)
        before = training.checkpoints()
        until("there was another checkpoint", lambda: training.checkpoints() - before, training.over)
        kill(titled(below(raylet_of(cluster.head_node)), TRAINER)[0])
        assert len(training.lines()) < EPOCHS
        training.ends_well()
    end_alike(undisturbed, training)


def test_a_killed_driver_changes_nothing(start, cluster, undisturbed):
    with start("killed-driver", "--workers", "2", RAY_ADDRESS=cluster.address) as training:
        until("it had validated", training.has_validated(1), training.over)
        before = training.checkpoints()
        until("there was another checkpoint", lambda: training.checkpoints() - before, training.over)
    assert len(training.lines()) < EPOCHS
    assert not left_of(titled(below(raylet_of(cluster.head_node)), TRAINER), SECONDS_TO_END)
    with start("killed-driver", "--workers", "2", "--resume", RAY_ADDRESS=cluster.address) as training:
        training.ends_well()
    end_alike(undisturbed, training)


def test_a_lost_node_leaves_fewer_workers_who_go_on(start, cluster, slots):
    flags = ["--workers", "1:2", "--train.worker-resources", "slot", "1", "--train.max-failures", "1"]
    with start("lost-node", *flags, RAY_ADDRESS=cluster.address) as training:
        until("it had validated", training.has_validated(1), training.over)
        [lost] = [node for node in slots if titled(below(raylet_of(node)), TRAINER)][:1]
        cluster.remove_node(lost, allow_graceful=False)
        assert len(training.lines()) < EPOCHS
        assert training.ends_well()["epochs"] == EPOCHS
    goes_through_all_samples(training, EPOCHS)


def test_a_node_that_comes_is_taken_in(start, cluster):
    """Ray looks for room once a minute."""
    long = ["--train.epochs", "60", "--train.patience", "60", "--train.checkpoint-steps", "1000"]
    flags = ["--workers", "1:2", "--train.worker-resources", "slot", "1", *long]
    first = cluster.add_node(**SLOT)
    second = None
    try:
        with start("grown", *flags, RAY_ADDRESS=cluster.address) as training:
            until("it had validated", training.has_validated(1), training.over)
            second = cluster.add_node(**SLOT)
            assert training.ends_well()["epochs"] == 60
    finally:
        for node in filter(None, (first, second)):
            cluster.remove_node(node, allow_graceful=False)
    workers = [line["workers"] for line in training.lines()]
    assert workers == sorted(workers)
    assert {1, 2} == set(workers)
    goes_through_all_samples(training, 60)


def test_a_node_that_is_announced_to_go_costs_no_steps(start, cluster, slots):
    """With far checkpoints, so that only the one made because of the announcement can have kept the steps.

    One failure is granted: on a busy machine the other worker sees its connection break before Ray sees the lost node.
    """
    rare = ["--train.checkpoint-steps", "1000", "--train.epochs", "2", "--train.batch-size", "1"]
    flags = ["--workers", "1:2", "--train.worker-resources", "slot", "1", "--train.max-failures", "1", *rare]
    with start("preempted", *flags, RAY_ADDRESS=cluster.address) as training:
        node = slots[1]
        until("a worker was there", lambda: titled(below(raylet_of(node)), TRAINER), training.over)
        announce(cluster.address, node.node_id, seconds=60)
        until("there was a checkpoint", training.checkpoints, training.over)
        assert not training.lines()
        cluster.remove_node(node, allow_graceful=False)
        assert training.ends_well()["epochs"] == 2
    goes_through_all_samples(training, 2)


def announce(address: str, node: str, seconds: int) -> None:
    """Tell Ray, as a cloud's agent does, that a node will be taken away."""
    where = ["--address", address, "--node-id", node, "--deadline-remaining-seconds", str(seconds)]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why], check=True)


def test_a_run_in_a_bucket_is_gone_on_with(archive, quick, s3, tmp_path):
    """From the archive to the checkpoints, all is in object storage; requests fail now and then."""
    folder = s3.folder()
    files, path = filesystem(join(folder, "archive"))
    files.put(f"{archive.uri}/", f"{path}/", recursive=True)
    write_bytes(join(folder, "labels.csv"), Path(archive.labels_csv).read_bytes())
    (tmp_path / "settings.yaml").write_text(quick.model_dump_json())
    command = [sys.executable, "-m", "motor_ray.cli", "train", "--archive", join(folder, "archive")]
    command += ["--labels", join(folder, "labels.csv"), "--config", str(tmp_path / "settings.yaml")]
    command += ["--storage", folder, "--name", "run", "--train.tensorboard", "--train.tomograms", "end"]
    metrics = join(folder, "run", "metrics.jsonl")
    with faulty(s3.endpoint, 80, errors=0.03, resets=0.01, truncations=0.01) as proxy:
        leads = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        leads |= {"AWS_ENDPOINT_URL": proxy.endpoint}
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, env=leads) as first,
        ):
            until("it had validated", lambda: exists(metrics), lambda: first.poll() is not None)
            left = workers_below(first.pid)
            first.kill()
        assert not left_of(left, SECONDS_TO_END)
        done = subprocess.run([*command, "--resume"], env=leads, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert proxy.counts()["error"] > 10
    result = json.loads(done.stdout)
    assert result["epochs"] == EPOCHS
    assert result["validation"]["tomograms"]["n_tomograms"] == 1
    assert {"curve.png", "validation.png", "run.json"} <= set(list_names(join(folder, "run")))
    assert describe_checkpoint(join(folder, "run", "best")).metrics == result["best"]
    assert list_names(join(folder, "run", "tensorboard"))
