"""How well training uses a machine: its loop against a bare one, more workers against one, and what a loss costs.

    loop       steps of the real loop, reading and augmenting beside it, against bare PyTorch on batches in memory
    workers    two workers of one core each against one
    restart    from the death of a worker to the next step
    precision  a step in bfloat16 and channels_last against float32 as tensors are by default

Slices are simulated; what counts are ratios within one run of this bench.
"""

import importlib.util
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.bench.model import draw_frames
from motor_ray.bench.timing import machine, time_in_turn
from motor_ray.bench.verdict import Wanted, judge
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.demo import simulate
from motor_ray.detector.device import autocast_dtype, pick_device
from motor_ray.detector.losses import detection_loss
from motor_ray.detector.model import Detector, build_model, standardise
from motor_ray.distributed.learner import Learner
from motor_ray.distributed.optimisation import prepared
from motor_ray.distributed.samples import Batch
from motor_ray.distributed.training import read_metrics, train
from motor_ray.errors import MotorRayError, RunError, UnfinishedError
from motor_ray.machine import cores
from motor_ray.slices.targets import Targets

Part = Literal["loop", "workers", "restart", "precision"]
PARTS: tuple[Part, ...] = get_args(Part)

WANTED: Wanted = {
    "step_time": ("<=", 1.03, "seconds an image of Ray Train's loop, over those of a bare loop on batches in memory"),
    "step_time_with_a_core_to_spare": ("<=", 1.03, "the same, on all cores but one, which is left to Ray's processes"),
    "wait_share": ("<=", 0.03, "share of its time that the loop waits for data, after the first epoch"),
    "two_workers": (">=", 1.7, "images/s of two workers of one core each, over those of one"),
    "restart_seconds": ("<=", 20.0, "from the death of a worker to the end of the next step"),
    "narrow_and_channels_last": (">=", 1.6, "float32 in the default layout over bfloat16 in channels_last, a step"),
}
"""What is asked of each figure, and what it is."""

WORKER = "ray::RayTrainWorker"
"""How the titles of training workers' processes begin."""

log = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """How much is measured."""

    backbone: str = "resnet101"
    frame: int = 720
    """For the parts loop and precision: the recipe's."""

    depth: int = 24
    tomograms: int = 6
    steps: int = 8
    rounds: int = 2
    """How often Ray Train's loop and the bare one take turns."""

    small_backbone: str = "resnet18"
    small_frame: int = 256
    small_tomograms: int = 24
    small_epochs: int = 3
    """For the parts workers and restart."""


USUAL = Sizes()


class Stand(NamedTuple):
    """Where a bench takes place."""

    folder: Path
    sizes: Sizes
    numbers: "count[int]"

    def archive(self, tomograms: int, edge: int) -> tuple[str, Labels]:
        """Simulated tomograms with one motor each, and their labels."""
        folder = self.folder / f"{next(self.numbers)}-archive"
        shape = (self.sizes.depth, edge, edge)
        return str(folder / "train"), simulate(folder, [1] * tomograms, 420, shape)

    def settings(self, backbone: str, frame: int, **train: Any) -> RunSettings:
        """A run of the recipe on such frames, from random weights."""
        usual = {"slices_per_motor": 3, "tomograms": "no", "tensorboard": False, "worker_cpus": cores()}
        model = {"backbone": backbone, "pretrained": "none"}
        return settings_from({"frame": {"size": frame}, "model": model, "train": usual | train})

    def train(self, archive: tuple[str, Labels], settings: RunSettings, workers: int) -> list[dict[str, Any]]:
        """Train; the lines of metrics."""
        uri, labels = archive
        manifest = make_manifest(uri, settings.archive)
        name = f"run-{next(self.numbers)}"
        train(manifest, labels, settings, str(self.folder), name, workers=(workers, workers), resume=False)
        return read_metrics(str(self.folder / name))


def bench_train(parts: Sequence[Part] = PARTS, sizes: Sizes = USUAL) -> dict[str, Any]:
    """Measure the `parts`; returns what is asked and found, and beside it all that was measured.

    Raises RunError if something that it needs is not installed.
    """
    if "restart" in parts and importlib.util.find_spec("psutil") is None:
        raise RunError("bench train needs psutil; pip install 'motor-ray[bench]'")
    started = machine(pick_device())
    with tempfile.TemporaryDirectory(prefix="motor-ray-bench-") as folder:
        stand = Stand(Path(folder), sizes, count())
        measured: dict[str, dict[str, Any]] = {part: MEASURES[part](stand) for part in PARTS if part in parts}
    figures = {name: figure for part in measured.values() for name, figure in part.pop("figures").items()}
    return {
        "requirements": judge(figures, WANTED),
        "machine": started | {"load_average_at_the_end": machine(pick_device())["load_average"]},
        "sizes": sizes._asdict(),
        **measured,
    }


def measure_loop(stand: Stand) -> dict[str, Any]:
    """Part loop: the two take turns, on the same number of threads."""
    sizes, waits = stand.sizes, []
    archive = stand.archive(sizes.tomograms, sizes.frame)
    rates: dict[str, dict[str, list[float]]] = {}
    for name, threads in {"step_time": cores(), "step_time_with_a_core_to_spare": max(cores() - 1, 1)}.items():
        settings = stand.settings(sizes.backbone, sizes.frame, epochs=3, worker_cpus=threads)
        rates[name] = {"bare": [], "ray_train": []}
        for _ in range(sizes.rounds):
            bare = bare_rate(settings, sizes.steps)
            # What fills the first epoch's time, such as memory that is touched for the first time, is not the loop's.
            lines = stand.train(archive, settings, 1)[1:]
            ours = statistics.mean(line["images_per_second"] for line in lines)
            waits.append(statistics.mean(line["wait_share"] for line in lines))
            rates[name]["bare"].append(bare)
            rates[name]["ray_train"].append(ours)
            log.info("%d threads: bare loop %.3f images/s, Ray Train's loop %.3f images/s", threads, bare, ours)
    ratios = {name: statistics.median(of["bare"]) / statistics.median(of["ray_train"]) for name, of in rates.items()}
    return {"figures": ratios | {"wait_share": statistics.median(waits)}, "images_per_second": rates}


def bare_rate(settings: RunSettings, steps: int) -> float:
    """Images a second of a training loop as one writes it down, on batches that are made beforehand."""
    torch.set_num_threads(settings.train.worker_cpus)
    device, model = pick_device(), new_model(settings)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    narrow = autocast_dtype(device) is torch.bfloat16
    resident = [batch_of(settings, seed) for seed in range(2)]
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        images, targets, _ = resident[step % 2]
        frames = standardise(images.contiguous(memory_format=torch.channels_last).to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            prediction = model(frames)
        loss = detection_loss(prediction, Targets(*(target.to(device) for target in targets)), settings.loss)["total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_norm)
        optimizer.step()
        schedule.step()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return settings.train.batch_size / statistics.mean(seconds[len(seconds) // 3 :])


def measure_workers(stand: Stand) -> dict[str, Any]:
    """Part workers: rates after the first epoch."""
    sizes = stand.sizes
    archive = stand.archive(sizes.small_tomograms, sizes.small_frame)
    settings = stand.settings(
        sizes.small_backbone, sizes.small_frame, worker_cpus=1, epochs=sizes.small_epochs, slices_per_motor=9
    )
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(sizes.rounds):
        for workers, of in rates.items():
            lines = stand.train(archive, settings, workers)[1:]
            of.append(statistics.mean(line["images_per_second"] for line in lines))
            log.info("%d workers: %.2f images/s", workers, of[-1])
    medians = {workers: statistics.median(of) for workers, of in rates.items()}
    return {"figures": {"two_workers": medians[2] / medians[1]}, "images_per_second": rates}


def measure_restart(stand: Stand) -> dict[str, Any]:
    """Part restart: a worker is killed once steps are done; every step leaves a checkpoint."""
    sizes = stand.sizes
    archive = stand.archive(sizes.small_tomograms, sizes.small_frame)
    settings = stand.settings(sizes.small_backbone, sizes.small_frame, checkpoint_steps=1, epochs=2)
    name = stand.folder / f"run-{next(stand.numbers)}"
    uri, labels = archive
    manifest = make_manifest(uri, settings.archive)
    with in_background(
        lambda: train(manifest, labels, settings, str(stand.folder), name.name, workers=(1, 1), resume=False)
    ) as over:
        wait_for(lambda: len(checkpoints(name)) > 0, over)
        before = checkpoints(name)
        wait_for(lambda: bool(checkpoints(name) - before), over)
        killed = time.monotonic()
        kill_worker()
        before = checkpoints(name)
        wait_for(lambda: bool(checkpoints(name) - before), over)
        seconds = time.monotonic() - killed
    return {"figures": {"restart_seconds": seconds}}


def measure_precision(stand: Stand) -> dict[str, Any]:
    """Part precision: steps of two learners in turn on the same batch."""
    sizes = stand.sizes
    ways: dict[str, dict[str, bool]] = {"narrow": {}, "plain": {"mixed_precision": False, "channels_last": False}}
    torch.set_num_threads(cores())
    steps = {}
    for name, way in ways.items():
        settings = stand.settings(sizes.backbone, sizes.frame, **way)
        model = prepared(new_model(settings), settings.train).to(pick_device())
        steps[name] = _bound(Learner(model, settings, pick_device()), batch_of(settings, 0))
    seconds = time_in_turn(steps, max(sizes.steps // 4, 1))
    return {
        "figures": {"narrow_and_channels_last": seconds["plain"] / seconds["narrow"]},
        "seconds_per_step": seconds,
        "type": str(autocast_dtype(pick_device())),
    }


MEASURES: dict[Part, Callable[[Stand], dict[str, Any]]] = {
    "loop": measure_loop,
    "workers": measure_workers,
    "restart": measure_restart,
    "precision": measure_precision,
}


def new_model(settings: RunSettings) -> Detector:
    """The network of `settings`, always with the same random weights."""
    torch.manual_seed(0)
    return build_model(settings.model)


def batch_of(settings: RunSettings, seed: int) -> Batch:
    """A batch of drawn frames."""
    number, size = settings.train.batch_size, settings.frame.size
    images, targets = draw_frames(np.random.default_rng(seed), number, settings.model.in_slices, size, rings=2)
    return Batch(images, targets, [f"drawn {place}" for place in range(number)])


def checkpoints(run: Path) -> set[str]:
    """The checkpoints that a run has left so far, or is just writing."""
    return {path.name for path in run.glob("checkpoint_2*")}


def kill_worker() -> None:
    """End a training worker of this process's Ray, as the kernel does when memory runs out."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if " ".join(process.cmdline()).startswith(WORKER):
            process.kill()
            return
    raise UnfinishedError("bench train found no training worker to kill; run the bench again")


@contextmanager
def in_background(run: Callable[[], object]) -> "Iterator[threading.Event]":
    """A run beside the block, which gets an event that is set when the run is over; its failure is raised then."""
    over, failures = threading.Event(), []

    def wrapped() -> None:
        try:
            run()
        except MotorRayError as error:
            failures.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=wrapped)
    thread.start()
    try:
        yield over
    finally:
        thread.join()
    if failures:
        raise failures[0]


def wait_for(happens: Callable[[], bool], over: threading.Event) -> None:
    """Wait until `happens()`. Raises UnfinishedError if the run is over before."""
    while not happens():
        if over.is_set():
            raise UnfinishedError("bench train: the run was over before it could be measured; run the bench again")
        time.sleep(0.05)


def _bound(learner: Learner, batch: Batch) -> Callable[[], object]:
    return lambda: learner.step([batch], 0.0)
