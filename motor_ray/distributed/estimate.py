"""What a detection would take, from a plan and a sample of it, without writing anything."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from motor_ray.archive.plan import first_look, z_stride
from motor_ray.config import RunSettings
from motor_ray.distributed.cluster import connected, nodes, root_cause
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.pipeline import Stage
from motor_ray.distributed.preflight import Pools, local_slots, plan_pools, room
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import UnfinishedError
from motor_ray.motors.failures import failed_slices
from motor_ray.motors.second_look import second_look
from motor_ray.progress import progress_bar
from motor_ray.storage import Traffic, traffic

SAMPLE_SECONDS = 30.0

SAMPLE_TOMOGRAMS = 200
"""Tomograms of which a slab each is sampled, at most, as far as the time goes."""


class Sample(NamedTuple):
    """What became of a few slabs, one after the other, without waiting for the actors to start."""

    slabs: pa.Table
    slices: int
    load_seconds: float
    score_seconds: float
    traffic: Traffic


class _Timed:
    """An operator, and how long it takes."""

    def __init__(self, stage: Stage) -> None:
        self.operator = stage.operator(**stage.arguments)

    def run(self, table: pa.Table) -> tuple[pa.Table, float, Traffic]:
        started, before = time.perf_counter(), traffic()
        result = self.operator(table)
        return result, time.perf_counter() - started, traffic().since(before)


def estimate(manifest: pa.Table, model: str, settings: RunSettings) -> dict[str, Any]:
    """How many slices `detect` would look at, what it would fetch, with which actors, and about how long it takes.

    `settings` are complete: those of the model among them. Works on a sample of half a minute, on the cluster that
    the run would use. Raises RunError if that can never run it, UnfinishedError if the sample cannot be taken.
    """
    slices = sum(manifest["size_z"].to_pylist())
    planned = sum(len(piece["zs"].combine_chunks().flatten()) for piece in first_look(manifest, settings))
    with connected(local_slots(settings.detect)):
        pools = plan_pools(room(), settings.detect)
        sample = take_sample(manifest, model, settings, pools)
    again = follow_ups(sample, manifest, settings)
    looks = round(planned * (1 + again))
    load, score = sample.load_seconds / sample.slices, sample.score_seconds / sample.slices
    stages = {"loading": load / pools.loaders, "scoring": score / pools.scorers}
    return {
        "tomograms": len(manifest),
        "slices": slices,
        "first_look": planned,
        "second_look": looks - planned,
        "requests": math.ceil(sample.traffic.requests / sample.slices * looks),
        "bytes": math.ceil(sample.traffic.bytes / sample.slices * looks),
        "loaders": pools.loaders,
        "scorers": pools.scorers,
        "gpus": pools.scorers * pools.gpus_per_scorer,
        "load_seconds_per_slice": round(load, 5),
        "score_seconds_per_slice": round(score, 5),
        "loaders_per_scorer": round(load / score, 2),
        "bottleneck": max(stages, key=lambda stage: stages[stage]),
        "hours": round(looks * max(stages.values()) / 3600, 3),
        "sampled_slices": sample.slices,
        "sampled_failures": failed_slices(sample.slabs, manifest)["error"].to_pylist()[:3],
    }


def take_sample(manifest: pa.Table, model: str, settings: RunSettings, pools: Pools) -> Sample:
    """Load and score slabs of tomograms here and there, one at a time, until the time is up."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:SAMPLE_TOMOGRAMS]
    loader = _start(Stage(LoadSlab, {"settings": settings}), 0)
    arguments = {"settings": settings, "model": model, "per_node": math.ceil(pools.scorers / nodes())}
    scorer = _start(Stage(ScoreFrames, arguments), pools.gpus_per_scorer)
    taken: list[Sample] = []
    with progress_bar("sampling", round(SAMPLE_SECONDS), "seconds") as show:
        started: float | None = None
        for number, row in enumerate(rows.tolist()):
            plan = next(first_look(manifest.slice(row, 1), settings))
            taken.append(_try_one(loader, scorer, plan.slice(number % len(plan), 1)))
            started = started or time.monotonic()  # the first slab waits for the actors
            spent = time.monotonic() - started
            show(round(min(spent, SAMPLE_SECONDS)))
            if spent > SAMPLE_SECONDS:
                break
    timed = taken[1:] or taken
    return Sample(
        pa.concat_tables(one.slabs for one in taken),
        sum(one.slices for one in timed),
        sum(one.load_seconds for one in timed),
        sum(one.score_seconds for one in timed),
        Traffic(sum(one.traffic.requests for one in timed), sum(one.traffic.bytes for one in timed)),
    )


def follow_ups(sample: Sample, manifest: pa.Table, settings: RunSettings) -> float:
    """Slices of a second look for each of the first, as the sample has it."""
    rows = manifest.filter(pc.is_in(manifest["tomo_id"], sample.slabs["tomo_id"].combine_chunks())).to_pylist()
    strides = {row["tomo_id"]: z_stride(row["voxel_spacing_angstrom"], settings) for row in rows}
    again = second_look(sample.slabs, {row["tomo_id"]: row["size_z"] for row in rows}, strides, settings.detect)
    looked_at = len(sample.slabs["slices"].combine_chunks().flatten())
    return sum(map(len, again.values())) / looked_at


def _start(stage: Stage, gpus: int) -> Any:
    return ray.remote(num_cpus=1, num_gpus=gpus)(_Timed).remote(stage)


def _try_one(loader: Any, scorer: Any, plan: pa.Table) -> Sample:
    try:
        frames, load_seconds, fetched = ray.get(loader.run.remote(plan))
        slabs, score_seconds, _ = ray.get(scorer.run.remote(frames))
    except ray.exceptions.RayError as error:
        raise UnfinishedError(f"the sample cannot be taken: {root_cause(error)}") from error
    return Sample(slabs, len(plan["zs"][0]), load_seconds, score_seconds, fetched)
