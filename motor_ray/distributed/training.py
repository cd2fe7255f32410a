"""Training on 1..N workers: labelled slices in, a checkpoint out.

    sample plan -> Ray Data: LoadSlab -> FrameStore of each worker -> DistributedDataParallel -> report

Under ``storage/name`` appear start/, best/ and last/ (checkpoints), metrics.jsonl (a line per epoch), run.json,
failures.parquet and the plans, beside what Ray Train keeps to resume.
"""

import json
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data import ActorPoolStrategy, Dataset
from ray.train import CheckpointConfig, DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from motor_ray.archive.labels import Labels, split_tomograms
from motor_ray.config import HEATMAP_STRIDE, RunSettings, settings_from, settings_hash
from motor_ray.detector.checkpoint import load_checkpoint, load_weights, save_checkpoint
from motor_ray.detector.device import ddp_backend, pick_device
from motor_ray.detector.model import Detector, build_model
from motor_ray.distributed.cluster import connected, gpus
from motor_ray.distributed.learner import Learner
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.progress import Board, watched
from motor_ray.distributed.samples import FrameStore, batches, pad_to_multiple, sample_plan, with_labelled_spacing
from motor_ray.errors import LabelsError, RunError
from motor_ray.motors.slice_metrics import slice_scores
from motor_ray.storage import (
    absolute,
    arrow_filesystem,
    exists,
    join,
    read_bytes,
    read_json,
    read_table,
    write_bytes,
    write_json,
    write_table,
)
from motor_ray.tables import FAILURES

SCORES = ("mAP@0.5", "mAP@0.7", "mAP@0.9")
"""The validation metrics by which epochs are compared; the later ones break ties."""

ROWS_AT_A_TIME = 8
"""Slices that a worker takes from Ray Data at a time: a few megabytes."""


def train(
    manifest: pa.Table, labels: Labels, settings: RunSettings, storage: str, name: str, *, workers: int, resume: bool
) -> dict[str, Any]:
    """Train a detector on the labelled tomograms of `manifest`; returns what run.json says.

    80 % of the tomograms are trained on and 10 % validate; the last 10 % are left alone. Raises LabelsError if labels
    and archive do not fit, RunError if ``storage/name`` exists and `resume` is not asked for, or the other way round.
    """
    storage = absolute(storage)
    run_uri = join(storage, name)
    manifest = with_labelled_spacing(manifest, labels)
    split = split_tomograms(manifest["tomo_id"].to_pylist(), settings.train.seed)
    plans = {part: plan_part(manifest, labels, settings, split[part], part) for part in ("train", "validation")}
    run = {
        "settings": settings.model_dump(mode="json"),
        "settings_hash": settings_hash(settings),
        "split": split,
        "slices": {part: len(plan) for part, plan in plans.items()},
    }
    check_run(run_uri, run, resume=resume)
    if not resume:
        # Made here, so that wrong or unreachable weights stop a run before it starts, and workers need no network.
        save_checkpoint(join(run_uri, "start"), new_model(settings), settings, {})
    write_json(join(run_uri, "run.json"), run | {"status": "running"})
    for part, plan in plans.items():
        write_table(plan, join(run_uri, f"plan_{part}.parquet"))
    plans["train"] = pad_to_multiple(plans["train"], workers)
    started = time.monotonic()
    with connected():
        fit(plans, labels, settings, storage, name, workers)
    epochs = read_metrics(run_uri)
    best = max(epochs, key=rank_of)
    result = run | {
        "status": "done",
        "seconds": round(time.monotonic() - started, 1),
        "epochs": len(epochs),
        "best": best,
        "unread": len(read_table(join(run_uri, "failures.parquet"))),
        "model": join(run_uri, "best"),
    }
    write_json(join(run_uri, "run.json"), result)
    return result


def plan_part(manifest: pa.Table, labels: Labels, settings: RunSettings, tomo_ids: list[str], part: str) -> pa.Table:
    """The sample plan of a part of the split. Raises LabelsError if no slice of it shows a motor."""
    rows = [row for row in manifest.to_pylist() if row["tomo_id"] in set(tomo_ids)]
    plan = sample_plan(pa.Table.from_pylist(rows, schema=manifest.schema), labels, settings)
    if len(plan) == 0:
        raise LabelsError(
            f"no motor is labelled in the {part} part of the archive ({len(tomo_ids)} of {len(manifest)} tomograms); "
            "give more labelled tomograms, or another --train.seed"
        )
    return plan


def check_run(run_uri: str, run: dict[str, Any], *, resume: bool) -> None:
    """Raises RunError if `run` may not be written to `run_uri`."""
    there = read_json(join(run_uri, "run.json")) if exists(join(run_uri, "run.json")) else None
    if there is None:
        if resume:
            raise RunError(f"{run_uri}: there is no run to resume; leave --resume away to start one")
        return
    if not resume:
        raise RunError(f"{run_uri}: a run of this name is there; give another --name, or --resume to go on with it")
    changed = [key for key in ("settings_hash", "split") if there.get(key) != run[key]]
    if changed:
        raise RunError(
            f"{run_uri}: was started with another {' and '.join(changed)}; resume with the same, or start anew"
        )


def fit(
    plans: dict[str, pa.Table], labels: Labels, settings: RunSettings, storage: str, name: str, workers: int
) -> None:
    """Run the workers until they are done. Raises RunError with a worker's own words if one fails."""
    files, folder = arrow_filesystem(storage)
    steps = -(-len(plans["train"]) // workers // settings.train.batch_size) * settings.train.epochs
    with watched("training", steps, "steps") as board:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "settings": settings.model_dump(mode="json"),
                "labels": labels,
                "run_uri": join(storage, name),
                "board": board,
            },
            torch_config=TorchConfig(backend=ddp_backend(torch.device("cuda" if gpus() else "cpu"))),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus() > 0,
                resources_per_worker={"CPU": settings.train.worker_cpus} | ({"GPU": 1} if gpus() else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                storage_filesystem=files,
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
            datasets={part: frames_of_plan(plan, settings) for part, plan in plans.items()},
            dataset_config=DataConfig(datasets_to_split=["train"]),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RunError(f"{join(storage, name)}: training stopped: {root_cause(error)}") from error


def frames_of_plan(plan: pa.Table, settings: RunSettings) -> Dataset:
    """The FRAMES of a plan, lazily, through the same LoadSlab as detection."""
    blocks = [plan.slice(start, ROWS_AT_A_TIME) for start in range(0, len(plan), ROWS_AT_A_TIME)]
    return ray.data.from_arrow(blocks).map_batches(
        LoadSlab,
        fn_constructor_kwargs={"settings": settings},
        batch_size=ROWS_AT_A_TIME,
        batch_format="pyarrow",
        num_cpus=0.5,
        compute=ActorPoolStrategy(min_size=1, max_size=settings.detect.loaders or 2),
    )


def train_worker(job: dict[str, Any]) -> None:
    """What each worker runs: fill its stores, then epochs of steps, validation and report."""
    settings: RunSettings = settings_from(job["settings"])
    torch.set_num_threads(settings.train.worker_cpus)
    device = pick_device()
    # At the same time, because most of it is waiting for actors to start.
    with ThreadPoolExecutor() as pool:
        filling = [
            pool.submit(FrameStore, rows, job["labels"], settings)
            for rows in (rows_of("train"), own_rows(rows_of("validation")))
        ]
        samples, held_out = (one.result() for one in filling)
    report_unread(samples.unread + held_out.unread, job["run_uri"])
    per_epoch = agreed_minimum(len(samples))
    if per_epoch == 0:
        raise RunError(f"a worker could read none of its slices; see {join(job['run_uri'], 'failures.parquet')}")
    start = load_checkpoint(join(job["run_uri"], "start")).model.to(memory_format=torch.channels_last)
    model = ray.train.torch.prepare_model(start)
    torch.manual_seed(settings.train.seed + ray.train.get_context().get_world_rank())  # for stochastic depth
    steps = -(-per_epoch // settings.train.batch_size)
    learner = Learner(model, settings, steps * settings.train.epochs, device)
    history = restore(learner)
    for epoch in range(len(history), settings.train.epochs):
        parts = run_epoch(learner, samples, per_epoch, epoch, job["board"], history)
        metrics = {"epoch": epoch, **parts, **validate(learner, held_out)}
        history.append(metrics)
        keep(learner, history, job["run_uri"])
        if epochs_since_best(history) >= settings.train.patience:
            break
    if ray.train.get_context().get_world_rank() == 0:
        save_checkpoint(join(job["run_uri"], "last"), unwrap(model), settings, history[-1])
    samples.close()
    held_out.close()


def new_model(settings: RunSettings) -> Detector:
    """The untrained network of a run, the same for the same seed. Raises CheckpointError if weights are missing."""
    torch.manual_seed(settings.train.seed)
    return build_model(settings.model, box_cells=settings.targets.box_pixels / HEATMAP_STRIDE)


def rows_of(part: str) -> Iterator[pa.Table]:
    """The worker's share of a dataset, as FRAMES tables."""
    shard = ray.train.get_dataset_shard(part)
    return iter(shard.iter_batches(batch_size=ROWS_AT_A_TIME, batch_format="pyarrow"))


def own_rows(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Of rows that every worker is given, those that are this worker's to judge: each row is one worker's."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    for table in tables:
        yield table.filter(
            pa.array([zlib.crc32(slab.encode()) % world == rank for slab in table["slab_id"].to_pylist()])
        )


def report_unread(unread: list[dict[str, Any]], run_uri: str) -> None:
    """Write down which slices no worker could read."""
    rows = {(row["tomo_id"], row["z"]): row for row in gathered(unread)}
    if ray.train.get_context().get_world_rank() == 0:
        write_table(pa.Table.from_pylist(list(rows.values()), schema=FAILURES), join(run_uri, "failures.parquet"))


def run_epoch(
    learner: Learner, samples: FrameStore, count: int, epoch: int, board: Board, history: list[dict[str, Any]]
) -> dict[str, float]:
    """One pass over this worker's samples in a random order; returns the mean of each loss part, rate and waiting."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    settings = learner.settings
    rng = np.random.default_rng([settings.train.seed, epoch, rank])
    order = rng.permutation(len(samples))[:count].tolist()
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
    """Average precision, precision and recall on all workers' validation slices; every worker gets the same."""
    judged = gathered(learner.judge(held_out))
    found = [(one.boxes, one.scores) for one in judged]
    return slice_scores(found, [one.truth for one in judged], learner.settings.detect.score_threshold)


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
    """How many epochs ago the best one was; 0 if it is the last."""
    ranks = [rank_of(line) for line in history]
    return len(ranks) - 1 - ranks.index(max(ranks))


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


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one dict per epoch."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in read_bytes(join(run_uri, "metrics.jsonl")).splitlines()]
    return lines


def root_cause(error: BaseException) -> str:
    """The innermost reason of a failure that travelled through Ray, in one line."""
    worker_failures = getattr(error, "worker_failures", None)
    if worker_failures:
        return root_cause(next(iter(worker_failures.values())))
    inner = getattr(error, "cause", None) or error.__cause__
    if isinstance(inner, BaseException):
        return root_cause(inner)
    return " ".join(str(error).split()) or type(error).__name__
