"""Detection over several nodes gives, whatever becomes of them, the tables that it gives on one."""

import random

import pytest

from motor_ray.storage import exists, join
from tests.distributed.detections import SECONDS_TO_END, far_enough, struck
from tests.distributed.killers import LOADER, SCORER, WRITER, left_of, until, workers_below
from tests.multinode.conftest import CPUS, GPU

pytestmark = [pytest.mark.ray, pytest.mark.multinode, pytest.mark.timeout(480)]

LOADERS = ["--detect.loaders", "3"]
"""As many as there is room for, up to so many, whatever the rates."""


def test_loaders_run_where_cpus_are_and_the_scorer_where_the_gpu_is(nodes, on_one_node, s3):
    with (
        nodes.watched(LOADER, SCORER, WRITER) as seen,
        on_one_node.task.started(s3.folder(), *LOADERS, RAY_ADDRESS=nodes.address) as driver,
    ):
        on_one_node.equals(driver)
    assert seen[SCORER] == {"gpu"}
    assert seen[LOADER] == {"cpus1", "cpus2"}
    looks = driver.state()["looks"].values()
    assert [(look["scorers"], look["loaders"]) for look in looks] == [(1, 3), (1, 3)]


def test_a_node_that_comes_is_given_loaders(nodes, on_one_node, s3):
    """From the next look on; what is planned for a look stays."""
    nodes.lose_all()
    nodes.add("cpus", CPUS)
    nodes.add("gpu", GPU)
    with (
        nodes.watched(LOADER) as seen,
        on_one_node.task.started(s3.folder(), *LOADERS, RAY_ADDRESS=nodes.address) as driver,
    ):
        far_enough(driver, 1)
        nodes.add("late", CPUS)
        assert struck("nothing; a node came", driver, on_one_node) < on_one_node.slabs
        on_one_node.equals(driver)
    looks = driver.state()["looks"]
    assert looks["first look"]["loaders"] == 1
    assert looks["second look"]["loaders"] == 3
    assert "late" in seen[LOADER]


@pytest.mark.parametrize(("name", "comes"), [("cpus1", None), ("cpus2", CPUS), ("gpu", GPU)])
@pytest.mark.parametrize("seed", [90])
def test_a_lost_node_changes_nothing(name, comes, seed, nodes, on_one_node, s3):
    """Of CPU nodes one is enough; without its only GPU the run waits for the next."""
    chance = random.Random(f"{name} {seed}")
    with on_one_node.task.started(s3.folder(), *LOADERS, RAY_ADDRESS=nodes.address) as driver:
        far_enough(driver, chance.randrange(1, on_one_node.files // 2))
        until("somebody worked there", lambda: nodes.at_work(name, LOADER, SCORER), driver.over)
        nodes.lose(name)
        assert struck(f"node {name}", driver, on_one_node) < on_one_node.slabs
        if comes:
            nodes.add("instead", comes)
        on_one_node.equals(driver)


def test_a_run_of_which_too_few_nodes_are_left_stops_and_is_gone_on_with_when_there_are_more(nodes, on_one_node, s3):
    """With exit code 1, not 2: nothing was wrong with the command."""
    nodes.lose_all()
    few = CPUS | {"num_cpus": 3}
    for name, node in {"few1": few, "few2": few, "gpu": GPU}.items():
        nodes.add(name, node)
    out = s3.folder()
    with on_one_node.task.started(out, *LOADERS, RAY_ADDRESS=nodes.address) as driver:
        far_enough(driver, 1)
        nodes.lose("few1")
        code, complaint = driver.result()
        assert code == 1, complaint
        assert "stopped before the second look: the cluster has 3 CPUs" in complaint
        assert [*driver.state()["looks"]] == ["first look"]
    nodes.add("few3", few)
    with on_one_node.task.started(out, *LOADERS, RAY_ADDRESS=nodes.address) as driver:
        on_one_node.equals(driver)


def test_a_killed_driver_is_gone_on_with_while_a_node_is_lost(nodes, on_one_node, s3):
    out = s3.folder()
    with on_one_node.task.started(out, *LOADERS, RAY_ADDRESS=nodes.address) as driver:
        far_enough(driver, 2)
        processes = workers_below(driver.process.pid)
        driver.process.kill()
        driver.process.wait()
        before, files = struck("driver", driver, on_one_node), driver.files()
        looks = driver.state()["looks"]
    nodes.lose("cpus1")
    with on_one_node.task.started(out, *LOADERS, RAY_ADDRESS=nodes.address) as driver:
        on_one_node.equals(driver)
        done = driver.state()["looks"]
        again = sum(look["slices"] - look["done_before"] for name, look in done.items() if name not in looks)
        assert again <= on_one_node.slabs - before
        assert files.items() <= driver.files().items()
    assert not left_of(processes, SECONDS_TO_END)


def test_nodes_that_have_enough_only_together_are_refused_before_anything_is_written(head, stored, s3):
    """Ray would wait for ever for a node that holds a scorer."""
    out = s3.folder()
    for name in ("small1", "small2", "small3"):
        head.add(name, CPUS | {"memory": 10**9})
    try:
        with stored.started(out, RAY_ADDRESS=head.address) as driver:
            code, complaint = driver.result()
    finally:
        head.lose_all()
    assert code == 2, complaint
    assert "enough in all, but not on the same node" in complaint
    assert not exists(join(out, "run.json"))
