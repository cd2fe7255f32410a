"""Bulk detection: a MANIFEST and a checkpoint in, tables of motors out.

    plan.parquet -> LoadSlab (CPU actors) -> ScoreFrames (GPU actors) -> slabs/*.parquet
    slabs/ -> motors.parquet, failures.parquet, run.json

Rows are slabs all the way, a few megabytes each, so memory does not grow with the archive.
"""

import logging
import math
import time
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import ray
from ray.data import ActorPoolStrategy

from motor_ray import __version__
from motor_ray.archive.plan import make_plan
from motor_ray.config import RunSettings, settings_hash
from motor_ray.detector.checkpoint import Checkpoint, load_checkpoint
from motor_ray.distributed.cluster import connected, cores, gpus, object_store_limit, require_slots, root_cause
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.progress import Board, watched
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import ManifestError, RunError, UnfinishedError
from motor_ray.motors.link import failures_of, link_slabs
from motor_ray.storage import absolute, arrow_filesystem, exists, join, read_json, remove, write_json, write_table
from motor_ray.tables import table_hash

log = logging.getLogger(__name__)

LINK_SLICES = 1_000_000
"""Slices whose detections are linked at a time: about a hundred megabytes."""

COMPILE_PAYS_AFTER = 600
"""720 x 720 frames per scorer after which torch.compile has earned back the half minute it takes, on two CPU cores:
`motor-ray bench model` measured 0.08 s saved a frame."""

SLABS_PER_FILE = 64

SLAB_MEGABYTES = 10
"""A slab of 16 frames of 720 x 720 has 8."""

SLABS_AHEAD = 8
"""Slabs per actor that may wait between loading and scoring. Left alone, Ray fills a third of the memory with them:
98 slabs before a slow scorer, where this leaves 8."""

TASKS = 2
"""CPU slots for what comes and goes: reading the plan, writing slabs."""


def detect(manifest: pa.Table, unusable: pa.Table, model: str, out: str, settings: RunSettings) -> dict[str, Any]:
    """Look for motors in every slice of every tomogram of the MANIFEST; returns what run.json says.

    `settings` gives how to read, detect and link; frames, grey levels and network come from the checkpoint `model`.
    Under `out` (a path or URI) appear plan.parquet, slabs/, motors.parquet, failures.parquet and run.json. A finished
    run with the same settings, model and manifest is returned as it is; an `out` with another is refused (RunError).
    `unusable` are FAILURES that came to light before, of tomograms that are not in `manifest`; if there are no others,
    ManifestError says why.
    """
    if len(manifest) == 0:
        raise ManifestError(f"no tomogram of the archive can be used: {'; '.join(unusable['error'].to_pylist()[:3])}")
    model, out = absolute(model), absolute(out)
    checkpoint = load_checkpoint(model)
    settings = settings_of_model(checkpoint.settings, settings)
    plan = make_plan(manifest, settings.detect.slab_slices)
    run = describe_run(manifest, checkpoint, settings)
    if finished := finished_run(out, run):
        log.info("%s: this run is finished already; nothing to do", out)
        return finished
    started = time.monotonic()
    with connected(slots_for(settings)):
        require_slots(slots_for(settings), f"{scorers_for(settings)} scorers, a loader and tasks")
        write_json(join(out, "run.json"), run | {"status": "running"})
        write_table(plan, join(out, "plan.parquet"))
        remove(join(out, "slabs"))
        score_slabs(out, plan, model, settings)
    counts = gather(out, manifest, plan, settings, unusable)
    result = run | {"status": "done", "seconds": round(time.monotonic() - started, 1), "counts": counts}
    write_json(join(out, "run.json"), result)
    return result


def settings_of_model(trained: RunSettings, asked: RunSettings) -> RunSettings:
    """How to run a trained model: what it saw in training stays, how to read and detect is asked for anew."""
    return trained.model_copy(update={name: getattr(asked, name) for name in ("archive", "detect", "link")})


def describe_run(manifest: pa.Table, checkpoint: Checkpoint, settings: RunSettings) -> dict[str, Any]:
    """What makes two runs the same: tomograms, weights and settings; and who ran it."""
    return {
        "settings": settings.model_dump(mode="json"),
        "settings_hash": settings_hash(settings),
        "model_sha256": checkpoint.sha256,
        "manifest_hash": table_hash(manifest),
        "tomograms": len(manifest),
        "slices": sum(manifest["size_z"].to_pylist()),
        "versions": {"motor_ray": __version__, "ray": ray.__version__},
    }


def finished_run(out: str, run: dict[str, Any]) -> dict[str, Any] | None:
    """The run.json of a finished run under `out`, None if there is none. Raises RunError if `out` is another run's."""
    if not exists(join(out, "run.json")):
        return None
    there = read_json(join(out, "run.json"))
    there = there if isinstance(there, dict) else {}
    identity = ("settings_hash", "model_sha256", "manifest_hash")
    differing = [name for name in identity if there.get(name) != run[name]]
    if differing:
        raise RunError(f"{out}: holds a run with another {' and '.join(differing)}; give --out another folder")
    return there if there.get("status") == "done" else None


def score_slabs(out: str, plan: pa.Table, model: str, settings: RunSettings) -> None:
    """Run the pipeline from plan.parquet to slabs/ under `out`. Raises UnfinishedError if it breaks."""
    files, folder = arrow_filesystem(out)
    scorers, loaders = scorers_for(settings), loaders_for(settings)
    slices = sum(map(len, plan["zs"].to_pylist()))
    ahead = SLAB_MEGABYTES * SLABS_AHEAD * (scorers + loaders)
    with watched("detecting", slices, "slices") as board, object_store_limit(ahead):
        rows = ray.data.read_parquet(f"{folder}/plan.parquet", filesystem=files)
        frames = rows.repartition(target_num_rows_per_block=1).map_batches(
            LoadSlab,
            fn_constructor_kwargs={"settings": settings},
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=loaders),
        )
        slabs = frames.map_batches(
            ScoreFrames,
            fn_constructor_kwargs=scorer_arguments(slices, scorers, model, settings, board),
            batch_size=1,
            batch_format="pyarrow",
            num_gpus=1 if gpus() else 0,
            compute=ActorPoolStrategy(size=scorers),
        )
        try:
            slabs.write_parquet(f"{folder}/slabs", filesystem=files, min_rows_per_file=SLABS_PER_FILE)
        except ray.exceptions.RayError as error:
            raise UnfinishedError(f"{out}: detection stopped: {root_cause(error)}") from error


def scorers_for(settings: RunSettings) -> int:
    """Inference actors: as asked, or one per GPU, or one."""
    return settings.detect.scorers or max(gpus(), 1)


def loaders_for(settings: RunSettings) -> int:
    """Preprocessing actors, at most: as asked, or 16 per GPU as far as the CPUs go, or one per scorer without GPUs."""
    scorers = scorers_for(settings)
    free = int(ray.cluster_resources().get("CPU", 1)) - scorers - TASKS  # type: ignore[no-untyped-call]
    return settings.detect.loaders or max(1, min(free, 16 * scorers if gpus() else scorers))


def slots_for(settings: RunSettings) -> int:
    """CPU slots that detection takes at least: the scorers', one loader's, and those of tasks that come and go."""
    return (settings.detect.scorers or 1) + 1 + TASKS


def scorer_arguments(
    slices: int, scorers: int, model: str, settings: RunSettings, board: Board | None
) -> dict[str, Any]:
    """Constructor arguments of ScoreFrames, small and picklable: the model goes by name."""
    pays = slices / scorers * (settings.frame.size / 720) ** 2 >= COMPILE_PAYS_AFTER
    return {
        "settings": settings,
        "model": model,
        "threads": max(cores() // scorers, 1),
        "compiled": {"on": "on", "off": "off", "auto": "if possible" if pays else "off"}[settings.detect.compile],
        "count": board.add if board else None,
    }


def gather(out: str, manifest: pa.Table, plan: pa.Table, settings: RunSettings, unusable: pa.Table) -> dict[str, int]:
    """Second pass, over small tables only: link slabs/ into motors.parquet and failures.parquet; returns the counts.

    Raises UnfinishedError if the slices that were looked at are not those that were planned.
    """
    files, folder = arrow_filesystem(join(out, "slabs"))
    slabs = pyarrow.dataset.dataset(folder, filesystem=files, format="parquet")
    motors, failures = [], [unusable]
    counts = {"planned": sum(map(len, plan["zs"].to_pylist())), "ok": 0, "missing": 0, "corrupt": 0}
    looked_at: list[str] = []
    for tomograms in _by_slices(manifest):
        some = slabs.to_table(filter=pyarrow.dataset.field("tomo_id").isin(tomograms["tomo_id"]))
        for status in some["slices"].combine_chunks().flatten().field("status").to_pylist():
            counts[status] += 1
        looked_at += some["slab_id"].to_pylist()
        motors.append(link_slabs(some, tomograms, settings.link))
        failures.append(failures_of(some, tomograms))
    whole = counts["planned"] == counts["ok"] + counts["missing"] + counts["corrupt"]
    if not whole or sorted(looked_at) != sorted(plan["slab_id"].to_pylist()):
        raise UnfinishedError(f"{out}: slices were lost or doubled: {counts}; run again")
    write_table(pa.concat_tables(motors), join(out, "motors.parquet"))
    write_table(pa.concat_tables(failures), join(out, "failures.parquet"))
    return counts | {"motors": sum(map(len, motors)), "failures": sum(map(len, failures))}


def _by_slices(manifest: pa.Table) -> list[pa.Table]:
    """The manifest in pieces of about LINK_SLICES slices."""
    per_piece = max(1, math.floor(LINK_SLICES * len(manifest) / max(sum(manifest["size_z"].to_pylist()), 1)))
    return [manifest.slice(start, per_piece) for start in range(0, len(manifest), per_piece)]
