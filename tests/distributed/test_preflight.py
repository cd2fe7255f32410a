import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import DetectSettings
from motor_ray.distributed.cluster import holds
from motor_ray.distributed.preflight import (
    LOADER,
    LOADER_BYTES,
    NETWORK_BYTES,
    SCORER_BYTES,
    TASKS,
    Pools,
    Room,
    local_slots,
    plan_pools,
)
from motor_ray.errors import RunError
from motor_ray.slab_plan import SLAB_BYTES

LAPTOP = Room(cpus=6, gpus=0, memory=12 * 10**9, object_store=4 * 10**9)
CLUSTER = Room(cpus=256, gpus=8, memory=10**12, object_store=2 * 10**11)


@given(
    cpus=st.integers(0, 64),
    gpus=st.integers(0, 8),
    memory=st.integers(0, 64 * 10**9),
    scorers=st.none() | st.integers(1, 80),
    loaders=st.none() | st.integers(1, 80),
    networks=st.integers(1, 10),
)
def test_what_is_planned_leaves_room_for_the_tasks_that_feed_it_or_is_refused(
    cpus, gpus, memory, scorers, loaders, networks
):
    """Otherwise Ray waits for ever (ray issue 44687)."""
    room = Room(cpus, gpus, memory, 10**9)
    try:
        pools = plan_pools(room, DetectSettings(scorers=scorers, loaders=loaders), networks)
    except RunError:
        assert cpus < TASKS + 2 or memory < LOADER_BYTES + SCORER_BYTES + (networks - 1) * NETWORK_BYTES
        return
    assert pools.scorer_bytes == SCORER_BYTES + (networks - 1) * NETWORK_BYTES
    assert pools.scorers >= 1
    assert pools.loaders >= 1
    assert pools.scorers + pools.loaders + TASKS <= cpus
    assert pools.scorers * pools.gpus_per_scorer <= gpus
    assert pools.scorers * pools.scorer_bytes + pools.loaders * LOADER_BYTES <= memory
    assert pools.bytes_ahead <= room.object_store // 2


def test_a_gpu_has_one_scorer_and_as_many_loaders_as_help():
    assert plan_pools(CLUSTER, DetectSettings())[:3] == (8, 128, 1)


def test_without_gpus_one_scorer_takes_all_cores():
    assert plan_pools(LAPTOP, DetectSettings())[:3] == (1, 1, 0)


def test_what_was_asked_for_is_taken_as_far_as_there_is_room():
    assert plan_pools(CLUSTER, DetectSettings(scorers=2, loaders=20))[:3] == (2, 20, 1)
    assert plan_pools(LAPTOP, DetectSettings(loaders=500))[:2] == (1, 2)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (LAPTOP._replace(cpus=4), r"has 4 CPUs.* take 5; add nodes"),
        (LAPTOP._replace(memory=10**9), r"has 1 GB of memory.*--memory"),
        (LAPTOP._replace(object_store=10**6), r"has 1 MB of object store.*--object-store-memory"),
    ],
)
def test_a_cluster_that_can_never_run_it_is_told_what_it_lacks(room, message):
    with pytest.raises(RunError, match=message):
        plan_pools(room, DetectSettings())


def test_what_no_single_node_can_hold_is_refused_however_many_nodes_there_are():
    """Ray places an actor on one node, and would wait for ever."""
    small = {"CPU": 4.0, "memory": 1e9}
    room = Room(32, 0, 8 * 10**9, 10**9, [small] * 8)
    with pytest.raises(RunError, match=r"enough in all, but not on the same node: .*1 CPU, 1.5 GB of memory for a sc"):
        plan_pools(room, DetectSettings())
    large = small | {"memory": 2e9}
    assert plan_pools(room._replace(nodes=[large, *[small] * 7]), DetectSettings(scorers=9, loaders=2))[:2] == (1, 2)
    # What holds a scorer but no loader beside it needs another node.
    with pytest.raises(RunError, match=r"it or another 1 CPU, 0.6 GB of memory for a loader"):
        plan_pools(room._replace(nodes=[large, *[small | {"memory": 5e8}] * 7]), DetectSettings())


def test_a_gpu_counts_where_there_is_memory_for_its_scorer():
    cpus = {"CPU": 8.0, "memory": 16e9}
    gpus = [{"CPU": 2.0, "GPU": 1.0, "memory": 4e9}, {"CPU": 2.0, "GPU": 4.0, "memory": 1e9}]
    room = Room(12, 5, 21 * 10**9, 10**10, [cpus, *gpus])
    assert plan_pools(room, DetectSettings())[:3] == (1, 8, 1)
    with pytest.raises(RunError, match=r"1 GPU, 1.5 GB of memory for a scorer"):
        plan_pools(room._replace(nodes=[cpus, gpus[1]]), DetectSettings())


@given(
    nodes=st.lists(
        st.fixed_dictionaries(
            {"CPU": st.integers(0, 8), "GPU": st.integers(0, 2), "memory": st.integers(0, 6 * 10**9)}
        ),
        min_size=1,
        max_size=4,
    ),
    scorers=st.none() | st.integers(1, 9),
)
def test_scorers_and_a_loader_that_are_planned_can_be_placed_on_the_nodes(nodes, scorers):
    cpus, gpus, memory = (sum(node[name] for node in nodes) for name in ("CPU", "GPU", "memory"))
    room = Room(cpus, gpus, memory, 10**9, nodes)
    try:
        pools = plan_pools(room, DetectSettings(scorers=scorers))
    except RunError:
        return
    scorer = {"CPU": 1 - pools.gpus_per_scorer, "GPU": pools.gpus_per_scorer, "memory": SCORER_BYTES}
    with_loader = [
        [*nodes[:i], {name: number - LOADER.get(name, 0) for name, number in node.items()}, *nodes[i + 1 :]]
        for i, node in enumerate(nodes)
        if holds([node], LOADER)
    ]
    assert any(holds(left, scorer) >= pools.scorers for left in with_loader)


def test_a_local_ray_has_room_for_what_is_asked_of_it():
    asked = DetectSettings(scorers=2, loaders=5)
    assert plan_pools(LAPTOP._replace(cpus=local_slots(asked)), asked)[:2] == (2, 5)


def test_measured_rates_decide_how_many_loaders_keep_the_scorers_busy():
    pools = Pools(scorers=4, loaders=64, gpus_per_scorer=1, bytes_ahead=8 * SLAB_BYTES)
    assert pools.balanced(load_seconds=0.006, score_seconds=0.001).loaders == 30
    assert pools.balanced(load_seconds=0.006, score_seconds=0.2).loaders == 1
    assert pools.balanced(load_seconds=1.0, score_seconds=0.0).loaders == 64
