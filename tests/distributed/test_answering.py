import asyncio
import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from motor_ray.archive.plan import slab_of
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.distributed.answering import Answerer, picture_of
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import MotorRayError, SliceCorruptError, TomogramError
from motor_ray.service.backend import ModelCard
from motor_ray.tables import PLAN
from tests.archive.test_pictures import SEEDS, mutated
from tests.distributed.conftest import SMALL
from tests.service.asking import ask, form
from tests.service.stand_ins import app_of, mrc

SHA = "ab" * 32
MOST = 2**22


def changed(**rooms):
    """SMALL with other settings in some rooms."""
    values = SMALL.model_dump(mode="json")
    return settings_from({**values, **{room: {**values[room], **more} for room, more in rooms.items()}})


@pytest.fixture(scope="module")
def answerer(checkpoint):
    made = Answerer(checkpoint, SHA, SMALL, threads=1)
    made.warm_up()
    return made


class InProcess:
    """A Backend that asks an Answerer of this process."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    async def look(self, image, ask):
        prepared = await asyncio.to_thread(
            self.answerer.prepare_picture, image, ask.voxel_spacing_angstrom, MOST, ask.tta
        )
        return picture_of(prepared, self.answerer.look([prepared])[0], self.answerer.sha256)

    async def wake(self):
        pass

    def is_ready(self):
        return True


@pytest.fixture(scope="module")
def app(answerer):
    card = ModelCard(["nowhere"], SHA, SMALL.model_dump(mode="json"), {}, [])
    return app_of(InProcess(answerer), cards={"default": card}, image_pixels=MOST)


def slab(settings, checkpoint, row, zs):
    """What bulk detection finds on the slices `zs`."""
    plan = pa.Table.from_pylist([slab_of(row, zs)], schema=PLAN)
    (found,) = ScoreFrames(settings, checkpoint)(LoadSlab(**loader_arguments(settings))(plan)).to_pylist()
    return found["slices"]


def row_of(uri, shape, format="jpeg_stack", spacing=None):
    sizes = dict(zip(("size_z", "size_y", "size_x"), shape, strict=True))
    return {"tomo_id": "t", "uri": str(uri), "format": format, **sizes, "voxel_spacing_angstrom": spacing}


def assert_same(picture, entry):
    """That a picture shows what a slice of a slab does."""
    assert picture["presence"] == pytest.approx(entry["presence"], abs=1e-5)
    assert len(picture["detections"]) == len(entry["detections"]) > 0
    for one, other in zip(picture["detections"], entry["detections"], strict=True):
        assert other.get("features") is None  # which only a table has
        assert one == pytest.approx({name: other[name] for name in one}, rel=1e-5, abs=1e-5)


def looked(answerer, data, spacing=None):
    prepared = answerer.prepare_picture(data, spacing, MOST)
    return picture_of(prepared, answerer.look([prepared])[0], answerer.sha256)


def test_a_single_image_is_answered_as_bulk_detection_would(answerer, app, archive, checkpoint):
    folder = sorted(Path(archive.uri).iterdir())[0]
    pattern = folder / "slice_{z:04d}.jpg"
    entries = slab(SMALL, checkpoint, row_of(pattern, (20, 96, 96)), list(range(6)))
    for entry in entries:
        data = Path(str(pattern).format(z=entry["z"])).read_bytes()
        assert_same(looked(answerer, data), entry)
        reply = ask(app, "POST", "/v1/slices", data)
        assert reply.status == 200
        assert_same(reply.json(), entry)
        assert reply.json()["model"] == SHA[:12]


def test_several_images_are_answered_as_each_alone(answerer, app, archive):
    paths = sorted(sorted(Path(archive.uri).iterdir())[1].iterdir())[:4]
    other = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (130, 70), dtype=np.uint16)).save(other, "TIFF")
    images = [*(path.read_bytes() for path in paths), other.getvalue()]
    prepared = [answerer.prepare_picture(data, None, MOST) for data in images]
    together = [picture_of(*pair, SHA) for pair in zip(prepared, answerer.look(prepared), strict=True)]
    body, headers = form([(f"{number}", data) for number, data in enumerate([*images, b"no image"])])
    reply = ask(app, "POST", "/v1/slices:batch", body, headers).json()["slices"]
    assert reply.pop()["problem"]["status"] == 422
    for data, picture, told in zip(images, together, reply, strict=True):
        alone = looked(answerer, data)
        for one in (picture, told):
            assert_same(one, alone)
    assert (reply[-1]["height"], reply[-1]["width"]) == (130, 70)


def test_each_image_is_looked_at_with_the_augmentation_that_it_asks_for(answerer, archive, checkpoint):
    paths = sorted(sorted(Path(archive.uri).iterdir())[1].iterdir())[:3]
    asked = ["full", "off", "fast"]
    data = zip(paths, asked, strict=True)
    prepared = [answerer.prepare_picture(path.read_bytes(), None, MOST, tta) for path, tta in data]
    row = row_of(paths[0].parent / "slice_{z:04d}.jpg", (20, 96, 96))
    for z, (tta, answer) in enumerate(zip(asked, answerer.look(prepared), strict=True)):
        (entry,) = slab(changed(detect={"tta": tta}), checkpoint, row, [z])
        assert_same(picture_of(prepared[z], answer, SHA), entry)
    assert [one.images.shape[1] for one in prepared] == [2, 1, 1]


def test_several_models_with_augmentation_of_their_own_answer_as_in_bulk(archive, checkpoint):
    settings = changed(detect={"tta": "full"})
    answerer = Answerer([checkpoint, checkpoint], SHA, settings, threads=1)
    answerer.warm_up()
    pattern = sorted(Path(archive.uri).iterdir())[0] / "slice_{z:04d}.jpg"
    row = row_of(pattern, (20, 96, 96))
    (entry,) = slab(settings, checkpoint, row, [4])
    assert_same(looked(answerer, Path(str(pattern).format(z=4)).read_bytes()), entry)
    (seen,) = answerer.look([answerer.prepare_slab(slab_of(row, [4]))])[0].slices
    assert_same(seen, entry)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_deep_slice_is_answered_as_one_of_a_volume(answerer, checkpoint, tmp_path, dtype):
    volume = (np.random.default_rng(1).normal(size=(1, 110, 90)) * 1000 + 9000).astype(dtype)
    (tmp_path / "t.mrc").write_bytes(mrc(volume, 0))
    (entry,) = slab(SMALL, checkpoint, row_of(tmp_path / "t.mrc", volume.shape, "mrc"), [0])
    file = io.BytesIO()
    Image.fromarray(volume[0]).save(file, "TIFF")
    assert_same(looked(answerer, file.getvalue()), entry)
    if dtype == "uint16":
        assert_same(looked(answerer, cv2.imencode(".png", volume[0])[1].tobytes()), entry)


def test_at_a_fixed_spacing_an_image_takes_several_frames(checkpoint, tmp_path):
    settings = changed(frame={"mode": "spacing", "spacing_angstrom": 20.0})
    answerer = Answerer(checkpoint, SHA, settings, threads=1)
    volume = np.random.default_rng(2).integers(0, 256, (1, 130, 150)).astype(np.uint16)
    (tmp_path / "t.mrc").write_bytes(mrc(volume))
    (entry,) = slab(settings, checkpoint, row_of(tmp_path / "t.mrc", volume.shape, "mrc", 25.0), [0])
    data = cv2.imencode(".png", volume[0])[1].tobytes()
    prepared = answerer.prepare_picture(data, 25.0, MOST)
    assert len(prepared.images) == 6
    assert_same(looked(answerer, data, 25.0), entry)
    with pytest.raises(TomogramError, match="voxel spacing"):
        answerer.prepare_picture(data, None, MOST)
    with pytest.raises(TomogramError, match="frames"):
        answerer.prepare_picture(data, 1000.0, MOST)


def test_for_a_model_of_several_slices_an_image_stands_for_its_neighbours(tmp_path):
    settings = changed(model={"in_slices": 3})
    torch.manual_seed(1)
    uri = str(tmp_path / "model")
    save_checkpoint(uri, build_model(settings.model), settings, {})
    volume = np.random.default_rng(3).integers(0, 256, (1, 96, 96)).astype(np.uint16)
    (tmp_path / "t.mrc").write_bytes(mrc(volume, 0))
    (entry,) = slab(settings, uri, row_of(tmp_path / "t.mrc", volume.shape, "mrc"), [0])
    answerer = Answerer(uri, SHA, settings, threads=1)
    answerer.warm_up()
    assert_same(looked(answerer, cv2.imencode(".png", volume[0])[1].tobytes()), entry)


def test_a_slab_is_answered_as_in_bulk_with_what_cannot_be_read(answerer, damaged, checkpoint):
    folder = sorted(Path(damaged).iterdir())[0]
    row = row_of(folder / "slice_{z:04d}.jpg", (20, 96, 96))
    zs = list(range(2, 8))
    prepared = answerer.prepare_slab(slab_of(row, zs))
    (answer,) = answerer.look([prepared])
    expected = slab(SMALL, checkpoint, row, zs)
    assert [one["status"] for one in answer.slices] == ["ok", "missing", "corrupt", "ok", "ok", "ok"]
    for one, other in zip(answer.slices, expected, strict=True):
        assert (one["z"], one["status"], one["error"]) == (other["z"], other["status"], other["error"])
        if one["status"] == "ok":
            assert_same(one, other)


def test_a_slab_of_which_nothing_can_be_read_may_stand_among_others(answerer, archive, tmp_path):
    none = slab_of(row_of(tmp_path / "{z}.jpg", (3, 96, 96)), [0, 1])
    folder = sorted(Path(archive.uri).iterdir())[0]
    good = answerer.prepare_picture((folder / "slice_0002.jpg").read_bytes(), None, MOST)
    answers = answerer.look([answerer.prepare_slab(none), good, answerer.prepare_slab(none)])
    assert [one["status"] for one in answers[0].slices] == ["missing", "missing"]
    assert len(answers[1].slices) == 1
    assert answerer.look([answerer.prepare_slab(none)])[0].slices == answers[0].slices


def test_seconds_are_told_part_by_part(answerer, archive):
    data = next(sorted(Path(archive.uri).iterdir())[0].iterdir()).read_bytes()
    seconds = looked(answerer, data)["seconds"]
    assert seconds.keys() == {"prepare", "queue", "model"}
    assert all(value >= 0 for value in seconds.values())


def numbers(*, fill=0.0, at=()) -> bytes:
    """A TIFF of float32 noise, or of one value, with other values put in."""
    pixels = np.random.default_rng(4).normal(size=(60, 60)).astype(np.float32) if fill == 0 else np.full((60, 60), fill)
    for place, value in enumerate(at):
        pixels[place::7, place::5] = value
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_without_a_number_is_refused(app, value):
    assert "none is finite" in ask(app, "POST", "/v1/slices", numbers(fill=value)).problem(422)


def test_an_image_beyond_what_can_be_is_refused(app):
    assert "densities" in ask(app, "POST", "/v1/slices", numbers(at=[3e38, -3e38])).problem(422)


@pytest.mark.parametrize("at", [[np.nan], [np.inf, -np.inf], [np.nan, 1e30], [1e-45]])
def test_an_image_with_some_numbers_is_answered(app, at):
    reply = ask(app, "POST", "/v1/slices", numbers(at=at))
    assert reply.status == 200
    assert 0 <= reply.json()["presence"] <= 1


@pytest.mark.parametrize("fill", [5.0, -1e20])
def test_an_image_of_one_grey_is_answered(app, fill):
    assert ask(app, "POST", "/v1/slices", numbers(fill=fill)).status == 200


@pytest.mark.parametrize("shape", [(16, 16), (16, 16384), (16384, 16), (1000, 17)])
def test_an_image_of_any_shape_is_answered(app, shape):
    data = cv2.imencode(".png", np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))[1].tobytes()
    reply = ask(app, "POST", "/v1/slices", data)
    assert reply.status == 200
    assert (reply.json()["height"], reply.json()["width"]) == shape


def test_an_answer_that_is_no_number_is_not_passed_on(answerer, archive, monkeypatch):
    data = next(sorted(Path(archive.uri).iterdir())[0].iterdir()).read_bytes()
    look = answerer.looker
    monkeypatch.setattr(answerer, "looker", lambda *asked: [one._replace(is_sound=False) for one in look(*asked)])
    with pytest.raises(SliceCorruptError, match="not finite"):
        looked(answerer, data)


def test_whatever_can_be_decoded_is_prepared_or_refused(answerer):
    rng = np.random.default_rng(6)
    prepared = 0
    for number in range(600):
        try:
            one = answerer.prepare_picture(mutated(SEEDS[number % len(SEEDS)], rng), [None, 13.0][number % 2], MOST)
        except MotorRayError:
            continue
        assert one.images.shape == (1, 1, 96, 96)
        prepared += 1
    assert prepared > 100


def test_wrapped_bytes_are_mended_as_in_bulk_and_it_is_said(answerer):
    image = np.clip(np.random.default_rng(7).normal(128, 12, (400, 400)), 0, 255).astype(np.uint8)
    good, torn = (cv2.imencode(".png", one)[1].tobytes() for one in (image, image ^ np.uint8(128)))
    assert looked(answerer, good)["note"] is None
    mended = looked(answerer, torn)
    assert mended["note"] == "bytes were wrapped at 128"
    assert_same(mended, looked(answerer, good))


def test_tables_of_the_two_ways_have_the_same_columns(answerer, archive):
    data = next(sorted(Path(archive.uri).iterdir())[0].iterdir()).read_bytes()
    prepared = answerer.prepare_picture(data, None, MOST)
    (entry,) = answerer.look([prepared])[0].slices
    from motor_ray.tables import SLICE

    assert pa.array([entry], SLICE).to_pylist()[0].keys() == entry.keys()
