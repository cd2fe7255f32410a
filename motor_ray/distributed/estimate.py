"""What a detection would take, from a plan and a sample of it, without writing anything."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from motor_ray.archive.plan import z_stride
from motor_ray.config import RunSettings
from motor_ray.distributed.cluster import connected, nodes, root_cause
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.pipeline import Stage
from motor_ray.distributed.preflight import Pools, Room, local_slots, plan_pools, room
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import UnfinishedError
from motor_ray.motors.failures import failed_slices
from motor_ray.motors.second_look import second_look
from motor_ray.progress import progress_bar
from motor_ray.slab_plan import first_look
from motor_ray.storage import Traffic, traffic

SAMPLE_SECONDS = 30.0

SAMPLE_TOMOGRAMS = 200
"""Tomograms of which a slab each is sampled, at most, as far as the time goes."""


class Take(NamedTuple):
    """What became of a slab, and what that took; core seconds are those of all threads of its process."""

    slabs: pa.Table
    slices: int
    load_seconds: float
    load_core_seconds: float
    score_seconds: float
    score_core_seconds: float
    requests: int
    bytes: int


class Sample(NamedTuple):
    """What became of a few slabs, one after the other."""

    takes: list[Take]
    start_seconds: float
    """Until the actors were there and the first slab was done."""

    def of(self, name: str) -> NDArray[np.float64]:
        """That column of the takes, but of the first, which took longer because it was the first."""
        return np.array([getattr(take, name) for take in self.takes[1:] or self.takes], float)

    def a_slice(self, name: str) -> float:
        """That column, for a slice."""
        return float(self.of(name).sum() / self.of("slices").sum())

    def variation(self, name: str) -> float:
        """By which share of the mean that column differs between slabs of equal length: the standard deviation."""
        each = self.of(name) / self.of("slices")
        return float(each.std() / each.mean()) if each.any() else 0.0


class Measured(NamedTuple):
    """A cluster, the actors that are planned on it, a sample of an archive, and slices that follow each of it."""

    room: Room
    pools: Pools
    sample: Sample
    again: float


class _Timed:
    """An operator, and how long it takes."""

    def __init__(self, stage: Stage) -> None:
        self.operator = stage.operator(**stage.arguments)

    def run(self, table: pa.Table) -> tuple[pa.Table, float, float, Traffic]:
        started, cores_before, before = time.perf_counter(), time.process_time(), traffic()
        result = self.operator(table)
        seconds, core_seconds = time.perf_counter() - started, time.process_time() - cores_before
        return result, seconds, core_seconds, traffic().since(before)


def estimate(manifest: pa.Table, models: list[str], settings: RunSettings) -> dict[str, Any]:
    """How many slices `detect` would look at, what it would fetch, with which actors, and about how long it takes.

    `settings` are complete: those of the model among them. Works on a sample of half a minute, on the cluster that
    the run would use. Raises RunError if that can never run it, UnfinishedError if the sample cannot be taken.
    """
    slices = sum(manifest["size_z"].to_pylist())
    planned = sum(len(piece["zs"].combine_chunks().flatten()) for piece in first_look(manifest, settings))
    _, pools, sample, again = measure(manifest, models, settings)
    looks = round(planned * (1 + again))
    load, score = sample.a_slice("load_seconds"), sample.a_slice("score_seconds")
    stages = {"loading": load / pools.loaders, "scoring": score / pools.scorers}
    return {
        "tomograms": len(manifest),
        "slices": slices,
        "first_look": planned,
        "second_look": looks - planned,
        "requests": math.ceil(sample.a_slice("requests") * looks),
        "bytes": math.ceil(sample.a_slice("bytes") * looks),
        "loaders": pools.loaders,
        "scorers": pools.scorers,
        "gpus": pools.scorers * pools.gpus_per_scorer,
        "load_seconds_per_slice": round(load, 5),
        "score_seconds_per_slice": round(score, 5),
        "loaders_per_scorer": round(load / score, 2),
        "bottleneck": max(stages, key=lambda stage: stages[stage]),
        "hours": round(looks * max(stages.values()) / 3600, 3),
        "sampled_slices": int(sample.of("slices").sum()),
        "sampled_failures": failed_slices(slabs_of(sample), manifest)["error"].to_pylist()[:3],
    }


def measure(manifest: pa.Table, models: list[str], settings: RunSettings) -> Measured:
    """Half a minute's sample of the MANIFEST, on the cluster that a run would use; raises as `estimate`."""
    with connected(local_slots(settings.detect)):
        there = room()
        pools = plan_pools(there, settings.detect, len(models))
        sample = take_sample(manifest, models, settings, pools)
    return Measured(there, pools, sample, follow_ups(sample, manifest, settings))


def take_sample(manifest: pa.Table, models: list[str], settings: RunSettings, pools: Pools) -> Sample:
    """Load and score slabs of tomograms here and there, one at a time, until the time is up."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:SAMPLE_TOMOGRAMS]
    loader = _start(Stage(LoadSlab, loader_arguments(settings)), 0)
    arguments = {"settings": settings, "model": models, "per_node": math.ceil(pools.scorers / nodes())}
    scorer = _start(Stage(ScoreFrames, arguments), pools.gpus_per_scorer)
    takes: list[Take] = []
    asked, start_seconds = time.monotonic(), 0.0
    with progress_bar("sampling", round(SAMPLE_SECONDS), "seconds") as show:
        for number, row in enumerate(rows.tolist()):
            plan = next(first_look(manifest.slice(row, 1), settings))
            takes.append(_try_one(loader, scorer, plan.slice(number % len(plan), 1)))
            # The first slab waits for the actors.
            start_seconds = start_seconds or time.monotonic() - asked
            spent = time.monotonic() - asked - start_seconds
            show(round(min(spent, SAMPLE_SECONDS)))
            if spent > SAMPLE_SECONDS:
                break
    return Sample(takes, start_seconds)


def follow_ups(sample: Sample, manifest: pa.Table, settings: RunSettings) -> float:
    """Slices of a second look for each of the first, as the sample has it."""
    slabs = slabs_of(sample)
    rows = manifest.filter(pc.is_in(manifest["tomo_id"], slabs["tomo_id"].combine_chunks())).to_pylist()
    strides = {row["tomo_id"]: z_stride(row["voxel_spacing_angstrom"], settings) for row in rows}
    again = second_look(slabs, {row["tomo_id"]: row["size_z"] for row in rows}, strides, settings.detect)
    looked_at = len(slabs["slices"].combine_chunks().flatten())
    return sum(map(len, again.values())) / looked_at


def slabs_of(sample: Sample) -> pa.Table:
    """The SLABS of a sample."""
    return pa.concat_tables(take.slabs for take in sample.takes)


def _start(stage: Stage, gpus: int) -> Any:
    return ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus)(_Timed).remote(stage)


def _try_one(loader: Any, scorer: Any, plan: pa.Table) -> Take:
    try:
        frames, *load_seconds, fetched = ray.get(loader.run.remote(plan))
        slabs, *score_seconds, _ = ray.get(scorer.run.remote(frames))
    except ray.exceptions.RayError as error:
        raise UnfinishedError(f"the sample cannot be taken: {root_cause(error)}") from error
    return Take(slabs, len(plan["zs"][0]), *load_seconds, *score_seconds, *fetched)
