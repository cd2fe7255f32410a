"""Pre-training without labels: unlabelled slices in, a backbone out that `train` starts from.

    MANIFEST -> plan of slices -> LoadSlab -> frames on the nodes' disks -> puzzles -> DistributedDataParallel -> report

Under ``storage/name`` appear start/, best/ and last/ (each with backbone.safetensors, which ``model.pretrained``
takes), metrics.jsonl (a line per epoch), reconstruction.png, run.json, failures.parquet, and what Ray Train keeps to go
on with.
"""

import logging
import time
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from motor_ray.archive.labels import Part, split_tomograms
from motor_ray.archive.manifest import check_usable
from motor_ray.archive.plan import slab_of
from motor_ray.config import RunSettings
from motor_ray.detector.reconstruction import (
    BACKBONE,
    Reconstructor,
    build_reconstructor,
    hide,
    load_reconstructor,
    save_reconstructor,
)
from motor_ray.distributed.frame_store import count_frames
from motor_ray.distributed.ledger import storage_watched
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.node_disks import clear_frames
from motor_ray.distributed.pretrain_loop import Picture, pretrain_worker, puzzle_of, rank_of, with_neighbours_seen
from motor_ray.distributed.training import check_name, fit, read_metrics, run_at, team_for
from motor_ray.errors import ConfigError, ManifestError
from motor_ray.motors.reconstructions import Restored, reconstruction_figure
from motor_ray.storage import absolute, join, read_table, write_json, write_table
from motor_ray.tables import PLAN, table_hash
from motor_ray.tracking import check_trackers

log = logging.getLogger(__name__)

SHOWN = 4
"""Slices in the picture of what was learned."""


def pretrain(
    manifest: pa.Table,
    unusable: pa.Table,
    settings: RunSettings,
    storage: str,
    name: str,
    *,
    workers: tuple[int, int],
    resume: bool,
) -> dict[str, Any]:
    """Teach a backbone what slices look like, on every tomogram of the MANIFEST but a tenth, which validates.

    Returns what run.json says. ``train.epochs``, ``batch_size``, ``learning_rate`` and all else of the group that
    concerns optimisation, the network, frames and augmentation are as in `train`. A finished run is not resumed but
    returned. `unusable` are FAILURES of tomograms that are not in `manifest`; if there are no others, ManifestError
    says why. Raises ManifestError for fewer than two tomograms, CheckpointError if the weights to start with cannot be
    had, ConfigError for settings that pre-training has no use for, TomogramError for a spacing that is needed but not
    known, RunError and UnfinishedError as `train` does.
    """
    check_name(name)
    check_settings(settings)
    check_trackers(settings.train)
    check_usable(manifest, unusable)
    # Looks at whole tomograms are a detector's.
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"tomograms": "no"})})
    storage = absolute(storage)
    run_uri = join(storage, name)
    plans = pretrain_plans(manifest, settings)
    for plan in plans.values():
        count_frames(plan, settings)  # tells a tomogram whose spacing the frames need before anything is begun
    run: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "tomograms": len(manifest),
        "slices": {part: len(plan) for part, plan in plans.items()},
        "samples_hash": table_hash(*plans.values()),
        "frames": uuid.uuid4().hex[:12],
    }
    there = run_at(run_uri, run, resume=resume, whole=True)
    if there.get("status") == "done":
        log.info("%s: this run is finished already; nothing to do", run_uri)
        return there
    run["frames"] = there.get("frames", run["frames"])
    started = time.monotonic()
    start = None if resume else new_reconstructor(settings)
    with team_for(run_uri, manifest, settings, workers) as team:
        if start is not None:
            begin(run_uri, run, plans, start)
        with storage_watched(run_uri):
            fit(run, settings, storage, name, team, work=pretrain_worker, title="pre-training")
            draw_reconstructions(run_uri, plans["validation"], settings)
            clear_frames(run["frames"], settings)
            lines = read_metrics(run_uri)
            result = run | {
                "status": "done",
                "seconds": round(time.monotonic() - started, 1),
                "epochs": lines[-1]["epoch"] + 1,
                "best": max(lines, key=rank_of),
                "unread": len(read_table(join(run_uri, "failures.parquet"))),
                "backbone": join(run_uri, "best", BACKBONE),
            }
            write_json(join(run_uri, "run.json"), result)
    return result


def check_settings(settings: RunSettings) -> None:
    """Raises ConfigError for settings that would be passed over in silence."""
    if settings.train.start_from:
        raise ConfigError(
            "--train.start-from takes a whole detector, which pre-training does not make; give the weights of a "
            "backbone with --model.pretrained"
        )
    if settings.model.in_slices == 3 and settings.pretrain.mask_share == 0:
        raise ConfigError(
            "pretrain.mask_share 0 hides nothing, and a network of model.in_slices 3 sees all that it is to say; hide "
            "a part (--pretrain.mask-share 0.3), or pre-train with --model.in-slices 1"
        )


def pretrain_plans(manifest: pa.Table, settings: RunSettings) -> dict[Part, pa.Table]:
    """PLANs of single slices, evenly spaced in every tomogram, to learn from and to validate with.

    A tenth of the tomograms validates, chosen by ``train.split_seed``. Raises ManifestError for fewer than two.
    """
    split = split_tomograms(manifest["tomo_id"].to_pylist(), settings.train.split_seed)
    if not split["validation"]:
        raise ManifestError(
            f"pre-training needs two tomograms or more, one of them to validate with; got {len(manifest)}"
        )
    parts: dict[str, Part] = dict.fromkeys(split["validation"], "validation")
    rows: dict[Part, list[dict[str, Any]]] = {"train": [], "validation": []}
    for tomogram in sorted(manifest.to_pylist(), key=lambda row: str(row["tomo_id"])):
        zs = even_slices(tomogram["size_z"], settings)
        rows[parts.get(tomogram["tomo_id"], "train")] += [slab_of(tomogram, [z]) for z in zs]
    return {part: pa.Table.from_pylist(own, schema=PLAN) for part, own in rows.items()}


def even_slices(size_z: int, settings: RunSettings) -> list[int]:
    """The z of slices that have the neighbours to be said, evenly spaced; the middle one where none has."""
    step = settings.pretrain.neighbour if settings.model.in_slices == 1 else 0
    within = np.arange(step, size_z - step)
    within = within if len(within) else np.array([size_z // 2])
    places = np.linspace(0, len(within) - 1, min(len(within), settings.pretrain.slices_per_tomogram))
    zs: list[int] = within[np.rint(places).astype(int)].tolist()
    return zs


def new_reconstructor(settings: RunSettings) -> Reconstructor:
    """The network that a run starts with, the same for the same seed."""
    torch.manual_seed(settings.train.seed)
    return build_reconstructor(settings.model)


def begin(run_uri: str, run: dict[str, Any], plans: dict[Part, pa.Table], start: Reconstructor) -> None:
    """Write what workers start from; a storage that cannot be written stops a run here."""
    save_reconstructor(join(run_uri, "start"), start)
    for part, plan in plans.items():
        write_table(plan, join(run_uri, f"plan_{part}.parquet"))
    write_json(join(run_uri, "run.json"), run | {"status": "running"})


@torch.no_grad()
def draw_reconstructions(run_uri: str, plan: pa.Table, settings: RunSettings) -> None:
    """Draw what the best network makes of a few validation slices; those that cannot be read are passed over."""
    model = load_reconstructor(join(run_uri, "best"), Reconstructor(settings.model)).eval()
    panels = []
    for picture in some_pictures(plan, settings):
        puzzle = puzzle_of(picture, settings, None)
        mask = torch.from_numpy(puzzle.mask[None])
        shown = hide(torch.from_numpy(puzzle.image[None]), mask)
        said = model(shown)
        truth = hide(torch.from_numpy(puzzle.target[None]), torch.zeros_like(mask))
        middle = shown[0, shown.shape[1] // 2]
        panels.append(Restored(picture.slice_id, middle.numpy(), said[0, 0].numpy(), truth[0, 0].numpy()))
    if panels:
        reconstruction_figure(join(run_uri, "reconstruction.png"), panels)


def some_pictures(plan: pa.Table, settings: RunSettings) -> list[Picture]:
    """The first frame of some slices of a plan, evenly spaced, that can be read."""
    shown = min(SHOWN, len(plan))
    chosen = ((np.arange(shown) + 0.5) * len(plan) / shown).astype(int)
    load = LoadSlab(with_neighbours_seen(settings)).load
    rows = [load(row) for row in plan.take(chosen).to_pylist()]
    return [Picture(row["slab_id"], row["frames"][row["channels"], 0]) for row in rows if row["channels"]]
