import pytest
import ray

from motor_ray.config_values import settings_from
from motor_ray.distributed.cluster import holds
from motor_ray.distributed.preflight import Room
from motor_ray.distributed.team import require_team, slots_for, worker_resources
from motor_ray.errors import RunError


def changed(settings, **train):
    return settings_from(settings.model_dump() | {"train": settings.train.model_dump() | train})


def test_a_worker_fits_on_a_node_as_a_whole_or_not_at_all():
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 2.0}, {"CPU": 16.0}]
    assert holds(nodes, {"CPU": 1}) == 4 + 3 + 16
    assert holds(nodes, {"CPU": 2, "GPU": 1}) == 1 + 1
    assert holds(nodes, {"CPU": 5, "GPU": 1}) == 0
    assert holds(nodes, {"CPU": 1, "slot": 1}) == 0
    assert holds(nodes, {"CPU": 1, "GPU": 0}) == holds(nodes, {"CPU": 1})


def test_what_the_settings_name_is_asked_of_ray(settings, monkeypatch):
    monkeypatch.setattr("motor_ray.distributed.team.gpus", lambda: 2)
    asked = changed(settings, worker_cpus=3, worker_resources={"slot": 1})
    assert worker_resources(asked) == {"CPU": 3, "GPU": 1, "slot": 1}
    assert slots_for(2, asked) == 2 * 3 + 2


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one node of 4 CPUs and one of 2 with a GPU."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("motor_ray.distributed.team.gpus", lambda: 1)
    monkeypatch.setattr("motor_ray.distributed.team.room", lambda: Room(6, 1, 8 * 10**9, 10**9))


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_can_hold_are_refused_with_how_many_fit(settings):
    require_team((1, 8), settings)
    with pytest.raises(RunError, match=r"--workers 2: a worker takes 1 CPU, 1 GPU, .*hold 1 workers; ask for"):
        require_team((2, 2), settings)
    with pytest.raises(RunError, match=r"hold 0 workers; add nodes"):
        require_team((1, 1), changed(settings, worker_cpus=3))


@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_can_train_but_not_look_at_tomograms_is_told_before(settings, monkeypatch):
    require_team((1, 1), changed(settings, tomograms="end"))
    monkeypatch.setattr("motor_ray.distributed.team.room", lambda: Room(4, 1, 8 * 10**9, 10**9))
    require_team((1, 1), settings)
    with pytest.raises(
        RunError, match=r"--train.tomograms end: the cluster has 4 CPUs; .*or take --train.tomograms no"
    ):
        require_team((1, 1), changed(settings, tomograms="end"))


@pytest.mark.usefixtures("cluster")
def test_a_look_beside_training_needs_a_gpu_of_its_own(settings):
    with pytest.raises(RunError, match="needs a GPU beside those of 1 workers, the cluster has 1"):
        require_team((1, 1), changed(settings, tomograms="during"))


def test_statistics_of_all_workers_need_gpus(settings, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr("motor_ray.distributed.team.gpus", lambda: 0)
    with pytest.raises(RunError, match=r"batch-norm sync: needs GPUs, and the cluster has none; take frozen"):
        require_team((1, 1), changed(settings, batch_norm="sync"))
