"""What each training worker runs: fill its stores, then epochs of steps, validation and report.

Runs inside Ray Train; every collective call here is made by all workers, the same number of times.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed

from motor_ray.config import RunSettings, settings_from
from motor_ray.detector.checkpoint import load_checkpoint, load_weights, save_checkpoint
from motor_ray.detector.model import Detector
from motor_ray.distributed.learner import Learner
from motor_ray.distributed.progress import Board
from motor_ray.distributed.samples import FrameStore, batches
from motor_ray.errors import RunError
from motor_ray.motors.slice_metrics import slice_scores
from motor_ray.storage import join, write_bytes, write_table
from motor_ray.tables import FAILURES

SCORES = ("mAP@0.5", "mAP@0.7", "mAP@0.9")
"""The validation metrics by which epochs are compared; the later ones break ties."""

ROWS_AT_A_TIME = 8
"""Slices that are loaded, and that a worker takes from Ray Data, at a time: a few megabytes."""


def train_worker(job: dict[str, Any]) -> None:
    """Train on this worker's share of the samples, together with the others, until done or no longer better."""
    settings: RunSettings = settings_from(job["settings"])
    torch.set_num_threads(settings.train.worker_cpus)
    # At the same time, because most of it is waiting for actors to start.
    with ThreadPoolExecutor() as pool:
        filling = [pool.submit(FrameStore, rows_of(part), job["labels"], settings) for part in ("train", "validation")]
    samples, held_out = (one.result() for one in filling)
    with samples, held_out:
        report_unread(samples.unread + held_out.unread, job["run_uri"])
        train_epochs(samples, held_out, settings, job["run_uri"], job["board"])


def train_epochs(samples: FrameStore, held_out: FrameStore, settings: RunSettings, run_uri: str, board: Board) -> None:
    """Epochs from where the run is until it is done. Raises RunError if there is nothing to learn from."""
    per_epoch = agreed_minimum(len(samples))
    if per_epoch == 0:
        raise RunError(f"a worker could read none of its slices; see {join(run_uri, 'failures.parquet')}")
    start = load_checkpoint(join(run_uri, "start")).to(memory_format=torch.channels_last)
    model = ray.train.torch.prepare_model(start)
    torch.manual_seed(settings.train.seed + ray.train.get_context().get_world_rank())  # for stochastic depth
    steps = -(-per_epoch // settings.train.batch_size)
    learner = Learner(model, settings, steps * settings.train.epochs, ray.train.torch.get_device())
    history = restore(learner)
    while len(history) < settings.train.epochs and epochs_since_best(history) < settings.train.patience:
        parts = run_epoch(learner, samples, per_epoch, board, history)
        history.append({"epoch": len(history), **parts, **validate(learner, held_out)})
        keep(learner, history, run_uri)
    if ray.train.get_context().get_world_rank() == 0:
        save_checkpoint(join(run_uri, "last"), unwrap(model), settings, history[-1])


def rows_of(part: str) -> Iterator[pa.Table]:
    """The worker's share of a dataset, as FRAMES tables."""
    shard = ray.train.get_dataset_shard(part)
    return iter(shard.iter_batches(batch_size=ROWS_AT_A_TIME, batch_format="pyarrow"))


def report_unread(unread: list[dict[str, Any]], run_uri: str) -> None:
    """Write down which slices no worker could read."""
    rows = {(row["tomo_id"], row["z"]): row for row in gathered(unread)}
    if ray.train.get_context().get_world_rank() == 0:
        write_table(pa.Table.from_pylist(list(rows.values()), schema=FAILURES), join(run_uri, "failures.parquet"))


def run_epoch(
    learner: Learner, samples: FrameStore, count: int, board: Board, history: list[dict[str, Any]]
) -> dict[str, float]:
    """One pass over `count` of this worker's samples in a random order.

    Returns the mean of each part of this worker's loss, the rate of all workers, and the share of time spent waiting.
    """
    context, settings, epoch = ray.train.get_context(), learner.settings, len(history)
    rank, world = context.get_world_rank(), context.get_world_size()
    order = np.random.default_rng([settings.train.seed, epoch, rank]).permutation(len(samples))[:count].tolist()
    totals: dict[str, float] = {}
    steps = -(-count // settings.train.batch_size)
    best = f", best {SCORES[0]} {max(map(rank_of, history))[0]:.3f}" if history else ""
    for step, parts in enumerate(learner.run_epoch(batches(samples, order, settings, epoch)), start=1):
        totals = {name: totals.get(name, 0.0) + value for name, value in parts.items()}
        if rank == 0:
            text = f"epoch {epoch + 1} of {settings.train.epochs}, loss {totals['total'] / step:.3f}{best}"
            board.show(epoch * steps + step, text)
    spent, waited = totals.pop("step_seconds"), totals.pop("wait_seconds")
    return {
        **{f"loss_{name}": value / steps for name, value in totals.items()},
        "learning_rate": learner.schedule.get_last_lr()[0],
        "images_per_second": world * count / (spent + waited),
        "wait_share": waited / (spent + waited),
    }


def validate(learner: Learner, held_out: FrameStore) -> dict[str, Any]:
    """Average precision, precision and recall on the validation slices of all workers; each gets the same."""
    model = unwrap(learner.model)
    share_buffers(model)
    # By name, because rows may stand twice to make the split even.
    judged = {one.slice_id: one for one in gathered(learner.judge(model, held_out))}
    ordered = [judged[name] for name in sorted(judged)]
    found, truth = [(one.boxes, one.scores) for one in ordered], [one.truth for one in ordered]
    return slice_scores(found, truth, learner.settings.detect.score_threshold)


def keep(learner: Learner, history: list[dict[str, Any]], run_uri: str) -> None:
    """Report the last epoch, with all that is needed to go on after it; keep the best model and the history."""
    metrics = history[-1]
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    write_bytes(join(run_uri, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in history).encode())
    model = unwrap(learner.model)
    if epochs_since_best(history) == 0:
        save_checkpoint(join(run_uri, "best"), model, learner.settings, metrics)
    with tempfile.TemporaryDirectory(prefix="motor-ray-epoch-") as folder:
        save_checkpoint(folder, model, learner.settings, metrics)
        torch.save(learner.state() | {"history": history}, Path(folder) / "training_state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore(learner: Learner) -> list[dict[str, Any]]:
    """Go on from the run's latest epoch, if it has one; returns the metrics of the epochs so far."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        load_weights(folder, unwrap(learner.model))
        # Our own tensors and numbers; weights_only keeps it so even if someone else can write to the bucket.
        state = torch.load(Path(folder) / "training_state.pt", map_location=learner.device, weights_only=True)
    learner.restore(state)
    history: list[dict[str, Any]] = state["history"]
    return history


def rank_of(metrics: dict[str, Any]) -> tuple[float, ...]:
    """By what an epoch is compared with others; higher is better, and what is not defined counts as 0."""
    return tuple(metrics[name] or 0.0 for name in SCORES)


def epochs_since_best(history: list[dict[str, Any]]) -> int:
    """How many epochs ago the best one was; 0 if it is the last, or there is none."""
    ranks = [rank_of(line) for line in history]
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0


def share_buffers(model: torch.nn.Module) -> None:
    """Give every worker the first one's batch statistics, which are the ones that are saved."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def agreed_minimum(number: int) -> int:
    """The least of all workers' `number`: workers must take as many steps, or they wait for one another for ever."""
    if not torch.distributed.is_initialized():
        return number
    tensor = torch.tensor(number, device=ray.train.torch.get_device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
    return int(tensor)


def gathered(own: list[Any]) -> list[Any]:
    """The lists of all workers as one."""
    if not torch.distributed.is_initialized():
        return own
    parts: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    return [one for part in parts for one in part]


def unwrap(model: torch.nn.Module) -> Detector:
    """The detector inside a distributed wrapper."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, Detector)
    return inner
