import asyncio

import numpy as np
import pytest

from motor_ray.errors import BusyError, CheckpointError, OutageError, SliceCorruptError, StorageError, TomogramError
from motor_ray.service.backend import Ask
from tests.service.asking import LEAVE, STALL, Reply, ask, asking, form
from tests.service.stand_ins import (
    JPEG,
    PNG,
    RNG,
    SHA,
    TIFF,
    FakeBackend,
    Figures,
    app_of,
    card,
    jpeg_claiming,
    png_claiming,
    saved,
    tiff_claiming,
)

CLAIMING = {"PNG": png_claiming, "JPEG": jpeg_claiming, "TIFF": tiff_claiming}


def post(backend, body=JPEG, query="", **limits) -> Reply:
    return ask(app_of(backend, **limits), "POST", f"/v1/slices{query}", body)


def batch(backend, files, query="", **limits) -> Reply:
    body, headers = form(files)
    return ask(app_of(backend, **limits), "POST", f"/v1/slices:batch{query}", body, headers)


@pytest.mark.parametrize("data", [JPEG, PNG, TIFF], ids=["JPEG", "PNG", "TIFF"])
def test_an_image_is_answered_with_what_is_on_it(backend, data):
    meter = Figures()
    reply = ask(app_of(backend, meter=meter), "POST", "/v1/slices", data)
    assert reply.status == 200
    answer = reply.json()
    assert answer["model"] == SHA[:12]
    assert (answer["height"], answer["width"]) == (60, 48)
    assert [one["score"] for one in answer["detections"]] == [0.9, 0.5, 0.2]
    assert answer["seconds"]["total"] >= 0
    assert backend.asked == [(data, Ask("default", None))]
    assert (meter.requests, meter.found) == ([("/v1/slices", 200)], 3)


def test_the_threshold_and_the_spacing_are_heeded(backend):
    reply = post(backend, query="?threshold=0.5&voxel_spacing_angstrom=13.1")
    assert [one["score"] for one in reply.json()["detections"]] == [0.9, 0.5]
    assert backend.asked[0][1] == Ask("default", 13.1)


def test_the_content_type_is_not_believed(backend):
    for kind in ("image/png", "text/html", "application/json", "nonsense"):
        reply = ask(app_of(backend), "POST", "/v1/slices", JPEG, [("Content-Type", kind)])
        assert reply.status == 200


def test_another_model_is_asked_by_its_name(backend):
    app = app_of(backend, cards={"default": card(), "second": card({"frame": {"size": 96}})})
    assert ask(app, "POST", "/v1/slices?model=second", JPEG).status == 200
    assert backend.asked[0][1].model == "second"
    told = ask(app, "GET", "/v1/model?model=second").json()
    assert (told["name"], told["models"], told["frame_pixels"]) == ("second", ["default", "second"], 96)
    assert ask(app, "GET", "/v1/model").json()["frame_pixels"] == 720


@pytest.mark.parametrize("path", ["/v1/slices", "/v1/slices:batch"])
def test_test_time_augmentation_is_asked_for_as_far_as_the_endpoint_allows_it(backend, path):
    body, headers = form([("a.jpg", JPEG)]) if path.endswith("batch") else (JPEG, [])
    app = app_of(backend, most_tta="fast")
    assert ask(app, "POST", path, body, headers).status == 200
    assert ask(app, "POST", f"{path}?tta=fast", body, headers).status == 200
    assert [wanted.tta for _, wanted in backend.asked] == [None, "fast"]
    refused = ask(app, "POST", f"{path}?tta=full", body, headers).problem(422)
    assert refused == "tta is full, which takes this endpoint too long; it allows off, fast"
    assert "tta" in ask(app, "POST", f"{path}?tta=most", body, headers).problem(422)
    assert len(backend.asked) == 2
    told = ask(app, "GET", "/v1/model").json()
    assert (told["tta"], told["tta_allowed"]) == ("off", ["off", "fast"])


def test_the_members_of_a_model_are_told_but_not_where_they_lie(backend):
    members = [{"model": "s3://secret/best", "sha256": digit * 64, "backbone": "resnet50"} for digit in "ab"]
    together = card()._replace(members=members, uris=["s3://secret/best"] * 2)
    told = ask(app_of(backend, cards={"default": together}), "GET", "/v1/model")
    assert [one["sha256"][0] for one in told.json()["members"]] == ["a", "b"]
    assert b"secret" not in told.body


BROKEN = {
    "nothing": (b"", "empty"),
    "a page": (b"<html>not an image</html>", "expected a JPEG, PNG or TIFF"),
    "a GIF": (b"GIF89a" + bytes(100), "expected a JPEG, PNG or TIFF"),
    "a JPEG's first bytes": (JPEG[:30], "header"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "copy the file again"),
    "a PNG's first bytes": (PNG[:20], "header"),
    "a PNG without an end": (PNG[:-500], "copy the file again"),
    "a PNG without pixels": (png_claiming(60, 48), "decoded"),
    "a TIFF's first bytes": (TIFF[:6], "header"),
    "half a TIFF": (TIFF[: len(TIFF) // 2], "truncated"),
    "a pixel": (saved(np.zeros((1, 1), np.uint8), "PNG"), "1 x 1"),
    "a line": (saved(np.zeros((4000, 2), np.uint8), "TIFF"), "4000 x 2"),
}


@pytest.mark.parametrize(("body", "why"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_image_is_refused(backend, body, why):
    assert why in post(backend, body).problem(422)


@pytest.mark.parametrize("kind", CLAIMING)
@pytest.mark.parametrize("size", [(20_000, 20_000), (16_000, 16_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_bomb_is_refused_before_a_detector_hears_of_it(backend, kind, size):
    if kind == "JPEG" and size[0] > 65535:
        pytest.skip("a JPEG cannot say so")
    assert f"{size[0]} x {size[1]}" in post(backend, CLAIMING[kind](*size)).problem(422)
    assert not backend.asked


@pytest.mark.parametrize(
    "query",
    [
        *("threshold=nan", "threshold=2", "threshold=-0.1", "threshold=abc", "threshold=inf", "threshold="),
        *("voxel_spacing_angstrom=0", "voxel_spacing_angstrom=nan", "voxel_spacing_angstrom=inf"),
        *("voxel_spacing_angstrom=1e9", "voxel_spacing_angstrom=-1", "voxel_spacing_angstrom=1e-30"),
        f"model={'x' * 101}",
    ],
)
def test_parameters_that_cannot_be_are_named(backend, query):
    assert query.split("=")[0] in post(backend, query=f"?{query}").problem(422)
    assert not backend.asked


@pytest.mark.parametrize("name", ["best", "DEFAULT", "..%2Fdefault", "%00", "%ff", ""])
def test_an_unknown_model_is_told(backend, name):
    assert "There is no model" in post(backend, query=f"?model={name}").problem(404)


@pytest.mark.parametrize(
    ("length", "status"), [(None, 411), ("x", 411), ("-1", 411), ("\xb2", 411), ("1" * 5000, 413), ("0", 422)]
)
def test_a_body_must_say_how_long_it_is(backend, length, status):
    reply = ask(app_of(backend), "POST", "/v1/slices", JPEG, length=length)
    reply.problem(status)
    assert reply.taken == 0


def test_a_body_over_the_limit_is_refused_before_it_is_read(backend):
    reply = ask(app_of(backend, image_bytes=1000), "POST", "/v1/slices", JPEG)
    assert "at most 1,000" in reply.problem(413)
    assert reply.taken == 0


def test_a_body_longer_or_shorter_than_it_said_is_refused(backend):
    app = app_of(backend)
    reply = ask(app, "POST", "/v1/slices", [JPEG, *[bytes(1000)] * 50], length=len(JPEG))
    assert "beyond" in reply.problem(400)
    assert reply.taken <= 2
    assert "ended after" in ask(app, "POST", "/v1/slices", JPEG, length=len(JPEG) + 1).problem(400)
    assert not backend.asked


def test_a_form_longer_or_shorter_than_it_said_is_refused(backend):
    app = app_of(backend)
    body, headers = form([("a.jpg", JPEG)])
    reply = ask(app, "POST", "/v1/slices:batch", [body, *[bytes(1000)] * 50], headers, length=len(body))
    assert "beyond" in reply.problem(400)
    assert reply.taken <= 2
    ask(app, "POST", "/v1/slices:batch", body, headers, length=len(body) + 1).problem(400)
    assert not backend.asked


@pytest.mark.parametrize("path", ["/v1/slices", "/v1/slices:batch"])
def test_who_sends_too_slowly_is_let_go(backend, path):
    app = app_of(backend, timeout_seconds=0.1)
    headers = [("Content-Type", "multipart/form-data; boundary=edge")]
    reply = ask(app, "POST", path, [b"--edge\r\n", STALL], headers, length=1000)
    assert "within" in reply.problem(408)


@pytest.mark.parametrize("path", ["/v1/slices", "/v1/slices:batch"])
def test_who_goes_away_leaves_room_for_others(backend, path):
    app = app_of(backend, image_bytes=2**20, bytes_in_flight=2**20)
    headers = [("Content-Type", "multipart/form-data; boundary=edge")]
    for _ in range(3):
        assert ask(app, "POST", path, [b"--edge\r\n", LEAVE], headers, length=2**20).status == 0
    assert ask(app, "POST", "/v1/slices", JPEG).status == 200


def test_images_beyond_the_room_for_them_are_asked_to_come_again(backend):
    app = app_of(backend, image_bytes=2**20, bytes_in_flight=2**20)

    async def two() -> tuple[Reply, Reply]:
        backend.gate = asyncio.Event()
        large = JPEG + bytes(2**19)
        first = asyncio.create_task(asking(app, "POST", "/v1/slices", large))
        while not backend.asked:
            await asyncio.sleep(0)
        second = await asking(app, "POST", "/v1/slices", large)
        backend.gate.set()
        return await first, second

    first, second = asyncio.run(two())
    assert first.status == 200
    assert "try again" in second.problem(429)
    assert second.taken == 0


def test_a_form_that_never_fits_is_not_asked_to_come_again(backend):
    app = app_of(backend, image_bytes=2**20, bytes_in_flight=2**20)
    _, headers = form([])
    reply = ask(app, "POST", "/v1/slices:batch", b"", headers, length=2**20 + 1)
    reply.problem(413)
    assert reply.taken == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BusyError("All are busy"), 429),
        (OutageError("4 detectors were lost"), 503),
        (StorageError("/secret/place is full"), 503),
        (SliceCorruptError("The image: broken"), 422),
        (TomogramError("needs a spacing"), 422),
        (CheckpointError("/secret/model is damaged"), 500),
        (RuntimeError("secret"), 500),
        (KeyError("secret"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_goes_wrong_behind_is_told_without_its_insides(backend, error, status):
    backend.error = error
    for path, request in (("/v1/slices", (JPEG,)), ("/v1/slices:batch", form([("a", JPEG)]))):
        reply = ask(app_of(backend), "POST", path, *request)
        if status == 422 and path.endswith("batch"):
            assert reply.json()["slices"][0]["problem"]["status"] == 422
            continue
        detail = reply.problem(status)
        assert "secret" not in detail
        if isinstance(error, OutageError):
            assert "etector" in detail


def test_no_answer_in_time_is_said_so_and_the_question_is_withdrawn(backend):
    async def late() -> Reply:
        backend.gate = asyncio.Event()
        return await asking(app_of(backend, timeout_seconds=0.05), "POST", "/v1/slices", JPEG)

    assert "0.05 s" in asyncio.run(late()).problem(504)
    assert backend.given_up == 1


def test_a_bad_image_among_good_ones_spoils_only_itself(backend):
    files = [("a.jpg", JPEG), ("b.txt", b"no image"), ("c.tif", TIFF), ("d.png", png_claiming(20_000, 20_000))]
    reply = batch(backend, files, "?threshold=0.6")
    assert reply.status == 200
    answer = reply.json()
    assert answer["model"] == SHA[:12]
    assert [one["name"] for one in answer["slices"]] == ["a.jpg", "b.txt", "c.tif", "d.png"]
    assert [len(one.get("detections", [])) for one in answer["slices"]] == [1, 0, 1, 0]
    assert [one.get("problem", {}).get("status") for one in answer["slices"]] == [None, 422, None, 422]
    assert {len(image) for image, _ in backend.asked} == {len(JPEG), len(TIFF)}


def test_a_batch_that_finds_no_room_is_refused_whole_and_bothers_nobody_further():
    class Full(FakeBackend):
        async def look(self, image, ask):
            if self.asked:
                raise BusyError("full")
            self.gate = asyncio.Event()
            return await super().look(image, ask)

    backend = Full()

    async def several() -> None:
        body, headers = form([("a", JPEG)] * 3)
        reply = await asking(app_of(backend), "POST", "/v1/slices:batch", body, headers)
        reply.problem(429)
        await asyncio.sleep(0.01)
        assert backend.given_up == 1

    asyncio.run(several())


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=edge", "Multipart/Form-Data; boundary=edge"])
def test_forms_are_known_however_they_are_written(backend, kind):
    body, _ = form([("a.jpg", JPEG)])
    assert ask(app_of(backend), "POST", "/v1/slices:batch", body, [("Content-Type", kind)]).status == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 415),
        ("image/jpeg", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=another", 400),
    ],
)
def test_what_is_no_form_is_refused(backend, kind, status):
    body, _ = form([("a.jpg", JPEG)])
    headers = [("Content-Type", kind)] if kind else []
    ask(app_of(backend), "POST", "/v1/slices:batch", body, headers).problem(status)


def test_other_fields_and_too_many_files_are_refused(backend):
    body, headers = form([("a.jpg", JPEG)], field="image")
    assert "images" in ask(app_of(backend), "POST", "/v1/slices:batch", body, headers).problem(422)
    body, headers = form([])
    assert ask(app_of(backend), "POST", "/v1/slices:batch", body, headers).status in (400, 422)
    text = b'--edge\r\nContent-Disposition: form-data; name="images"\r\n\r\ntext\r\n--edge--\r\n'
    ask(app_of(backend), "POST", "/v1/slices:batch", text, headers).problem(400)
    assert "3" in batch(backend, [("a.jpg", JPEG)] * 4, images_per_request=3).problem(400)
    assert "Image 1" in batch(backend, [("a", JPEG), ("b", JPEG + bytes(3000))], image_bytes=3000).problem(413)
    assert not backend.asked


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-7", "undefined", "hex", "idna", "punycode", "none"])
@pytest.mark.parametrize("name", ["\\ud800", "+2AA-", "\\N{x}", "\\q", "ä", "xn--\u0080", "", 'a"b', "a\r\nb"])
def test_no_file_name_breaks_the_answer(backend, charset, name):
    body, _ = form([(name, JPEG)])
    kind = f"multipart/form-data; boundary=edge; charset={charset}"
    reply = ask(app_of(backend), "POST", "/v1/slices:batch", body, [("Content-Type", kind)])
    assert reply.status in (200, 400)
    reply.body.decode("utf-8")


def test_damaged_forms_are_refused(backend):
    body, headers = form([("a.jpg", JPEG), ("b.png", PNG)])
    app = app_of(backend)
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(RNG.integers(1, 5)):
            at = RNG.integers(len(damaged)) if RNG.random() < 0.3 else RNG.integers(120)
            damaged[at] = RNG.choice([0, 10, 13, 34, 45, 58, 255])
        reply = ask(app, "POST", "/v1/slices:batch", bytes(damaged), headers)
        assert reply.status in (200, 400, 413, 422), reply.body


def test_the_headers_of_a_part_take_no_memory_without_end(backend):
    body, headers = form([("a.jpg", JPEG)])
    long = body.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 2**20 + b"\r\n\r\n", 1)
    ask(app_of(backend), "POST", "/v1/slices:batch", long, headers).problem(400)
