"""Tomograms that were handed to the endpoint: looked at one after another, slab by slab, with its detectors.

The same two looks as in bulk detection, on one tomogram:

    record -> MANIFEST row -> first look -> slabs -> detectors -> second look -> slabs -> detectors -> motors -> record

What is under way is known from the storage alone, so whoever comes after a process that died goes on.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from motor_ray.archive.discover import discover
from motor_ray.archive.plan import looks, z_stride
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.description import rescorer_hash
from motor_ray.distributed.learned import rescoring
from motor_ray.errors import CheckpointError, MotorRayError, OutageError, TomogramError
from motor_ray.motors.link import Rescore, link_slabs, slices_of
from motor_ray.motors.second_look import second_look
from motor_ray.service.backend import ModelCard
from motor_ray.service.intake import check_volume
from motor_ray.service.jobs import Jobs, Record
from motor_ray.service.problems import OURS, describe, problem_of
from motor_ray.service.results import motors_shown
from motor_ray.service.settings import ServeSettings
from motor_ray.service.together import all_or_none
from motor_ray.slab_plan import plan_of
from motor_ray.tables import MANIFEST, SLABS

SLAB_SLICES = 4
"""Few, so that an image that comes in between does not wait long for the device."""

SLABS_AHEAD = 2
"""Slabs of a tomogram at the detectors at a time, for each detector that there may be: one is prepared meanwhile."""

POLL_SECONDS = 2.0
"""How long a tomogram waits at most if nobody says that it has come."""

NOTE_SECONDS = 1.0
"""How often the storage hears how far a tomogram is."""

CHANGEOVER_POLLS = 60
"""How often a detector is asked that has yet to be replaced, POLL_SECONDS apart."""

ATTEMPTS = 3
"""Times that a tomogram is begun; one that ends its process, or its detectors, each time is given up."""

CLEAN_SECONDS = 600.0
"""How often what is too old is removed."""

AskSlab = Callable[[Mapping[str, Any], str], Awaitable[Mapping[str, Any]]]
"""Takes a PLAN row and a model's name to a detector, and brings back a SLABS row, and the model's hash as ``model``."""

Model = Callable[[], "Served"]
"""A model by name. Raises CheckpointError if it is not what it was; that concerns those who ask for it alone."""

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """A model, as tomograms are looked at with it."""

    settings: RunSettings
    sha256: str

    rescore: Rescore | None
    """How what was linked is judged, if it has learned that."""

    def is_by(self, answer: Mapping[str, Any]) -> bool:
        """Whether a detector's answer, a SLABS row and ``model``, is this model's, with what judging takes."""
        return answer["model"] == self.sha256[:12] and (self.rescore is None or has_features(answer))


def served(card: ModelCard) -> Served:
    """The model of a card. Raises CheckpointError if the head that it had learned then is not there any more."""
    if card.rescorer_sha256 is None:
        return Served(settings_from(card.settings), card.sha256, None)
    if rescorer_hash(card.uris[0]) != card.rescorer_sha256:
        raise CheckpointError(
            f"{card.uris[0]}: has learned to re-score anew, or not any more, since the endpoint was started; deploy it "
            "again, so that the threshold is that of the same scores"
        )
    return Served(settings_from(card.settings), card.sha256, rescoring(card.uris[0], card.sha256))


def has_features(slab: Mapping[str, Any]) -> bool:
    """Whether every detection of a SLABS row has the features by which candidates are judged."""
    return all(box.get("features") for entry in slab["slices"] for box in entry["detections"])


class TomogramDesk:
    """Takes tomograms from the queue and looks at them, a few side by side. There is one at a time on a storage."""

    def __init__(self, jobs: Jobs, ask: AskSlab, models: Mapping[str, Model], settings: ServeSettings) -> None:
        self.jobs, self.ask, self.models, self.settings = jobs, ask, models, settings
        self.bell = asyncio.Event()
        self.at_work: dict[str, asyncio.Task[None]] = {}
        self.ahead = SLABS_AHEAD * settings.max_detectors

    async def run(self) -> None:
        """Work until cancelled."""
        cleaned = -CLEAN_SECONDS
        try:
            while True:
                self.bell.clear()
                try:
                    await self.take_up()
                    if time.monotonic() - cleaned > CLEAN_SECONDS:
                        cleaned = time.monotonic()
                        await asyncio.to_thread(self.jobs.forget_old, self.settings.keep_hours)
                except MotorRayError as error:
                    log.warning("tomograms cannot be taken up: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self.bell.wait()
        finally:
            for task in self.at_work.values():
                task.cancel()

    async def take_up(self) -> None:
        """Begin with those that wait, as far as there is room."""
        waiting = [one for one in await asyncio.to_thread(self.jobs.waiting) if one not in self.at_work]
        for job_id in waiting[: self.settings.tomograms_at_once - len(self.at_work)]:
            task = asyncio.create_task(self.work(job_id))
            self.at_work[job_id] = task
            task.add_done_callback(lambda task, job_id=job_id: self._is_over(job_id, task))  # type: ignore[misc]

    def _is_over(self, job_id: str, task: asyncio.Task[None]) -> None:
        del self.at_work[job_id]
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.bell.set()
        else:  # it is still in the queue, and is begun again, but not at once
            log.error("tomogram %s: %s", job_id, error, exc_info=None if isinstance(error, MotorRayError) else error)

    async def work(self, job_id: str) -> None:
        """Look at one tomogram, and note what was found or why nothing. Raises StorageError if that cannot be noted."""
        # Not from the list of those that wait: it may have been finished since that was made.
        record = await asyncio.to_thread(self.jobs.begin, job_id)
        if record is None:
            return
        record["attempts"] += 1
        try:
            check_attempts(record)
            await self._note(record, status="running", slices_done=0, slices_planned=0)
            record |= await self.look_at(record)
            record["status"] = "done"
        except OutageError as error:
            log.warning("tomogram %s: %s; it is begun again", job_id, error)
            await asyncio.sleep(POLL_SECONDS)
            await self._note(record, status="queued")
            return
        except MotorRayError as error:
            log.warning("tomogram %s: %s", job_id, error)
            problem = problem_of(error)
            record |= {"status": "failed", "problem": describe(problem.status, problem.detail)}
        except Exception:
            log.exception("tomogram %s broke", job_id)
            record |= {"status": "failed", "problem": describe(500, OURS[500])}
        await asyncio.to_thread(self.jobs.finish, record)

    async def look_at(self, record: Record) -> Record:
        """What was found in a tomogram: motors, failures, model and size."""
        named = self.models.get(record["model_name"])
        if named is None:
            raise TomogramError(f"The model {record['model_name']!r} is not served any more")
        model = await asyncio.to_thread(named)
        settings = model.settings
        row = await asyncio.to_thread(manifest_row, record, self.jobs, settings)
        record |= {name: row[name] for name in ("size_z", "size_y", "size_x", "voxel_spacing_angstrom")}
        spacing = row["voxel_spacing_angstrom"]
        check_volume((row["size_z"], row["size_y"], row["size_x"]), spacing, self.settings.image_pixels)
        stride = z_stride(spacing, settings)
        slabs = await self._score(record, row, model, looks(row["size_z"], stride))
        sizes, strides = {row["tomo_id"]: row["size_z"]}, {row["tomo_id"]: stride}
        again = second_look(slabs, sizes, strides, settings.detect).get(row["tomo_id"], [])
        slabs = pa.concat_tables([slabs, await self._score(record, row, model, again)])
        return await asyncio.to_thread(found_in, slabs, row, model)

    async def _score(self, record: Record, row: Mapping[str, Any], model: Served, zs: list[int]) -> pa.Table:
        """The SLABS of some slices of a tomogram."""
        plan = plan_of([dict(row)], {row["tomo_id"]: zs}, model.settings, SLAB_SLICES).to_pylist()
        await self._note(record, slices_planned=record["slices_planned"] + len(zs))
        room, noted, noting = asyncio.Semaphore(self.ahead), time.monotonic(), asyncio.Lock()

        async def one(slab: Mapping[str, Any]) -> Mapping[str, Any]:
            nonlocal noted
            async with room:
                answer = await self._answer(slab, record["model_name"], model)
            record["model"] = answer["model"]
            record["slices_done"] += len(slab["zs"])
            # One note at a time: an older one must not arrive after a newer one.
            if time.monotonic() - noted > NOTE_SECONDS and not noting.locked():
                async with noting:
                    await self._note(record)
                noted = time.monotonic()
            return answer

        answers = await all_or_none(one(slab) for slab in plan)
        rows = [{name: answer[name] for name in SLABS.names} for answer in answers]
        return pa.Table.from_pylist(rows, schema=SLABS)

    async def _answer(self, slab: Mapping[str, Any], name: str, model: Served) -> Mapping[str, Any]:
        """What the model says of a PLAN row. Raises OutageError if all detectors are of another one for long."""
        for poll in range(CHANGEOVER_POLLS):
            if poll:
                await asyncio.sleep(POLL_SECONDS)  # a detector of the model before, or after, is being replaced
            answer = await self.ask(slab, name)
            if model.is_by(answer):
                return answer
        raise OutageError(f"No detector is the model {name!r} as it was when the endpoint was started")

    async def _note(self, record: Record, **changes: Any) -> None:
        """Write down how far a tomogram is. Raises TomogramError if there is no more to be done about it."""
        record |= changes
        if not await asyncio.to_thread(self.jobs.note, record):
            raise TomogramError("The tomogram was forgotten, or finished elsewhere, meanwhile")


def check_attempts(record: Record) -> None:
    """Raises TomogramError for one that was begun too often."""
    if record["attempts"] > ATTEMPTS:
        raise TomogramError(
            f"The tomogram was begun {ATTEMPTS} times, and each time the process ended, or no detector or storage "
            "answered; hand it in again"
        )


def manifest_row(record: Record, jobs: Jobs, settings: RunSettings) -> dict[str, Any]:
    """The MANIFEST row of a tomogram that was handed in. Raises TomogramError if its URI leads to none, or several."""
    if record["uri"] is None:
        sizes = {name: record[name] for name in ("size_z", "size_y", "size_x", "voxel_spacing_angstrom")}
        return {
            "tomo_id": record["id"],
            "uri": jobs.volume(record["id"]),
            "format": "mrc",
            "chunk_depth": None,
            **sizes,
        }
    found = one_tomogram(record["uri"], settings)
    spacing = record["voxel_spacing_angstrom"] or found["voxel_spacing_angstrom"]
    return {name: found.get(name) for name in MANIFEST.names} | {"voxel_spacing_angstrom": spacing}


def one_tomogram(uri: str, settings: RunSettings) -> dict[str, Any]:
    """The MANIFEST row of what lies at `uri`; not more is listed than it takes to know that it is one tomogram."""
    rows: list[dict[str, Any]] = []
    for found in discover(uri, settings.archive):
        if found.failures:
            raise TomogramError(found.failures[0]["error"])
        rows += found.tomograms
        if len(rows) > 1:
            raise TomogramError(f"{uri}: holds several tomograms, such as {rows[0]['tomo_id']}; name one of them")
    if not rows:
        raise TomogramError(f"{uri}: holds no tomogram")
    return rows[0]


def found_in(slabs: pa.Table, row: Mapping[str, Any], model: Served) -> Record:
    """What was found on the SLABS of a whole tomogram. Raises TomogramError if hardly any slice can be read."""
    manifest = pa.Table.from_pylist([dict(row)], schema=MANIFEST)
    slices = slices_of(slabs).sort_by("z")
    bad = slices.filter(pc.not_equal(slices["status"], "ok"))
    # Where an uploaded tomogram lies is nobody's business.
    failures = [
        {"z": one["z"], "error": one["error"].replace(row["uri"], "the tomogram")}
        for one in bad.select(["z", "error"]).to_pylist()
    ]
    if len(failures) > (1 - model.settings.detect.good_share) * len(slices):
        first = failures[0]
        raise TomogramError(
            f"Of the {len(slices)} slices that were looked at {len(failures)} cannot be read, such as slice "
            f"{first['z']}: {first['error']}"
        )
    motors = link_slabs(slabs, manifest, model.settings.link, model.rescore).to_pylist()
    return {"motors": motors_shown(motors), "failures": failures}
