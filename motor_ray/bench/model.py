"""How fast the detector sees: its inference path against the same network written naively, in one run.

Both see the same frame in turn; what counts is the ratio. The network is trained for some seconds on drawn rings
first: random weights amplify every rounding from layer to layer, as no trained network does, so that a comparison of
scores would say nothing.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from motor_ray.archive.jpeg_stack import decode_image
from motor_ray.bench.timing import machine, time_in_turn
from motor_ray.config import LossSettings, ModelSettings, RunSettings, TargetSettings
from motor_ray.detector.device import autocast_dtype, can_compile, pick_device
from motor_ray.detector.inference import prepare
from motor_ray.detector.losses import detection_loss
from motor_ray.detector.model import Detector, Prediction, build_model, standardise
from motor_ray.slices.frame import frames_of
from motor_ray.slices.preprocess import make_frames
from motor_ray.slices.targets import Targets, draw_targets

JPEG_SHAPE = (960, 928)
"""The commonest slice of the public data, in pixels."""

RING_PIXELS = 30.0
"""Edge of a ring's box; small, so that it fits the frames that the network is trained on."""

log = logging.getLogger(__name__)


def bench_model(
    settings: ModelSettings | None = None,
    *,
    size: int = 720,
    runs: int = 7,
    steps: int = 60,
    compiled: bool = True,
) -> dict[str, Any]:
    """Measure the network that `settings` describe, the recipe's by default, on frames of `size` pixels.

    Returns medians of `runs` in seconds a frame, naively and by us, eager and `compiled` where there is a compiler;
    how far scores differ after `steps` steps of training; and the time of preprocessing.
    """
    settings, device = settings or ModelSettings(), pick_device()
    model = trained_model(settings, steps).to(device)
    naive = NaiveDetector(model).eval()
    contestants: dict[str, Callable[[torch.Tensor], Prediction]] = {
        "naive": torch.no_grad()(lambda frames: naive(standardise(frames.to(device)))),
        "ours": prepare(model, device),
    }
    if compiled and can_compile(device):
        contestants["compiled"] = prepare(model, device, compiled=True)
    frames, _ = draw_frames(np.random.default_rng(1), 1, settings.in_slices, size, rings=6)
    scores, first_call = {}, {}
    for name, predict in contestants.items():
        log.info("first call: %s", name)
        started = time.perf_counter()
        scores[name] = predict(frames).heatmap.sigmoid().cpu()
        first_call[name] = time.perf_counter() - started
    seconds = time_in_turn({name: _bound(predict, frames, device) for name, predict in contestants.items()}, runs)
    others = [name for name in contestants if name != "naive"]
    return {
        "machine": machine(device),
        "backbone": settings.backbone,
        "frame_size": size,
        "runs": runs,
        "seconds_per_frame": seconds,
        "times_as_fast_as_naive": {name: seconds["naive"] / seconds[name] for name in others},
        "seconds_of_first_call": first_call,
        "highest_score": float(scores["naive"].max()),
        "largest_score_difference": {name: float((scores[name] - scores["naive"]).abs().max()) for name in others},
        "preprocess": bench_preprocess(runs=4 * runs),
    }


def bench_preprocess(settings: RunSettings | None = None, *, runs: int = 30) -> dict[str, Any]:
    """Median seconds, on one core, from the bytes of one JPEG slice to the frame that the network sees."""
    settings = settings or RunSettings()
    random = np.random.default_rng(0)
    grey = cv2.GaussianBlur(random.normal(0, 1, JPEG_SHAPE).astype(np.float32), (0, 0), 1.0)
    pixels = np.clip(128 + grey * (40 / grey.std()), 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    frames = frames_of(JPEG_SHAPE, None, settings.frame.model_copy(update={"mode": "fit"}))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        seconds = time_in_turn(
            {
                "decode": lambda: decode_image(jpeg, "bench", JPEG_SHAPE),
                "whole": lambda: make_frames(decode_image(jpeg, "bench", JPEG_SHAPE), frames, settings.preprocess),
            },
            runs,
        )
    finally:
        cv2.setNumThreads(threads)
    return {"shape": list(JPEG_SHAPE), "jpeg_bytes": len(jpeg), "runs": runs, "seconds": seconds}


class NaiveDetector(nn.Module):
    """The network of `model`, of one level and without attention, as one would write it down.

    That is with three heads of their own and three copies of a grey image.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.backbone, self.neck, self.presence = model.backbone, model.neck, model.presence
        merged = model.heads.shared
        assert isinstance(merged, nn.Conv2d), "a light network has heads of another kind"
        self.heads = nn.ModuleList()
        for number, last in enumerate((model.heads.heatmap, model.heads.size, model.heads.offset)):
            own = slice(number * last.in_channels, (number + 1) * last.in_channels)
            first = nn.Conv2d(merged.in_channels, last.in_channels, 3, padding=1)
            first.load_state_dict({name: tensor[own] for name, tensor in merged.state_dict().items()})
            self.heads.append(nn.Sequential(first, nn.ReLU(), last))
        self.to(merged.weight.device)

    def forward(self, images: torch.Tensor) -> Prediction:
        """Predict for `images`, `(b, in_slices, H, W)` z-scored float32."""
        features = self.backbone(images.repeat(1, 3 // images.shape[1], 1, 1))
        [finest] = self.neck(features)
        heatmap, size, offset = (head(finest) for head in self.heads)
        return Prediction(heatmap, size, offset, self.presence(features.c5))


def trained_model(settings: ModelSettings, steps: int) -> Detector:
    """The network of `settings`, from random weights, after `steps` steps on small frames with drawn rings."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = build_model(settings.model_copy(update={"pretrained": "none"})).train()
    device = pick_device()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    narrow = autocast_dtype(device)
    for step in range(steps):
        frames, targets = draw_frames(random, 4, settings.in_slices, 96, rings=2)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow is torch.bfloat16):
            prediction = model(standardise(frames.to(device)))
        on_device = Targets(*(target.to(device) for target in targets))
        loss = detection_loss(prediction, on_device, LossSettings())["total"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 20 == 0:
            log.info("training: step %d of %d, loss %.2f", step, steps, loss.item())
    return model.eval()


def draw_frames(
    random: np.random.Generator, count: int, in_slices: int, size: int, rings: int
) -> tuple[torch.Tensor, Targets]:
    """`count` frames `(count, in_slices, size, size)` uint8: noise, up to `rings` dark rings; and targets."""
    frames, drawn = np.empty((count, size, size), np.uint8), []
    for frame in frames:
        grain = random.normal(0, 1, (size, size)).astype(np.float32)
        grey = 128 + 25 * grain + 60 * cv2.GaussianBlur(grain, (0, 0), 4)
        centres = random.uniform(RING_PIXELS / 2, size - RING_PIXELS / 2, (int(random.integers(rings + 1)), 2))
        for y, x in centres:
            grey -= 80 * _ring(size, y, x)
        frame[:] = np.clip(grey, 0, 255)
        drawn.append(draw_targets(np.hstack([centres, np.full_like(centres, RING_PIXELS)]), size, TargetSettings()))
    targets = Targets(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))
    return torch.from_numpy(frames)[:, None].repeat(1, in_slices, 1, 1), targets


def _ring(size: int, y: float, x: float) -> NDArray[np.float32]:
    rows, columns = np.arange(size, dtype=np.float32)[:, None] - y, np.arange(size, dtype=np.float32) - x
    return np.asarray(np.exp(-(((np.hypot(rows, columns) - RING_PIXELS / 3) / 3) ** 2)), dtype=np.float32)


def _bound(
    predict: Callable[[torch.Tensor], Prediction], frames: torch.Tensor, device: torch.device
) -> Callable[[], object]:
    def call() -> None:
        predict(frames)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
