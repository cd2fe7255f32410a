"""How fast the detector sees: its inference path against the same network written naively, in one run.

Both see the same frames in turn, so that whatever else the machine does slows both; what counts is the ratio.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from motor_ray.config import ModelSettings
from motor_ray.detector.device import can_compile, pick_device
from motor_ray.detector.inference import prepare
from motor_ray.detector.model import Prediction, standardise

JPEG_SHAPE = (960, 928)
"""The commonest slice of the public data, in pixels."""

WARM_UP_STEPS, WARM_UP_SIZE, WARM_UP_BATCH = 60, 96, 4


def bench_model(
    settings: ModelSettings | None = None, *, size: int = 720, runs: int = 7, compiled: bool = True
) -> dict[str, Any]:
    """Seconds a frame of `size` pixels, medians of `runs`, naively and by us, eager and `compiled`; and preprocessing."""
    device = pick_device()
    model = trained_model(settings or ModelSettings())
    naive = NaiveDetector(model).to(device).eval()
    contestants: dict[str, Callable[[torch.Tensor], Prediction]] = {
        "naive": torch.no_grad()(lambda frames: naive(standardise(frames.to(device)))),
        "ours": prepare(model, device),
    }
    if compiled and can_compile(device):
        contestants["compiled"] = prepare(model, device, compiled=True)
    frames = torch.from_numpy(draw_frames(1, size, motors=6, seed=1)[0])
    started = time.perf_counter()
    scores = {name: predict(frames).heatmap.sigmoid().cpu() for name, predict in contestants.items()}
    warm_up = time.perf_counter() - started
    seconds = time_in_turn({name: lambda predict=predict: predict(frames) for name, predict in contestants.items()}, runs)
    others = [name for name in contestants if name != "naive"]
    return {
        "machine": machine(device),
        "backbone": (settings or ModelSettings()).backbone,
        "frame_size": size,
        "runs": runs,
        "seconds_per_frame": seconds,
        "speedup": {name: seconds["naive"] / seconds[name] for name in others},
        "first_calls_seconds": warm_up,
        "highest_score": float(scores["naive"].max()),
        "largest_score_difference": {
            name: float((scores[name] - scores["naive"]).abs().max()) for name in others
        },
        "preprocess": bench_preprocess(runs=20),
    }
