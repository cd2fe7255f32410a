import time

import torch

from motor_ray.bench.model import NaiveDetector, bench_model, trained_model
from motor_ray.bench.timing import time_in_turn
from motor_ray.config import ModelSettings

SMALL = ModelSettings(backbone="resnet18", neck_channels=16, head_channels=8)


def test_the_naive_network_predicts_what_the_detector_does() -> None:
    model = trained_model(SMALL, steps=0)
    images = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(NaiveDetector(model).eval()(images), model(images))


def test_the_bench_reports_ratios_and_how_far_scores_differ() -> None:
    report = bench_model(SMALL, size=64, runs=1, steps=2, compiled=False)
    seconds = report["seconds_per_frame"]
    assert report["times_as_fast_as_naive"] == {"ours": seconds["naive"] / seconds["ours"]}
    assert 0 <= report["largest_score_difference"]["ours"] < 0.01
    assert report["preprocess"]["seconds"]["whole"] > 0
    assert report["machine"]["cores"] > 0


def test_contestants_take_turns_and_first_calls_do_not_count() -> None:
    calls: list[str] = []

    def slow_at_first() -> None:
        calls.append("a")
        time.sleep(0.5 if len(calls) == 1 else 0)

    seconds = time_in_turn({"a": slow_at_first, "b": lambda: calls.append("b")}, runs=2)
    assert calls == ["a", "b"] * 3
    assert seconds["a"] < 0.25
