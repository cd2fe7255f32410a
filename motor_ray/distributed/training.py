"""Training on 1..N workers: labelled slices in, a checkpoint out.

    labels -> plan of slices -> LoadSlab -> frames on the nodes' disks -> DistributedDataParallel -> report -> detect

Under ``storage/name`` appear start/, best/ and last/ (checkpoints), snapshots/ after cycles, metrics.jsonl (a line per
validation), curve.png, validation.png, validation/ (whole tomograms), run.json, failures.parquet, what was trained on,
and what Ray Train keeps to go on with.
"""

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig

# What ray.train exports, unless it is told to be as it was; type checkers see only how it was.
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.validation_config import ValidationConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from motor_ray.archive.labels import Labels, Part, read_labels, split_labelled, write_labels
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_differences
from motor_ray.detector.checkpoint import load_weights, save_checkpoint
from motor_ray.detector.device import ddp_backend
from motor_ray.detector.model import Detector, build_model
from motor_ray.distributed.cluster import connected, gpus, root_cause
from motor_ray.distributed.frame_store import count_frames
from motor_ray.distributed.ledger import alone, storage_watched
from motor_ray.distributed.node_disks import clear_frames
from motor_ray.distributed.progress import watched
from motor_ray.distributed.samples import sample_plan, with_labelled_spacing
from motor_ray.distributed.sharing import first_tomogram, require_shared
from motor_ray.distributed.team import require_team, slots_for, team_of_this_machine, worker_resources
from motor_ray.distributed.training_loop import rank_of
from motor_ray.distributed.validation import EPOCHS, look_at_tomograms, validate_checkpoint
from motor_ray.distributed.worker import PARTS, train_worker
from motor_ray.errors import LabelsError, RunError, UnfinishedError
from motor_ray.motors.curves import training_curve
from motor_ray.results import draw_validation
from motor_ray.slices.targets import usual_box_cells
from motor_ray.storage import (
    absolute,
    arrow_filesystem,
    exists,
    join,
    list_names,
    read_bytes,
    read_json,
    read_table,
    write_json,
    write_table,
)
from motor_ray.tables import table_hash
from motor_ray.tracking import check_trackers

log = logging.getLogger(__name__)

PATIENCE = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # of 60: how long workers that cannot be placed are waited for
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}
"""How soon Ray Train notices that workers are lost, and goes on with others."""


def train(
    manifest: pa.Table,
    labels: Labels,
    settings: RunSettings,
    storage: str,
    name: str,
    *,
    workers: tuple[int, int],
    resume: bool,
    frames: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> dict[str, Any]:
    """Train a detector on the labelled tomograms of `manifest`; returns what run.json says.

    80 % of the tomograms are trained on and 10 % validate; the last 10 % are left alone. A finished run is not resumed
    but returned.

    `workers` are the fewest and the most: with as many as there is room for in between training goes on. `frames` is
    a name under which runs on the same slices share decoded frames, which are then not removed at the end; `callbacks`
    are Ray Train's, told of every report.

    Raises LabelsError if labels and archive do not fit, CheckpointError if the start weights cannot be had, RunError if
    ``storage/name`` exists and `resume` is not asked for, or the other way round, or if the cluster is too small or its
    nodes do not see the same files, UnfinishedError if training fails.
    """
    check_name(name)
    check_trackers(settings.train)
    storage = absolute(storage)
    run_uri = join(storage, name)
    tomograms = compare_tomograms(manifest, labels)
    manifest = with_labelled_spacing(manifest, labels)
    split = split_labelled(manifest["tomo_id"].to_pylist(), labels, settings.train.split_seed)
    plans = {part: plan_part(manifest, labels, settings, split[part], part) for part in PARTS}
    run: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "tomograms": tomograms,
        "split": split,
        "slices": {part: len(plan) for part, plan in plans.items()},
        "samples_hash": table_hash(*plans.values(), pa.Table.from_pandas(labels.motors, preserve_index=False)),
        "frames": frames or uuid.uuid4().hex[:12],
    }
    there = run_at(run_uri, run, resume=resume)
    if there.get("status") == "done":
        log.info("%s: this run is finished already; nothing to do", run_uri)
        return there
    run["frames"] = there.get("frames", run["frames"])
    started = time.monotonic()
    # Made here, so that weights that cannot be had stop a run before it starts, and workers need no network.
    start = None if resume else new_model(settings)
    with team_for(run_uri, manifest, settings, workers) as team:
        if start is not None:
            begin(run_uri, run, manifest, labels, plans, start, settings)
        with storage_watched(run_uri):
            try:
                fit(run, settings, storage, name, team, callbacks)
            finally:
                draw_curve(run_uri)
            validation = final_look(run_uri, settings)
            if frames is None:
                clear_frames(run["frames"], settings)
            result = run | {
                "status": "done",
                "seconds": round(time.monotonic() - started, 1),
                **what_came_out(run_uri),
                "validation": validation,
            }
            write_json(join(run_uri, "run.json"), result)
    return result


@contextlib.contextmanager
def team_for(
    run_uri: str, manifest: pa.Table, settings: RunSettings, workers: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """A cluster that can hold the fewest of `workers`, and a run that nobody else is at; yields how many are apt.

    Raises RunError if it can never hold them, if its nodes do not see the same files, or if somebody is.
    """
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        workers = team_of_this_machine(workers, settings)
    with connected(slots_for(workers[0], settings)):
        require_team(workers, settings)
        with alone(run_uri):
            require_shared([first_tomogram(manifest)], run_uri)
            yield workers


def begin(
    run_uri: str,
    run: dict[str, Any],
    manifest: pa.Table,
    labels: Labels,
    plans: Mapping[Part, pa.Table],
    start: Detector,
    settings: RunSettings,
) -> None:
    """Write what workers start from; a storage that cannot be written stops a run here."""
    save_checkpoint(join(run_uri, "start"), start, settings, {})
    for part, plan in plans.items():
        write_table(plan, join(run_uri, f"plan_{part}.parquet"))
    write_table(manifest, join(run_uri, "manifest.parquet"))
    write_labels(labels, join(run_uri, "labels.csv"))
    write_json(join(run_uri, "run.json"), run | {"status": "running"})


def compare_tomograms(manifest: pa.Table, labels: Labels) -> dict[str, int]:
    """How far archive and labels speak of the same tomograms; says so if they do not."""
    there, labelled = set(manifest["tomo_id"].to_pylist()), set(labels.tomograms["tomo_id"])
    _warn_of("labelled", labelled, "in the archive", there)
    _warn_of("in the archive", there, "labelled", labelled)
    return {
        "labelled": len(there & labelled),
        "without_labels": len(there - labelled),
        "labelled_but_not_there": len(labelled - there),
    }


def _warn_of(what: str, ones: set[str], lacking: str, others: set[str]) -> None:
    if odd := sorted(ones - others):
        some = ", ".join(odd[:3])
        log.warning("of %d tomograms that are %s, %d are not %s, such as %s", len(ones), what, len(odd), lacking, some)


def plan_part(manifest: pa.Table, labels: Labels, settings: RunSettings, tomo_ids: list[str], part: str) -> pa.Table:
    """The sample plan of a part of the split. Raises LabelsError if no slice of it shows a motor."""
    rows = [row for row in manifest.to_pylist() if row["tomo_id"] in set(tomo_ids)]
    # Runs that differ in their seed are validated on the same slices.
    seed = settings.train.seed if part == "train" else settings.train.split_seed
    plan = sample_plan(pa.Table.from_pylist(rows, schema=manifest.schema), labels, settings, seed)
    if len(plan) == 0:
        raise LabelsError(
            f"no motor is labelled in the {part} part of the archive ({len(tomo_ids)} of {len(manifest)} tomograms); "
            "give more labelled tomograms, or another --train.split-seed"
        )
    return plan


def check_name(name: str) -> None:
    """Raises RunError for a name that cannot be a folder's."""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise RunError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', such as first-try")


def run_at(run_uri: str, run: dict[str, Any], *, resume: bool, whole: bool = False) -> dict[str, Any]:
    """The run.json at `run_uri`, empty if there is none. Raises RunError if `run` may not go there.

    With `whole`, settings that concern no detector must be the same, too.
    """
    there = read_json(join(run_uri, "run.json")) if exists(join(run_uri, "run.json")) else None
    if there is None:
        if resume:
            raise RunError(f"{run_uri}: there is no run to resume; leave --resume away to start one")
        return {}
    if not resume:
        raise RunError(f"{run_uri}: a run of this name is there; give another --name, or --resume to go on with it")
    if changed := settings_differences(there["settings"], run["settings"], whole=whole):
        raise RunError(f"{run_uri}: was started with other settings: {'; '.join(changed)}; resume with the same")
    if there["samples_hash"] != run["samples_hash"]:
        raise RunError(f"{run_uri}: was started with other labels or tomograms; resume with the same")
    return dict(there)


def fit(
    run: dict[str, Any],
    settings: RunSettings,
    storage: str,
    name: str,
    workers: tuple[int, int],
    callbacks: Sequence[UserCallback] = (),
    *,
    work: Callable[[dict[str, Any]], None] = train_worker,
    title: str = "training",
) -> None:
    """Run the workers, which each do `work`, until they are done.

    Raises UnfinishedError with a worker's own words if they give up.
    """
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    files, folder = arrow_filesystem(storage)
    train, run_uri = settings.train, join(storage, name)
    fewest, most = workers
    frames = count_frames(read_table(join(run_uri, "plan_train.parquet")), settings)
    with watched(title, frames * train.epochs, "frames") as board:
        trainer = TorchTrainer(
            work,
            train_loop_config={
                "name": name,
                "run_uri": run_uri,
                "settings": settings,
                "frames": run["frames"],
                "board": board,
            },
            torch_config=TorchConfig(backend=ddp_backend(torch.device("cuda" if gpus() else "cpu"))),
            scaling_config=ScalingConfig(
                num_workers=fewest if fewest == most else workers,
                use_gpu=gpus() > 0,
                resources_per_worker=worker_resources(settings),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                storage_filesystem=files,
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                failure_config=FailureConfig(max_failures=train.max_failures),
                callbacks=[*callbacks],
            ),
            validation_config=ValidationConfig(
                validate_checkpoint,  # type: ignore[arg-type]  # its arguments come with each checkpoint
                ray_remote_kwargs={"num_cpus": 0},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            why = board.read().reason or f"{root_cause(error)}; --resume goes on from the last checkpoint"
            raise UnfinishedError(f"{run_uri}: training stopped: {why}") from error
        reason = board.read().reason
    if reason:
        raise UnfinishedError(f"{run_uri}: training stopped: {reason}")


def final_look(run_uri: str, settings: RunSettings) -> dict[str, Any] | None:
    """Scores of the best model on whole validation tomograms, and a page of what it found there; None if not asked.

    Raises UnfinishedError if that is not possible; the run goes on from here.
    """
    if settings.train.tomograms == "no":
        return None
    found = join(run_uri, "validation", "best")
    try:
        scores = look_at_tomograms(run_uri, join(run_uri, "best"), found)
    except RunError as error:
        raise UnfinishedError(f"{run_uri}: training is done, but not the look at whole tomograms: {error}") from error
    manifest, labels = read_table(join(run_uri, "manifest.parquet")), read_labels(join(run_uri, "labels.csv"))
    draw_validation(manifest, labels, found, join(run_uri, "validation.png"), settings.evaluate)
    return scores


def draw_curve(run_uri: str) -> None:
    """Draw the metrics of a run, as far as it has come."""
    if exists(join(run_uri, "metrics.jsonl")):
        scored = [look for look in looks_beside(run_uri) if "error" not in look]
        training_curve(join(run_uri, "curve.png"), read_metrics(run_uri), scored)


def looks_beside(run_uri: str) -> list[dict[str, Any]]:
    """What came of the looks at whole tomograms beside training: scores, or an error."""
    return [read_json(join(run_uri, EPOCHS, name)) for name in sorted(list_names(join(run_uri, EPOCHS)))]


def what_came_out(run_uri: str) -> dict[str, Any]:
    """What a run's files say of it."""
    lines = read_metrics(run_uri)
    return {
        "epochs": lines[-1]["epoch"] + 1,
        "best": max(lines, key=rank_of),
        "unread": len(read_table(join(run_uri, "failures.parquet"))),
        "failed_looks": [look for look in looks_beside(run_uri) if "error" in look],
        "model": join(run_uri, "best"),
    }


def new_model(settings: RunSettings) -> Detector:
    """The network that a run starts with, the same for the same seed. Raises CheckpointError if weights are missing."""
    torch.manual_seed(settings.train.seed)
    start = settings.train.start_from
    described = settings.model.model_copy(update={"pretrained": "none"}) if start else settings.model
    model = build_model(described, box_cells=usual_box_cells(settings))
    if start:
        load_weights(start, model)
    return model


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one dict per validation."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in read_bytes(join(run_uri, "metrics.jsonl")).splitlines()]
    return lines
