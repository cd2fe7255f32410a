import asyncio
import contextlib
import io
import json
import logging
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from motor_ray import storage
from motor_ray.archive.plan import looks
from motor_ray.config_values import settings_from
from motor_ray.detector.description import RESCORER, rescorer_hash
from motor_ray.detector.inference import FEATURES
from motor_ray.detector.rescore import Rescorer, rescorer_file
from motor_ray.distributed import tomograms
from motor_ray.distributed.answering import Answerer, picture_of
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.distributed.serving import model_cards
from motor_ray.distributed.tomograms import ATTEMPTS, SLAB_SLICES, Served, TomogramDesk, served
from motor_ray.errors import OutageError, SliceCorruptError
from motor_ray.motors.link import link_slabs
from motor_ray.motors.neighbourhood import GEOMETRY, PRESENT
from motor_ray.motors.second_look import second_look
from motor_ray.service.backend import ModelCard
from motor_ray.service.jobs import OVER, Jobs, new_id, new_record
from motor_ray.service.settings import ServeSettings, ServiceSettings
from motor_ray.service.together import all_or_none
from motor_ray.slab_plan import plan_of
from motor_ray.storage import DEFAULTS, list_names
from motor_ray.tables import MANIFEST, SLABS
from tests.distributed.conftest import SMALL
from tests.distributed.test_answering import changed
from tests.service.asking import ask, asking
from tests.service.stand_ins import FakeBackend, app_of, mrc

SHA = "ab" * 32
SHAPE = (9, 40, 48)
VOLUME = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.int16)
STRIDED = changed(detect={"exhaustive": False, "z_stride": 4, "candidate_score": 0.0})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits long for anything."""
    monkeypatch.setattr(tomograms, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(tomograms, "NOTE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer(checkpoint, SHA, SMALL, threads=1)


@pytest.fixture
def jobs(tmp_path):
    return Jobs(str(tmp_path / "jobs"), DEFAULTS)


class Asked:
    """Detectors that find the same on every slice, and remember what they were asked."""

    def __init__(self) -> None:
        self.slabs: list[list[int]] = []
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.given_up = self.at_work = self.most = 0

    async def __call__(self, plan, _):
        self.slabs.append(plan["zs"])
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.at_work -= 1
        if self.error:
            raise self.error
        return {**{name: plan[name] for name in ("slab_id", "tomo_id")}, "slices": self.slices(plan), "model": SHA[:12]}

    def slices(self, plan):
        """A motor at one place, which shows on slices 3 to 6."""
        box = {"y": 20.0, "x": 30.0, "height": 9.0, "width": 9.0, "score": 0.9}
        return [
            {"z": z, "status": "ok", "error": None, "note": None, "presence": 0.5}
            | {"detections": [box] if 3 <= z <= 6 else []}
            for z in plan["zs"]
        ]


def asked_of(answerer):
    """What takes slabs to an Answerer of this process."""

    async def ask_slab(plan, _):
        prepared = await asyncio.to_thread(answerer.prepare_slab, plan)
        (answer,) = answerer.look([prepared])
        return {
            "slab_id": plan["slab_id"],
            "tomo_id": plan["tomo_id"],
            "slices": answer.slices,
            "model": answerer.sha256[:12],
        }

    return ask_slab


def submitted(jobs, volume=VOLUME, spacing=13.0, **known):
    """The id of a tomogram that waits."""
    sizes = dict(zip(("size_z", "size_y", "size_x"), volume.shape, strict=True))
    record = new_record(new_id(), "a.mrc", "default", **sizes, voxel_spacing_angstrom=spacing, **known)
    storage.write_bytes(jobs.volume(record["id"]), mrc(volume, spacing or 0))
    jobs.submit(record)
    return record["id"]


def desk_of(jobs, ask_slab, settings=SMALL, model=None, **limits):
    return TomogramDesk(
        jobs, ask_slab, {"default": model or (lambda: Served(settings, SHA, None))}, ServeSettings(**limits)
    )


@contextlib.asynccontextmanager
async def working(*desks):
    """While they work."""
    tasks = [asyncio.create_task(desk.run()) for desk in desks]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(what):
    """Waits for it to become true."""
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.01)


def worked(jobs, *job_ids, ask_slab, settings=SMALL, model=None, **limits):
    """The records of some tomograms when they are over."""

    async def work():
        async with working(desk_of(jobs, ask_slab, settings, model, **limits)):
            await until(lambda: all(jobs.read(one)["status"] in OVER for one in job_ids) and not jobs.waiting())

    asyncio.run(work())
    return [jobs.read(one) for one in job_ids]


def linked(settings, checkpoint, uri, volume, spacing, *, job_id="t"):
    """The motors of bulk detection, best first."""
    sizes = dict(zip(("size_z", "size_y", "size_x"), volume.shape, strict=True))
    row = {"tomo_id": job_id, "uri": str(uri), "format": "mrc", "voxel_spacing_angstrom": spacing, **sizes}
    score, load = ScoreFrames(settings, checkpoint), LoadSlab(settings)

    def slabs(zs):
        return score(load(plan_of([row], {job_id: zs}, SMALL))) if zs else SLABS.empty_table()

    stride = settings.detect.z_stride or 1
    found = slabs(looks(volume.shape[0], stride))
    again = second_look(found, {job_id: volume.shape[0]}, {job_id: stride}, settings.detect).get(job_id, [])
    found = pa.concat_tables([found, slabs(again)])
    return link_slabs(found, pa.Table.from_pylist([row], MANIFEST), settings.link).to_pylist()


@pytest.mark.parametrize("settings", [SMALL, STRIDED], ids=["all slices", "two looks"])
def test_an_uploaded_tomogram_has_the_motors_of_bulk_detection(answerer, checkpoint, tmp_path, jobs, settings):
    volume = np.random.default_rng(1).normal(size=(12, 96, 96)).astype(np.float32)
    (tmp_path / "t.mrc").write_bytes(mrc(volume, 24.0))
    backend = FakeBackend()

    async def through():
        desk = desk_of(jobs, asked_of(answerer), settings)
        backend.wake = lambda: asyncio.sleep(0, desk.bell.set())  # type: ignore[method-assign]
        app = app_of(backend, jobs.uri)
        async with working(desk):
            told = (await asking(app, "POST", "/v1/tomograms", mrc(volume, 24.0))).json()
            while told["status"] not in OVER:
                await asyncio.sleep(0.02)
                told = (await asking(app, "GET", f"/v1/tomograms/{told['id']}")).json()
            await until(lambda: not jobs.waiting())
            return told

    told = asyncio.run(through())
    assert (told["status"], told["problem"], told["failures"], told["model"]) == ("done", None, [], SHA[:12])
    assert told["slices_done"] == told["slices_planned"] <= 12
    expected = linked(settings, checkpoint, tmp_path / "t.mrc", volume, 24.0)
    assert len(told["motors"]) == len(expected) > 0
    for motor, other in zip(told["motors"], expected, strict=True):
        for name in ("z", "y", "x", "height", "width", "score", "n_slices"):
            assert motor[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)
        assert motor["z_angstrom"] == pytest.approx(24 * motor["z"])
    assert list_names(f"{jobs.uri}/volumes") == []


def test_a_model_that_has_learned_to_re_score_does_so_in_the_endpoint_too(checkpoint, tmp_path, jobs):
    model = tmp_path / "best"
    shutil.copytree(checkpoint, model)

    def found():
        asked = ServiceSettings.model_validate({"serve": {"models": {"default": str(model)}}, "detect": SMALL.detect})
        card = ModelCard(*model_cards(asked)["default"])
        answerer = Answerer(card.uris, card.sha256, settings_from(card.settings), threads=1)
        (record,) = worked(jobs, submitted(jobs), ask_slab=asked_of(answerer), model=partial(served, card))
        prepared = answerer.prepare_picture(png(VOLUME[0]), 13.0, 10**6)
        picture = picture_of(prepared, answerer.look([prepared])[0], card.sha256)
        assert all("features" not in one for one in picture["detections"])
        assert len(picture["detections"]) > 0
        return card, record["motors"]

    plain, before = found()
    head = Rescorer(PRESENT + 2 * FEATURES, len(GEOMETRY))
    torch.nn.init.constant_(head.last.bias, 1.0)
    (model / RESCORER).write_bytes(rescorer_file(head, plain.sha256, {}, []))
    judging, after = found()
    assert (plain.rescorer_sha256, judging.rescorer_sha256) == (None, rescorer_hash(str(model)))
    assert len(after) == len(before) > 0
    for one, other in zip(after, before, strict=True):
        assert logit(one["score"]) == pytest.approx(logit(other["score"]) + 1, abs=1e-3)
        assert (one["z"], one["y"], one["x"]) == (other["z"], other["y"], other["x"])


def test_a_head_that_changed_since_the_endpoint_was_started_stops_tomograms_of_its_model_alone(
    checkpoint, tmp_path, jobs, caplog
):
    model = tmp_path / "best"
    shutil.copytree(checkpoint, model)
    card = ModelCard([str(model)], SHA, SMALL.model_dump(mode="json"), {}, [], rescorer_sha256="cd" * 32)
    desk = desk_of(jobs, Asked())
    desk.models["lab"] = partial(served, card)
    ours, theirs = submitted(jobs), submitted(jobs, model_name="lab")

    async def work():
        async with working(desk):
            await until(lambda: all(jobs.read(one)["status"] in OVER for one in (ours, theirs)))

    asyncio.run(work())
    assert [jobs.read(one)["status"] for one in (ours, theirs)] == ["done", "failed"]
    assert "deploy it again" in caplog.text
    assert jobs.read(theirs)["problem"]["status"] == 500


def test_answers_of_another_model_are_not_taken_for_the_ones_own(jobs, monkeypatch):
    class Replaced(Asked):
        async def __call__(self, plan, name):
            own = await super().__call__(plan, name)
            return own if len(self.slabs) > 8 else own | {"model": "another", "slices": []}

    monkeypatch.setattr(tomograms, "POLL_SECONDS", 0.01)
    (record,) = worked(jobs, submitted(jobs), ask_slab=Replaced())
    assert (record["status"], record["model"], len(record["motors"])) == ("done", SHA[:12], 1)


def test_a_detector_from_before_the_model_re_scored_is_asked_again_until_it_is_replaced(jobs, monkeypatch):
    class Replaced(Asked):
        def slices(self, plan):
            own = super().slices(plan)
            if len(self.slabs) > 8:
                boxes = [box for entry in own for box in entry["detections"]]
                for box in boxes:
                    box["features"] = b"12"
            return own

    def judged(linked):
        return [0.25] * len(linked.candidates)

    (record,) = worked(jobs, submitted(jobs), ask_slab=Replaced(), model=lambda: Served(SMALL, SHA, judged))
    assert [motor["score"] for motor in record["motors"]] == [0.25]
    monkeypatch.setattr(tomograms, "CHANGEOVER_POLLS", 2)
    (record,) = worked(jobs, submitted(jobs), ask_slab=Asked(), model=lambda: Served(SMALL, SHA, judged))
    assert (record["status"], record["attempts"]) == ("failed", ATTEMPTS + 1)


def logit(score):
    return np.log(score / (1 - score))


def png(image):
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_each_slice_is_looked_at_once_and_the_first_look_goes_first(jobs):
    detectors = Asked()
    (record,) = worked(jobs, submitted(jobs), ask_slab=detectors, settings=STRIDED)
    assert max(map(len, detectors.slabs)) <= SLAB_SLICES
    zs = [z for slab in detectors.slabs for z in slab]
    assert zs[:2] == [2, 6]
    assert sorted(zs) == sorted(set(zs))
    assert {3, 4, 5} <= set(zs)
    assert record["slices_done"] == record["slices_planned"] == len(zs)
    (motor,) = record["motors"]
    assert (motor["y"], motor["x"], motor["n_slices"]) == (20, 30, 4)


def test_without_spacing_motors_are_in_voxels_only(jobs):
    (record,) = worked(jobs, submitted(jobs, spacing=None), ask_slab=Asked())
    assert record["motors"][0]["z_angstrom"] is None
    assert record["motors"][0]["z"] == pytest.approx(4.5)


def test_two_are_looked_at_side_by_side_and_others_wait_their_turn(jobs):
    ids = [submitted(jobs) for _ in range(4)]

    async def work():
        detectors = Asked()
        detectors.gate = asyncio.Event()
        desk = desk_of(jobs, detectors, tomograms_at_once=2, max_detectors=1)
        async with working(desk):
            await until(lambda: detectors.at_work == 4)
            assert list(desk.at_work) == ids[:2]
            assert [jobs.read(one)["status"] for one in ids] == ["running"] * 2 + ["queued"] * 2
            detectors.gate.set()
            await until(lambda: not jobs.waiting())
        return detectors.most

    assert asyncio.run(work()) == 4
    assert [jobs.read(one)["status"] for one in ids] == ["done"] * 4


def test_whoever_comes_after_one_that_died_goes_on(jobs):
    job_id = submitted(jobs)

    async def die():
        detectors = Asked()
        detectors.gate = asyncio.Event()
        async with working(desk_of(jobs, detectors)):
            await until(lambda: detectors.at_work > 0)
        await until(lambda: detectors.given_up > 0)

    asyncio.run(die())
    assert jobs.read(job_id)["status"] == "running"
    assert jobs.waiting() == [job_id]
    (record,) = worked(Jobs(jobs.uri, DEFAULTS), job_id, ask_slab=Asked())
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert record["slices_done"] == record["slices_planned"] == SHAPE[0]


def test_one_that_ends_its_process_each_time_is_given_up(jobs):
    detectors = Asked()
    (record,) = worked(jobs, submitted(jobs, attempts=ATTEMPTS), ask_slab=detectors)
    assert record["status"] == "failed"
    assert f"begun {ATTEMPTS} times" in record["problem"]["detail"]
    assert detectors.slabs == []
    assert list_names(f"{jobs.uri}/volumes") == []


def test_when_no_detector_answers_it_is_begun_again_a_few_times(jobs):
    detectors = Asked()
    detectors.error = OutageError("4 detectors were lost")
    (record,) = worked(jobs, submitted(jobs), ask_slab=detectors)
    assert "no detector or storage answered" in record["problem"]["detail"]
    assert detectors.slabs.count([0, 1, 2]) == ATTEMPTS


def test_an_outage_that_passes_costs_nothing_but_time(jobs):
    detectors = Asked()
    detectors.error = OutageError("the storage is away")

    async def ask_slab(plan, model):
        if len(detectors.slabs) == 3:
            detectors.error = None
        return await detectors(plan, model)

    (record,) = worked(jobs, submitted(jobs), ask_slab=ask_slab)
    assert record["status"] == "done"
    assert record["slices_done"] == record["slices_planned"] == SHAPE[0]


def test_a_fault_of_ours_is_told_without_its_insides(jobs, caplog):
    detectors = Asked()
    detectors.error = RuntimeError("the insides")
    (record,) = worked(jobs, submitted(jobs), ask_slab=detectors)
    assert (record["status"], record["problem"]["status"]) == ("failed", 500)
    assert "insides" not in json.dumps(record)
    assert "the insides" in caplog.text


def test_a_model_that_is_not_served_any_more_is_named(jobs):
    (record,) = worked(jobs, submitted(jobs, model_name="old"), ask_slab=Asked())
    assert record["problem"]["status"] == 422
    assert "'old' is not served any more" in record["problem"]["detail"]


def test_a_volume_without_numbers_fails_with_a_reason_and_no_path(answerer, jobs):
    volume = np.full((6, 40, 40), np.nan, np.float32)
    (record,) = worked(jobs, submitted(jobs, volume), ask_slab=asked_of(answerer))
    assert (record["status"], record["problem"]["status"]) == ("failed", 422)
    assert "none is finite" in record["problem"]["detail"]
    assert jobs.uri not in json.dumps(record)


def test_slices_that_cannot_be_read_are_listed_without_a_path(answerer, jobs):
    volume = np.random.default_rng(2).normal(size=(6, 40, 40)).astype(np.float32)
    volume[2] = np.nan
    job_id = submitted(jobs, volume)
    data = storage.read_bytes(jobs.volume(job_id))
    storage.write_bytes(jobs.volume(job_id), data[:-100])
    (record,) = worked(jobs, job_id, ask_slab=asked_of(answerer))
    assert record["status"] == "done"
    assert [one["z"] for one in record["failures"]] == [2, 5]
    assert "the tomogram: ends within" in record["failures"][1]["error"]
    assert jobs.uri not in json.dumps(record)


def test_one_of_which_hardly_anything_can_be_read_fails_without_a_path(answerer, jobs):
    job_id = submitted(jobs)
    storage.write_bytes(jobs.volume(job_id), storage.read_bytes(jobs.volume(job_id))[:5000])
    (record,) = worked(jobs, job_id, ask_slab=asked_of(answerer))
    assert "of the 9 slices" in record["problem"]["detail"].lower()
    assert jobs.uri not in json.dumps(record)


def test_one_that_is_forgotten_at_work_leaves_nothing(jobs):
    job_id = submitted(jobs)

    async def work():
        detectors = Asked()
        detectors.gate = asyncio.Event()
        desk = desk_of(jobs, detectors, max_detectors=1)
        async with working(desk):
            await until(lambda: detectors.at_work > 0)
            reply = await asking(app_of(FakeBackend(), jobs.uri), "DELETE", f"/v1/tomograms/{job_id}")
            assert reply.status == 204
            detectors.gate.set()
            await until(lambda: not desk.at_work)
        return detectors

    detectors = asyncio.run(work())
    assert len(detectors.slabs) < 9
    assert jobs.read(job_id) is None
    assert [list_names(f"{jobs.uri}/{room}") for room in ("records", "volumes", "queue")] == [[], [], []]


def test_a_list_of_those_that_wait_may_be_out_of_date(jobs):
    """It is made while the last one on it is finished."""
    job_id = submitted(jobs)
    (record,) = worked(jobs, job_id, ask_slab=Asked())

    async def late():
        detectors = Asked()
        desk = desk_of(jobs, detectors)
        desk.jobs.waiting = lambda: [job_id]
        await desk.take_up()
        await until(lambda: not desk.at_work)
        return detectors.slabs

    assert asyncio.run(late()) == []
    assert jobs.read(job_id) == record


def test_what_cannot_be_begun_does_not_keep_the_desk_from_others_nor_busy(jobs, caplog):
    broken, lost, good = (submitted(jobs) for _ in range(3))
    storage.write_bytes(f"{jobs.uri}/records/{broken}.json", b"{")
    storage.remove(f"{jobs.uri}/records/{lost}.json")
    asked = []

    async def work():
        desk = desk_of(jobs, Asked(), tomograms_at_once=3)
        waiting = jobs.waiting

        def counted():
            asked.append(1)
            return waiting()

        jobs.waiting = counted
        async with working(desk):
            await until(lambda: jobs.read(good)["status"] == "done")
            await asyncio.sleep(0.2)

    asyncio.run(work())
    assert len(asked) < 40
    assert [one.split("-", 1)[1] for one in list_names(f"{jobs.uri}/queue")] == [broken]
    assert "is not JSON" in caplog.text
    assert "never retrieved" not in caplog.text


def test_a_storage_that_is_away_for_a_while_ends_nothing(jobs, caplog):
    caplog.set_level(logging.WARNING)
    job_id = submitted(jobs)

    async def work():
        away = [OutageError("away")] * 12

        def sometimes(method):
            def call(*arguments):
                if away and len(away) % 2:
                    raise away.pop()
                if away:
                    away.pop()
                return method(*arguments)

            return call

        desk = desk_of(jobs, Asked())
        for name in ("waiting", "read", "write"):
            setattr(jobs, name, sometimes(getattr(jobs, name)))
        async with working(desk):
            await until(lambda: not away)
            await until(lambda: not jobs.waiting() and not desk.at_work)

    asyncio.run(work())
    assert jobs.read(job_id)["status"] == "done"
    assert "never retrieved" not in caplog.text


def test_old_ones_are_forgotten_by_the_desk(jobs, monkeypatch):
    monkeypatch.setattr(tomograms, "CLEAN_SECONDS", 0.05)
    job_id = submitted(jobs)

    async def work():
        async with working(desk_of(jobs, Asked(), keep_hours=1e-6)):
            await until(lambda: jobs.read(job_id) is None)

    asyncio.run(work())
    assert list_names(f"{jobs.uri}/records") == []


def named(jobs, uri, **known):
    """The id of a tomogram in object storage that waits."""
    record = new_record(new_id(), "named", "default", uri=uri, **known)
    jobs.submit(record)
    return record["id"]


def test_a_tomogram_in_object_storage_is_read_there_and_stays_there(answerer, checkpoint, s3, jobs, tmp_path):
    uri = f"{s3.folder()}/t.mrc"
    storage.write_bytes(uri, mrc(VOLUME))
    (tmp_path / "t.mrc").write_bytes(mrc(VOLUME))
    record, other = worked(
        jobs, named(jobs, uri), named(jobs, uri, voxel_spacing_angstrom=20.0), ask_slab=asked_of(answerer)
    )
    assert [record[f"size_{axis}"] for axis in "zyx"] == list(SHAPE)
    assert (record["voxel_spacing_angstrom"], other["voxel_spacing_angstrom"]) == (13.0, 20.0)
    for one, spacing in ((record, 13.0), (other, 20.0)):
        expected = linked(SMALL, checkpoint, tmp_path / "t.mrc", VOLUME, spacing)
        assert [motor["score"] for motor in one["motors"]] == pytest.approx([motor["score"] for motor in expected])
    assert storage.exists(uri)


def test_what_is_no_tomogram_in_object_storage_fails_with_a_reason(s3, jobs):
    folder = s3.folder()
    storage.write_bytes(f"{folder}/text.mrc", b"no tomogram")
    storage.write_bytes(f"{folder}/two/a.mrc", mrc(VOLUME))
    storage.write_bytes(f"{folder}/two/b.mrc", mrc(VOLUME))
    storage.write_bytes(f"{folder}/wide.mrc", mrc(np.zeros((1, 300, 300), np.int8)))
    storage.write_bytes(f"{folder}/tiny.mrc", mrc(np.zeros((4, 4, 4), np.int8)))
    storage.write_bytes(f"{folder}/fine.mrc", mrc(VOLUME, 1e-6))
    reasons = {
        "none.mrc": "nothing here", "text.mrc": "11 bytes", "two": "several tomograms",
        "wide.mrc": "300 x 300", "tiny.mrc": "4 x 4", "fine.mrc": "1e-06 angstrom",
    }  # fmt: skip
    ids = [named(jobs, f"{folder}/{name}") for name in reasons]
    detectors = Asked()
    records = worked(jobs, *ids, ask_slab=detectors, image_pixels=80_000)
    for record, why in zip(records, reasons.values(), strict=True):
        assert (record["status"], record["problem"]["status"]) == ("failed", 422)
        assert why in record["problem"]["detail"]
    assert detectors.slabs == []


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_we_may_not_read_is_a_problem_not_a_crash(jobs):
    (record,) = worked(jobs, named(jobs, "s3://no-such-bucket-of-ours/a.mrc"), ask_slab=Asked())
    assert record["status"] == "failed"
    assert record["problem"]["status"] in (422, 503)


def test_jobs_in_object_storage_are_worked_on_like_others(answerer, s3):
    jobs = Jobs(s3.folder(), DEFAULTS)
    (record,) = worked(jobs, submitted(jobs), ask_slab=asked_of(answerer))
    assert record["status"] == "done"
    assert len(record["motors"]) > 0
    assert not storage.exists(jobs.volume(record["id"]))
    reply = ask(app_of(FakeBackend(), jobs.uri), "GET", f"/v1/tomograms/{record['id']}/motors.csv")
    assert len(reply.body.splitlines()) == 1 + len(record["motors"])


def test_all_or_none_returns_all_in_their_order():
    async def number(value):
        await asyncio.sleep(0.01 * (3 - value))
        return value

    assert asyncio.run(all_or_none(number(value) for value in range(3))) == [0, 1, 2]


def test_all_or_none_ends_the_others_when_one_fails():
    ended = []

    async def wait():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(1)
            raise

    async def fail():
        raise SliceCorruptError("broken")

    async def together():
        with pytest.raises(SliceCorruptError):
            await all_or_none([wait(), fail(), wait()])
        await asyncio.sleep(0)

    asyncio.run(together())
    assert ended == [1, 1]
