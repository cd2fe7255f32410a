"""What our contestants of the detection benchmark do, each in a process of its own.

    python -m motor_ray.bench.contestants JOB.json

A contestant reads the slices of the job's manifest, makes frames of them and hands them to a scorer, which writes
notes; what is found goes to files. What it says of itself goes to result.json in the job's folder. It imports what it
needs when it runs, since its start is measured, too.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from motor_ray.bench.peers import daft, torch_data_loader
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.machine import cores
from motor_ray.slab_plan import first_look
from motor_ray.storage import join, read_json, read_table, write_json, write_table

if TYPE_CHECKING:
    from motor_ray.bench.devices import StandIn
    from motor_ray.distributed.pipeline import Stage
    from motor_ray.distributed.preflight import Pools
    from motor_ray.distributed.progress import Board

Said = dict[str, Any]


class Job(NamedTuple):
    """What a contestant is given."""

    contestant: str
    """One of CONTESTANTS."""

    folder: str
    """Where its files go; the manifest is there already."""

    settings: dict[str, Any]
    """RunSettings as JSON."""

    slices: int
    """How many the manifest has."""

    seconds: float = 0.0
    """What the stand-in takes for a slice."""

    model: str | None = None
    """Checkpoint folder of the real model, which then takes the stand-in's place."""

    def place(self, name: str) -> str:
        """Path of a file of the job."""
        return join(self.folder, name)

    def run_settings(self) -> RunSettings:
        """The settings as they were."""
        return settings_from(self.settings)

    def manifest(self) -> pa.Table:
        """The MANIFEST."""
        return read_table(self.place("manifest.parquet"))

    def plan(self) -> pa.Table:
        """The PLAN of all slices."""
        return pa.concat_tables(first_look(self.manifest(), self.run_settings()))

    def stand_in(self) -> "StandIn":
        """The scorer of a contestant that does without Ray."""
        from motor_ray.bench.devices import StandIn

        return StandIn(self.place("scored.txt"), self.run_settings(), self.seconds)


def motor_ray(job: Job) -> Said:
    """The pipeline of `motor-ray detect`, on a Ray of its own."""
    from motor_ray.distributed.cluster import connected
    from motor_ray.distributed.detect import write_plan
    from motor_ray.distributed.loading import LoadSlab
    from motor_ray.distributed.pipeline import Places, Stage, run_pipeline
    from motor_ray.distributed.preflight import local_slots, plan_pools, room
    from motor_ray.distributed.progress import watched

    settings = job.run_settings()
    with connected(local_slots(settings.detect)):
        pools = plan_pools(room(), settings.detect)
        places = Places(*(job.place(name) for name in ("plan.parquet", "slabs", "notes")))
        write_plan(first_look(job.manifest(), settings), places.plan)
        with watched("bench", job.slices, "slices") as board:
            loader = Stage(LoadSlab, {"settings": settings, "count": board.count})
            scorer = scorer_of(job, pools, board)
            seconds = run_pipeline(places, (), loader, scorer, pools, settings.detect.slabs_per_loader)
            retries = board.read().counts.get("retries", 0)
    return {
        "loaders": pools.loaders,
        "scorers": pools.scorers,
        "load_seconds_per_slice": round(seconds / job.slices, 5),
        "retries": retries,
    }


def scorer_of(job: Job, pools: "Pools", board: "Board") -> "Stage":
    """The job's scorer as an operator of the pipeline, with the arguments that `detect` gives."""
    from motor_ray.bench.devices import StandIn, Timed
    from motor_ray.distributed.pipeline import Stage

    arguments = {"notebook": job.place("scored.txt"), "settings": job.run_settings(), "report": board.tick}
    if job.model is None:
        return Stage(StandIn, arguments | {"seconds": job.seconds})
    return Stage(Timed, arguments | {"model": job.model, "per_node": pools.scorers})


def plain_loop(job: Job) -> Said:
    """Load a slab, score it, load the next one."""
    from motor_ray.distributed.loading import LoadSlab

    load, score, plan = LoadSlab(job.run_settings()), job.stand_in(), job.plan()
    write_table(pa.concat_tables(score(load(plan.slice(n, 1))) for n in range(len(plan))), job.place("slabs.parquet"))
    return {}


def resident(job: Job) -> Said:
    """The real model on frames that are in memory already, with as many threads as the pipeline gives one scorer."""
    import torch

    from motor_ray.bench.devices import Noted
    from motor_ray.detector.looks import Looker
    from motor_ray.distributed.loading import LoadSlab

    settings, plan = job.run_settings(), job.plan()
    [row] = plan.slice(0, 1).to_pylist()
    images = LoadSlab(settings).load(row)["frames"]  # one tile each, which takes the place of the channel
    look = Noted(Looker(str(job.model), settings.detect, threads=cores(), compiled="off"), job.place("scored.txt"))
    for zs in plan["zs"].to_pylist():
        look(images[: len(zs)])
    return {"threads": torch.get_num_threads()}


def run_daft(job: Job) -> Said:
    """A Daft pipeline of the same work."""
    return daft(job.plan(), job.run_settings(), job.stand_in, job.place("slabs"))


def run_torch_data_loader(job: Job) -> Said:
    """PyTorch's DataLoader, for the same work."""
    return torch_data_loader(job.plan(), job.run_settings(), job.stand_in(), job.place("slabs.parquet"))


CONTESTANTS: dict[str, Callable[[Job], Said]] = {
    "motor_ray": motor_ray,
    "daft": run_daft,
    "torch_data_loader": run_torch_data_loader,
    "plain_loop": plain_loop,
    "resident": resident,
}


def main(path: str) -> None:
    """Do the job that the JSON file at `path` describes."""
    job = Job(**read_json(path))
    write_json(job.place("result.json"), CONTESTANTS[job.contestant](job))


if __name__ == "__main__":
    main(sys.argv[1])
