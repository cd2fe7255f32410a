"""Training on 1..N workers: labelled slices in, a checkpoint out.

    sample plan -> Ray Data: LoadSlab -> FrameStore of each worker -> DistributedDataParallel -> report

Under ``storage/name`` appear start/, best/ and last/ (checkpoints), metrics.jsonl (a line per epoch), run.json,
failures.parquet and the plans, beside what Ray Train keeps to resume.
"""

import json
import re
import time
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data import ActorPoolStrategy, Dataset
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from motor_ray.archive.labels import Labels, split_tomograms
from motor_ray.config import HEATMAP_STRIDE, RunSettings, settings_hash
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.device import ddp_backend
from motor_ray.detector.model import Detector, build_model
from motor_ray.distributed.cluster import connected, gpus, require_slots, root_cause
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.progress import watched
from motor_ray.distributed.samples import pad_to_multiple, sample_plan, with_labelled_spacing
from motor_ray.distributed.worker import ROWS_AT_A_TIME, rank_of, train_worker
from motor_ray.errors import LabelsError, RunError, UnfinishedError
from motor_ray.storage import (
    absolute,
    arrow_filesystem,
    exists,
    join,
    read_bytes,
    read_json,
    read_table,
    write_json,
    write_table,
)
from motor_ray.tables import table_hash


def train(
    manifest: pa.Table, labels: Labels, settings: RunSettings, storage: str, name: str, *, workers: int, resume: bool
) -> dict[str, Any]:
    """Train a detector on the labelled tomograms of `manifest`; returns what run.json says.

    80 % of the tomograms are trained on and 10 % validate; the last 10 % are left alone. A finished run is not resumed
    but returned. Raises LabelsError if labels and archive do not fit, CheckpointError if the start weights cannot be
    had, RunError if ``storage/name`` exists and `resume` is not asked for, or the other way round, or if the cluster
    is too small, UnfinishedError if training fails.
    """
    check_name(name, workers)
    storage = absolute(storage)
    run_uri = join(storage, name)
    tomograms = count_tomograms(manifest, labels)
    manifest = with_labelled_spacing(manifest, labels)
    split = split_tomograms(manifest["tomo_id"].to_pylist(), settings.train.seed)
    plans = {part: plan_part(manifest, labels, settings, split[part], part) for part in ("train", "validation")}
    run: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "settings_hash": settings_hash(settings),
        "tomograms": tomograms,
        "split": split,
        "slices": {part: len(plan) for part, plan in plans.items()},
        "samples_hash": table_hash(*plans.values(), pa.Table.from_pandas(labels.motors, preserve_index=False)),
    }
    if finished := check_run(run_uri, run, resume=resume):
        return finished
    started = time.monotonic()
    slots = slots_for(workers, settings)
    with connected(slots):
        require_slots(slots, f"{workers} workers of {settings.train.worker_cpus} CPUs, and reading,")
        if not resume:
            # Made here, so that weights that cannot be had stop a run before it starts, and workers need no network.
            save_checkpoint(join(run_uri, "start"), new_model(settings), settings, {})
        write_json(join(run_uri, "run.json"), run | {"status": "running"})
        for part, plan in plans.items():
            write_table(plan, join(run_uri, f"plan_{part}.parquet"))
        even = {part: pad_to_multiple(plan, workers) for part, plan in plans.items()}
        fit(even, labels, settings, storage, name, workers)
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


def count_tomograms(manifest: pa.Table, labels: Labels) -> dict[str, int]:
    """How far archive and labels speak of the same tomograms."""
    there, labelled = set(manifest["tomo_id"].to_pylist()), set(labels.tomograms["tomo_id"])
    return {
        "labelled": len(there & labelled),
        "without_labels": len(there - labelled),
        "labelled_but_not_there": len(labelled - there),
    }


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


def check_name(name: str, workers: int) -> None:
    """Raises RunError for a run that could not even be named or staffed."""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise RunError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', such as first-try")
    if workers < 1:
        raise RunError(f"--workers {workers}: expected 1 or more")


def check_run(run_uri: str, run: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The run.json at `run_uri` if it is finished and to be resumed. Raises RunError if `run` may not go there."""
    there = read_json(join(run_uri, "run.json")) if exists(join(run_uri, "run.json")) else None
    if there is None:
        if resume:
            raise RunError(f"{run_uri}: there is no run to resume; leave --resume away to start one")
        return None
    if not resume:
        raise RunError(f"{run_uri}: a run of this name is there; give another --name, or --resume to go on with it")
    changed = [key for key in ("settings_hash", "split", "samples_hash") if there.get(key) != run[key]]
    if changed:
        raise RunError(f"{run_uri}: was started with another {' and '.join(changed)}; resume with the same")
    return there if there.get("status") == "done" else None


def slots_for(workers: int, settings: RunSettings) -> int:
    """CPU slots that training takes: the workers', the readers' of both datasets, and one for what comes and goes."""
    return workers * settings.train.worker_cpus + 2 + 1


def fit(
    plans: dict[str, pa.Table], labels: Labels, settings: RunSettings, storage: str, name: str, workers: int
) -> None:
    """Run the workers until they are done. Raises UnfinishedError with a worker's own words if one fails."""
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
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise UnfinishedError(f"{join(storage, name)}: training stopped: {root_cause(error)}") from error


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


def new_model(settings: RunSettings) -> Detector:
    """The untrained network of a run, the same for the same seed. Raises CheckpointError if weights are missing."""
    torch.manual_seed(settings.train.seed)
    return build_model(settings.model, box_cells=settings.targets.box_pixels / HEATMAP_STRIDE)


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one dict per epoch."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in read_bytes(join(run_uri, "metrics.jsonl")).splitlines()]
    return lines
