"""Bulk detection: a MANIFEST and a checkpoint in, tables of motors out.

    plan.parquet        every k-th slice of every tomogram  -> pipeline -> slabs/
    second_look.parquet the slices around what was seen     -> pipeline -> slabs/
    slabs/              -> motors.parquet, failures.parquet, run.json

The same command goes on with a run that broke off, and leaves a finished one alone.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from motor_ray import __version__
from motor_ray.archive.manifest import check_usable, write_manifest
from motor_ray.archive.plan import z_stride
from motor_ray.config import PASSES, RunSettings
from motor_ray.config_values import results_hash
from motor_ray.detector.description import Ensemble, Models, describe_models
from motor_ray.distributed.cluster import connected, nodes
from motor_ray.distributed.estimate import estimate
from motor_ray.distributed.learned import Learned, learned_of
from motor_ray.distributed.ledger import (
    alone,
    complete_pieces,
    done_slabs,
    gather,
    plan_pieces,
    settle,
    storage_watched,
)
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.pipeline import Places, Stage, run_pipeline
from motor_ray.distributed.preflight import Pools, local_slots, plan_pools, room
from motor_ray.distributed.progress import Board, News, watched
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.distributed.sharing import first_tomogram, require_shared
from motor_ray.errors import RunError, UnfinishedError
from motor_ray.motors.second_look import second_look
from motor_ray.slab_plan import first_look, plan_of
from motor_ray.storage import absolute, exists, join, read_json, retries, write_bytes, write_json
from motor_ray.tables import PLAN, table_hash

log = logging.getLogger(__name__)

LOOKS = {"first look": "plan.parquet", "second look": "second_look.parquet"}
"""The passes over an archive, and the files of their plans."""

LINKING = "linking"
"""Status of a run that has looked at everything, and whose motors are judged anew."""

COMPILE_PAYS_AFTER = 600
"""720 x 720 frames per scorer after which torch.compile has earned back the half minute it takes, on two CPU cores:
`motor-ray bench model` measured 0.08 s saved a frame."""


def detect(manifest: pa.Table, unusable: pa.Table, model: Models, out: str, settings: RunSettings) -> dict[str, Any]:
    """Look for motors in every tomogram of the MANIFEST; returns what run.json says.

    `settings` gives how to read, detect and link; frames, grey levels and network come from the checkpoint `model`, or
    from several that answer together. Under `out` (a path or URI) appear tomograms.parquet, plan.parquet, slabs/,
    motors.parquet, failures.parquet and run.json. A run that broke off is gone on with; a finished one with the same
    settings, model and manifest is returned as it is, or linked again if its model has learned to re-score since and it
    kept the features for that; an `out` with another is refused (RunError). `unusable` are FAILURES that came to light
    before, of tomograms that are not in `manifest`; if there are no others, ManifestError says why. Raises
    CheckpointError if models cannot answer together, RunError if the cluster can never run it or its nodes do not see
    the same files, UnfinishedError if it broke or its counts do not add up.
    """
    check_usable(manifest, unusable)
    out, manifest = absolute(out), manifest.sort_by("tomo_id")
    models = describe_models(model)
    settings = settings_of_model(models.settings, settings)
    learned = learned_of(models, settings)
    if begun_without_features(out) and not settings.detect.features:
        learned = learned.without_rescoring(models, out, settings)
    settings = learned.settings_for(settings)
    run = describe_run(manifest, models, settings) | learned.told()
    there = run_at(out, run)
    if there.get("status") == "done" and there.get("rescorer_sha256") == learned.rescorer_sha256:
        return finished(out, there, learned.calibration)
    if there.get("status") in ("done", LINKING):
        return linked_again(out, there, manifest, settings, unusable, learned)
    started = time.monotonic()
    run["looks"] = there.get("looks", {})
    with connected(local_slots(settings.detect)), alone(out), storage_watched(out):
        job = Job(out, models.uris, manifest, settings, run)
        require_shared([first_tomogram(manifest), *models.uris], out)
        job.start(unusable)
        job.look("first look", lambda: first_look(manifest, settings))
        job.look("second look", job.plan_second_look)
        counts = gather(out, plans_of(out), manifest, settings, unusable, learned.rescore)
        result = run | {"status": "done", "seconds": round(time.monotonic() - started, 1), "counts": counts}
        write_json(join(out, "run.json"), result)
    return result


def begun_without_features(out: str) -> bool:
    """Whether there is a run under `out` whose slabs lack what re-scoring takes."""
    where = join(out, "run.json")
    there = read_json(where) if exists(where) else {}
    return isinstance(there, dict) and there.get("settings", {}).get("detect", {}).get("features") is False


def dry_run(manifest: pa.Table, unusable: pa.Table, model: Models, settings: RunSettings) -> dict[str, Any]:
    """What `detect` would do with the same arguments, and about how long it would take; writes nothing."""
    check_usable(manifest, unusable)
    models = describe_models(model)
    settings = settings_of_model(models.settings, settings)
    settings = learned_of(models, settings).settings_for(settings)
    return estimate(manifest, models.uris, settings) | {"unusable": unusable["error"].to_pylist()}


def settings_of_model(trained: RunSettings, asked: RunSettings) -> RunSettings:
    """How to run a trained model: what it saw in training stays, how to read and detect is asked for anew."""
    return trained.model_copy(update={name: getattr(asked, name) for name in ("archive", "detect", "link")})


def describe_run(manifest: pa.Table, models: Ensemble, settings: RunSettings) -> dict[str, Any]:
    """What makes two runs the same: tomograms, weights and settings; and who ran it."""
    return {
        "settings": settings.model_dump(mode="json"),
        "settings_hash": results_hash(settings),
        "model_sha256": models.sha256,
        "models": models.told(),
        "manifest_hash": table_hash(manifest),
        "tomograms": len(manifest),
        "slices": sum(manifest["size_z"].to_pylist()),
        "versions": {"motor_ray": __version__, "ray": ray.__version__},
    }


def run_at(out: str, run: dict[str, Any]) -> dict[str, Any]:
    """The run.json under `out`, empty if there is none. Raises RunError if `out` is another run's."""
    if not exists(join(out, "run.json")):
        return {}
    there = read_json(join(out, "run.json"))
    there = there if isinstance(there, dict) else {}
    identity = ("settings_hash", "model_sha256", "manifest_hash")
    differing = [name for name in identity if there.get(name) != run[name]]
    if differing:
        begun = join(out, "tomograms.parquet")
        hint = f", or --manifest {begun} to go on with its tomograms" if differing == ["manifest_hash"] else ""
        raise RunError(f"{out}: holds a run with another {' and '.join(differing)}; give --out another folder{hint}")
    return there


def finished(out: str, there: dict[str, Any], calibration: dict[str, Any] | None) -> dict[str, Any]:
    """The run.json of a run that is done, with what has been learned of its model since."""
    if there.get("calibration") == calibration:
        log.info("%s: this run is finished already; nothing to do", out)
        return there
    write_json(join(out, "run.json"), there | {"calibration": calibration})
    log.info("%s: this run is finished already; it takes over the calibration of its model", out)
    return there | {"calibration": calibration}


def linked_again(
    out: str, there: dict[str, Any], manifest: pa.Table, settings: RunSettings, unusable: pa.Table, learned: Learned
) -> dict[str, Any]:
    """The run.json of a run that is done once its candidates are judged as its model has learned to since.

    Nobody looks at a slice. Killed on the way, it is linked again the next time, and counts as unfinished till then.
    """
    with alone(out), storage_watched(out):
        write_json(join(out, "run.json"), there | {"status": LINKING})
        counts = gather(out, plans_of(out), manifest, settings, unusable, learned.rescore)
        result = there | learned.told() | {"status": "done", "counts": counts}
        write_json(join(out, "run.json"), result)
    log.info("%s: this run is finished already; its motors were linked again, for its model judges them anew", out)
    return result


def plans_of(out: str) -> list[str]:
    """URIs of the plans of both looks of the run under `out`."""
    return [join(out, name) for name in LOOKS.values()]


class Job:
    """A run that is under way: the same archive is looked at twice."""

    def __init__(
        self, out: str, models: list[str], manifest: pa.Table, settings: RunSettings, run: dict[str, Any]
    ) -> None:
        self.out, self.models, self.manifest, self.settings, self.run = out, models, manifest, settings, run
        self.pools = self._pools()
        # What Ray Data notes as done holds for one model, one archive and one set of settings only.
        identity = f"{run['model_sha256'][:12]}-{run['settings_hash']}-{run['manifest_hash']}"
        self.notes = join(out, "checkpoints", identity)

    def start(self, unusable: pa.Table) -> None:
        """Write what a run begins with, and mend what one that broke off left behind."""
        write_json(join(self.out, "run.json"), self.run | {"status": "running"})
        write_manifest(self.manifest, join(self.out, "tomograms.parquet"), unusable)
        settle(join(self.out, "slabs"), self.notes)

    def look(self, name: str, make_plan: Callable[[], Iterable[pa.Table]]) -> None:
        """Score the slabs of a look that are not done; its plan is made by `make_plan` if it is not there yet."""
        places = Places(join(self.out, LOOKS[name]), join(self.out, "slabs"), self.notes)
        if not exists(places.plan):
            write_plan(make_plan(), places.plan)
        done = done_slabs(self.notes)
        tally = Tally(self.manifest, places.plan, done)
        if name in self.run["looks"] and not tally.left:
            return
        try:
            self.pools = self._pools()
        except RunError as error:  # of what was there at the start not enough is left
            raise UnfinishedError(
                f"{self.out}: stopped before the {name}: {error}; run the same command again"
            ) from None
        load_seconds = self._score(name, places, done, tally) if tally.left else 0.0
        self.run["looks"][name] = tally.summary(load_seconds, self.pools)
        write_json(join(self.out, "run.json"), self.run | {"status": "running"})

    def plan_second_look(self) -> Iterable[pa.Table]:
        """The PLAN of what is worth a closer look, in pieces."""
        detect, first = self.settings.detect, plans_of(self.out)[:1]
        for tomograms, slabs in complete_pieces(self.out, first, self.manifest):
            rows = tomograms.to_pylist()
            sizes = {row["tomo_id"]: row["size_z"] for row in rows}
            strides = {row["tomo_id"]: z_stride(row["voxel_spacing_angstrom"], self.settings) for row in rows}
            yield plan_of(rows, second_look(slabs, sizes, strides, detect), self.settings)

    def _pools(self) -> Pools:
        """Actors for what the cluster is now; how many loaders a scorer needs is known from the second look on."""
        pools = plan_pools(room(), self.settings.detect, len(self.models))
        rates = [said for said in self.run["looks"].values() if "score_seconds_per_slice" in said]
        if not rates or self.settings.detect.loaders:
            return pools
        return pools.balanced(rates[-1]["load_seconds_per_slice"], rates[-1]["score_seconds_per_slice"])

    def _score(self, name: str, places: Places, done: set[str], tally: "Tally") -> float:
        with watched(name, tally.slices, "slices", tally.tell) as board:
            loader = Stage(LoadSlab, loader_arguments(self.settings) | {"count": board.count})
            scorer = Stage(ScoreFrames, self._scorer_arguments(tally.left, board))
            return run_pipeline(places, done, loader, scorer, self.pools, self.settings.detect.slabs_per_loader)

    def _scorer_arguments(self, slices: int, board: Board) -> dict[str, Any]:
        """Constructor arguments of ScoreFrames, small and picklable: models go by name."""
        scorers = self.pools.scorers
        return {
            "settings": self.settings,
            "model": self.models,
            "per_node": math.ceil(scorers / nodes()),
            "compiled": compilation(slices // scorers, self.settings),
            "report": board.tick,
        }


def compilation(slices: int, settings: RunSettings) -> Literal["on", "off", "if possible"]:
    """Whether a scorer of so many `slices` compiles its network: as asked, or if that pays."""
    if settings.detect.compile != "auto":
        return settings.detect.compile
    frames = slices * PASSES[settings.detect.tta] * (settings.frame.size / 720) ** 2
    return "if possible" if frames >= COMPILE_PAYS_AFTER else "off"


def write_plan(pieces: Iterable[pa.Table], uri: str) -> None:
    """Write the PLAN in `pieces` to the parquet file `uri`, whole or not at all."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, PLAN) as writer:
        for piece in pieces:
            writer.write_table(piece)
    write_bytes(uri, sink.getvalue().to_pybytes())


class Tally:
    """How far a look is: slices and tomograms, from what is planned, what was done before and what a board says."""

    def __init__(self, manifest: pa.Table, plan: str, done: set[str]) -> None:
        self.slices = self.before = 0
        self.unseen: Counter[str] = Counter()
        for _, slabs in plan_pieces([plan], manifest):
            for slab in slabs.select(["slab_id", "tomo_id", "zs"]).to_pylist():
                slices = len(slab["zs"])
                self.slices += slices
                is_done = slab["slab_id"] in done
                self.before += slices if is_done else 0
                self.unseen[slab["tomo_id"]] += 0 if is_done else slices
        self.tomograms, self.finished = len(self.unseen), sum(not left for left in self.unseen.values())
        self.retries_before = retries()
        self.news = News(0, "", None, {}, {}, 0.0, None)

    @property
    def left(self) -> int:
        """Slices that are still to be looked at."""
        return self.slices - self.before

    def tell(self, news: News) -> tuple[int, str]:
        """Slices that are done, and the rest in words."""
        for tomo_id, slices in news.ticks.items():
            left = self.unseen[tomo_id]
            self.unseen[tomo_id] = left - slices
            self.finished += left > 0 >= left - slices
        self.news = news
        rate = f", {self._rate():.0f} slices/s" if news.steady else ""
        # A slab that is looked at again because an actor was lost is counted again.
        return min(self.before + news.done, self.slices), f"{self.finished:,} of {self.tomograms:,} tomograms{rate}"

    def _rate(self) -> float:
        steady = self.news.steady
        return steady.done / steady.span if steady else 0.0

    def summary(self, load_seconds: float, pools: Pools) -> dict[str, Any]:
        """What run.json says of a look that is done: rates of each actor, and how busy the scorers were."""
        said: dict[str, Any] = {
            "slices": self.slices,
            "done_before": self.before,
            "loaders": pools.loaders,
            "scorers": pools.scorers,
            "retries": self.news.counts.get("retries", 0) + retries() - self.retries_before,
        }
        if not (steady := self.news.steady):
            return said
        return said | {
            "slices_per_second": round(self._rate(), 2),
            "load_seconds_per_slice": round(load_seconds / self.news.done, 6),
            "score_seconds_per_slice": round(self.news.seconds / self.news.done, 6),
            "scorers_busy": round(steady.seconds / (pools.scorers * steady.span), 3),
        }
