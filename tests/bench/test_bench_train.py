import pytest

from motor_ray.bench.train import PARTS, WANTED, Sizes, bench_train
from motor_ray.bench.verdict import judge
from motor_ray.cli import main

TINY = Sizes(
    backbone="resnet18",
    frame=64,
    depth=12,
    steps=4,
    rounds=1,
    small_frame=64,
    small_tomograms=10,
    small_epochs=2,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_every_figure_that_is_asked_for_is_measured():
    said = bench_train(PARTS, TINY)
    assert said["requirements"].keys() == WANTED.keys()
    assert all(one["figure"] > 0 for name, one in said["requirements"].items() if name != "wait_share")
    assert set(PARTS) < said.keys()


def test_figures_are_judged_by_what_is_asked():
    judged = judge({"step_time": 1.02, "two_workers": 1.5}, WANTED)
    assert [one["ok"] for one in judged.values()] == [True, False]


def test_parts_of_another_bench_are_refused(capsys):
    assert main(["bench", "train", "--parts", "peers"]) == 2
    assert "--parts peers: bench train has the parts loop, workers, restart, precision" in capsys.readouterr().err
