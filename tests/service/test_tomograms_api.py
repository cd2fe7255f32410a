import asyncio
import io
import json
import os
import struct

import numpy as np
import pandas as pd
import pytest
import starfile

from motor_ray import storage
from motor_ray.errors import StorageError
from motor_ray.service.intake import MOST_SLICES, PIECE, UPLOAD_BYTES
from motor_ray.service.jobs import Jobs, new_id, new_record
from motor_ray.service.results import motors_shown
from motor_ray.storage import DEFAULTS, list_names
from tests.service.asking import LEAVE, STALL, Reply, ask, asking
from tests.service.stand_ins import JPEG, app_of, mrc

VOLUME = np.arange(4 * 20 * 24, dtype=np.int16).reshape(4, 20, 24)
MRC = mrc(VOLUME)
JSON = [("Content-Type", "application/json")]

FOUND = [
    {"z": 1.5, "y": 8.25, "x": 9.0, "height": 5.0, "width": 6.0, "score": 0.9, "n_slices": 3},
    {"z": 3.0, "y": 2.0, "x": 20.0, "height": 5.0, "width": 6.0, "score": 0.4, "n_slices": 2},
]


def named(app, uri, query="") -> Reply:
    return ask(app, "POST", f"/v1/tomograms{query}", json.dumps({"uri": uri}).encode(), JSON)


def finished(folder, *, spacing: float | None = 13.0, name="tomo_1.mrc", motors=FOUND) -> str:
    """The id of a tomogram that has been looked at."""
    jobs = Jobs(folder, DEFAULTS)
    sizes = {"size_z": 4, "size_y": 20, "size_x": 24, "voxel_spacing_angstrom": spacing}
    record = new_record(new_id(), name, "default", **sizes)
    jobs.submit(record)
    shown = motors_shown([motor | {"tomo_id": "t", "voxel_spacing_angstrom": spacing} for motor in motors])
    jobs.finish(record | {"status": "done", "motors": shown})
    return str(record["id"])


def kept(folder) -> dict[str, list[str]]:
    """What lies where in the storage."""
    rooms = ("records", "volumes", "queue")
    # Some object stores list an empty folder itself.
    return {room: [name for name in list_names(f"{folder}/{room}") if name != room] for room in rooms}


def stars(path, data: bytes) -> pd.DataFrame:
    """The table of a STAR file."""
    path.write_bytes(data)
    table = starfile.read(path)
    assert isinstance(table, pd.DataFrame)
    return table


def test_an_uploaded_tomogram_is_stored_whole_and_waits(backend, place):
    app = app_of(backend, place)
    reply = ask(app, "POST", "/v1/tomograms?name=a%20b.mrc", [MRC[:100], MRC[100:1500], MRC[1500:]])
    assert reply.status == 202
    told = reply.json()
    assert reply.header("Location") == f"/v1/tomograms/{told['id']}"
    assert (told["status"], told["name"], told["voxel_spacing_angstrom"]) == ("queued", "a b.mrc", 13.0)
    assert [told[f"size_{axis}"] for axis in "zyx"] == [4, 20, 24]
    assert told["motors"] == told["failures"] == []
    assert not {"ticket", "uri", "attempts", "model_name"} & told.keys()
    assert backend.woken == 1
    jobs = Jobs(place, DEFAULTS)
    assert jobs.waiting() == [told["id"]]
    assert storage.read_bytes(jobs.volume(told["id"])) == MRC
    assert ask(app, "GET", f"/v1/tomograms/{told['id']}").json() | {"updated": ""} == told | {"updated": ""}


def test_a_tomogram_of_many_pieces_arrives_as_it_was_sent(backend, place):
    volume = np.random.default_rng(1).integers(-9, 9, (3, 2000, 2000), dtype=np.int16)
    data = mrc(volume)
    assert len(data) > 2 * PIECE
    pieces = [data[at : at + 1_000_003] for at in range(0, len(data), 1_000_003)]
    reply = ask(app_of(backend, place), "POST", "/v1/tomograms", pieces)
    assert storage.read_bytes(Jobs(place, DEFAULTS).volume(reply.json()["id"])) == data


def test_the_spacing_of_the_request_goes_before_that_of_the_file(backend, tmp_path):
    app = app_of(backend, str(tmp_path))
    assert ask(app, "POST", "/v1/tomograms?voxel_spacing_angstrom=9.5", MRC).json()["voxel_spacing_angstrom"] == 9.5
    assert ask(app, "POST", "/v1/tomograms", mrc(VOLUME, 0)).json()["voxel_spacing_angstrom"] is None


def changed(at: int, value: int) -> bytes:
    """The tomogram with another word in its header."""
    return MRC[: 4 * at] + struct.pack("<i", value) + MRC[4 * at + 4 :]


REFUSED = {
    "nothing": (b"", "empty"),
    "an image": (JPEG, "is not an MRC file"),
    "a short header": (MRC[:1000], "1000 bytes"),
    "gzip": (b"\x1f\x8b" + MRC[2:], "gunzip"),
    "bzip2": (b"BZh" + MRC[3:], "bunzip2"),
    "complex numbers": (changed(3, 4), "mode 4"),
    "no slices": (changed(2, 0), "is not an MRC file"),
    "other axes": (changed(16, 3), "axes"),
    "a header beyond the file": (changed(23, 10**6), "header"),
    "a header before its start": (changed(23, -600), "header"),
    "slices of one pixel": (mrc(np.zeros((5, 1, 1), np.int8)), "1 x 1"),
    "voxels of nothing": (mrc(VOLUME, 1e-6), "1e-06 angstrom"),
    "voxels of a metre": (mrc(VOLUME, 1e10), "1e+10 angstrom"),
    "voxels that are no cubes": (changed(10, 0x44000000), "cubes"),
}


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tomogram_of_ours_is_refused(backend, tmp_path, body, why):
    assert why in ask(app_of(backend, str(tmp_path)), "POST", "/v1/tomograms", body).problem(422)
    assert kept(tmp_path) == {"records": [], "volumes": [], "queue": []}


@pytest.mark.parametrize(
    ("header", "length", "why"),
    [
        (mrc(np.zeros((4, 2000, 2000), np.int16))[:1024], 10_000_000, "cut short"),
        (mrc(np.zeros((1, 3000, 3000), np.int16))[:1024], 20_000_000, "3000 x 3000"),
        (mrc(np.zeros((MOST_SLICES + 1, 16, 16), np.int8))[:1024], 20_000_000, "slices"),
    ],
    ids=["cut short", "large slices", "many slices"],
)
def test_a_tomogram_that_cannot_be_is_refused_by_its_header_alone(backend, tmp_path, header, length, why):
    app = app_of(backend, str(tmp_path), image_pixels=4_000_000)
    reply = ask(app, "POST", "/v1/tomograms", [header, *[bytes(10**6)] * 20], length=length)
    assert why in reply.problem(422)
    assert reply.taken == 1


@pytest.mark.parametrize(("length", "status"), [(None, 411), ("a", 411), ("9" * 400, 413), (2 * len(MRC), 413)])
def test_an_upload_must_say_how_long_it_is_and_keep_to_the_limit(backend, tmp_path, length, status):
    app = app_of(backend, str(tmp_path), tomogram_bytes=len(MRC) + 10)
    reply = ask(app, "POST", "/v1/tomograms", MRC, length=length)
    reply.problem(status)
    assert reply.taken == 0


@pytest.mark.parametrize("ending", ["leaves", "stalls", "ends", "goes on"])
def test_of_an_upload_that_does_not_end_as_it_should_nothing_is_kept(backend, place, ending):
    data = mrc(np.zeros((10, 1000, 1000), np.int16))
    pieces = [data[at : at + 2**21] for at in range(0, len(data), 2**21)]
    app = app_of(backend, place, timeout_seconds=0.3 if ending == "stalls" else 60)
    body = {
        "leaves": [*pieces[:-1], LEAVE],
        "stalls": [*pieces[:-1], STALL],
        "ends": pieces[:-1],
        "goes on": [*pieces, bytes(10), bytes(10)],
    }[ending]
    reply = ask(app, "POST", "/v1/tomograms", body, length=len(data))
    assert reply.status == {"leaves": 0, "stalls": 408, "ends": 400, "goes on": 400}[ending]
    assert kept(place) == {"records": [], "volumes": [], "queue": []}
    assert backend.woken == 0


def test_of_an_upload_that_is_cancelled_nothing_is_kept(backend, place):
    data = mrc(np.zeros((10, 1000, 1000), np.int16))

    async def cancelled() -> None:
        pieces = [data[:PIECE], data[PIECE : 2 * PIECE], STALL]
        upload = asyncio.create_task(asking(app_of(backend, place), "POST", "/v1/tomograms", pieces, length=len(data)))
        for _ in range(3):
            await asyncio.sleep(0.01)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload

    asyncio.run(cancelled())
    assert kept(place) == {"records": [], "volumes": [], "queue": []}


def test_others_are_answered_while_an_upload_waits_for_the_storage(backend, tmp_path, monkeypatch):
    """However long opening, writing or closing its file takes."""
    app = app_of(backend, str(tmp_path))
    order = []

    async def both() -> None:
        loop, closed = asyncio.get_running_loop(), asyncio.Event()
        here = os.replace

        def slow_replace(*paths: str) -> None:
            if str(paths[1]).endswith(".mrc"):
                asyncio.run_coroutine_threadsafe(closed.wait(), loop).result(10)
            here(*paths)

        monkeypatch.setattr("os.replace", slow_replace)
        upload = asyncio.create_task(asking(app, "POST", "/v1/tomograms", MRC))
        await asyncio.sleep(0.05)
        order.append((await asking(app, "GET", "/healthz")).status)
        closed.set()
        order.append((await upload).status)

    asyncio.run(both())
    assert order == [200, 202]


def test_uploads_side_by_side_have_a_limit_of_memory(backend, tmp_path):
    app = app_of(backend, str(tmp_path), image_bytes=2**20, bytes_in_flight=2**20, tomogram_bytes=2**40)
    header = mrc(np.zeros((1, 1000, 1000), np.int8))[:1024]

    async def two() -> tuple[int, Reply]:
        first = asyncio.create_task(asking(app, "POST", "/v1/tomograms", [header, STALL], length=UPLOAD_BYTES))
        await asyncio.sleep(0.05)
        second = await asking(app, "POST", "/v1/tomograms", [header, STALL], length=UPLOAD_BYTES)
        image = await asking(app, "POST", "/v1/slices", JPEG)
        first.cancel()
        return image.status, second

    status, second = asyncio.run(two())
    second.problem(429)
    assert (status, second.taken) == (200, 0)


def test_a_full_queue_takes_no_more(backend, tmp_path):
    app = app_of(backend, str(tmp_path), tomograms_waiting=2)
    assert [ask(app, "POST", "/v1/tomograms", MRC).status for _ in range(2)] == [202, 202]
    reply = ask(app, "POST", "/v1/tomograms", MRC)
    assert "2 tomograms are waiting" in reply.problem(429)
    assert reply.taken == 0


def test_without_storage_none_is_taken(backend):
    app = app_of(backend)
    reply = ask(app, "POST", "/v1/tomograms", MRC)
    reply.problem(503)
    assert reply.taken == 0
    assert ask(app, "GET", "/v1/model").json()["limits"]["uploads"] is False
    ask(app, "GET", f"/v1/tomograms/{new_id()}").problem(503)


def test_a_storage_that_fails_is_not_named(backend, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    app = app_of(backend, str(tmp_path / "file"))
    assert str(tmp_path) not in ask(app, "POST", "/v1/tomograms", MRC).problem(503)

    class Broken(Jobs):
        def read(self, _):
            raise StorageError("/secret is gone")

    app = app_of(backend, str(tmp_path), jobs=Broken(str(tmp_path), DEFAULTS))
    assert "secret" not in ask(app, "GET", f"/v1/tomograms/{new_id()}").problem(503)


ALLOW = ("s3://bucket/open", "s3://other/", "s3://third/one.mrc")


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/open/a.mrc", "s3://bucket/open", "s3://other/x/y/", "s3://third/one.mrc", "s3://other/%2e%2e/a"],
)
def test_a_tomogram_below_an_allowed_prefix_waits(backend, tmp_path, uri):
    reply = named(app_of(backend, str(tmp_path), allow=ALLOW), uri)
    assert reply.status == 202
    assert reply.json()["name"] == uri.rstrip("/").rsplit("/", 1)[-1]
    assert (Jobs(str(tmp_path), DEFAULTS).read(reply.json()["id"]) or {})["uri"] == uri


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "s3://bucket/opened/a.mrc",
            "s3://bucket/open.mrc",
            "s3://bucket/closed/a.mrc",
            "s3://bucket",
            "s3://bucket/",
        ),
        *("s3://bucket/open/../closed/a.mrc", "s3://bucket/open/..", "s3://bucket/open/./a", "s3://other/.."),
        *("S3://bucket/open/a.mrc", "s3://BUCKET/open/a.mrc", "s3a://bucket/open/a.mrc", "s3:/bucket/open/a.mrc"),
        *("file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/a.mrc", "https://bucket/open/a.mrc", "", "s3://"),
        *(" s3://bucket/open/a.mrc", "file://s3://bucket/open/a.mrc", "zip://a::s3://bucket/open/a.zip"),
        *("s3://third/one.mrc.secret", "s3://bucket/open/a\x00.mrc", "s3://bucket/open/a\nb", "s3://bucket/open/\x7f"),
        *("s3://bucket/open\\..\\closed", "s3://otherwise/a"),
    ],
)
def test_what_lies_elsewhere_is_not_read(backend, tmp_path, uri):
    named(app_of(backend, str(tmp_path), allow=ALLOW), uri).problem(403)
    assert kept(tmp_path)["records"] == []


def test_where_nothing_is_allowed_nothing_is_read(backend, tmp_path):
    named(app_of(backend, str(tmp_path)), "s3://bucket/open/a.mrc").problem(403)


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b'"s3://bucket/open/a"', b"{}", b'{"uri": 1}', b'{"uri": null}', b'{"uri": "s3://\\ud800"}'),
        *(b'{"uri": "s3://bucket/open/a", "more": 1}', b"\xff\xfe", b'{"uri": "' + b"a" * 2001 + b'"}', b"[" * 60_000),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_names_no_tomogram_is_refused(backend, tmp_path, body):
    ask(app_of(backend, str(tmp_path), allow=ALLOW), "POST", "/v1/tomograms", body, JSON).problem(422)


def test_a_long_json_body_is_refused_before_it_is_read(backend, tmp_path):
    reply = ask(app_of(backend, str(tmp_path), allow=ALLOW), "POST", "/v1/tomograms", bytes(65537), JSON)
    reply.problem(413)
    assert reply.taken == 0


def test_a_name_given_with_a_uri_is_heeded(backend, tmp_path):
    assert named(app_of(backend, str(tmp_path), allow=ALLOW), "s3://other/a.mrc", "?name=mine").json()["name"] == "mine"


@pytest.mark.parametrize(
    "query", ["name=", f"name={'a' * 201}", "model=none", "voxel_spacing_angstrom=nan", "voxel_spacing_angstrom=1e9"]
)
def test_wrong_parameters_of_a_tomogram_are_told_before_it_is_read(backend, tmp_path, query):
    reply = ask(app_of(backend, str(tmp_path)), "POST", f"/v1/tomograms?{query}", MRC)
    reply.problem(404 if "model" in query else 422)
    assert reply.taken == 0


IDS = [
    *("a", "a" * 22, "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2frecords%2fx", "a%00b", "%00", "%0a", "-" * 22),
    *("a" * 21 + "%0a", "a" * 22 + ".json", "é" * 22, "%ff", "a" * 101, "a" * 60_000, "*", "[a]", "{z}"),
]


@pytest.mark.parametrize("job_id", IDS, ids=lambda job_id: repr(job_id[:30]))
def test_an_id_that_nobody_was_given_leads_nowhere(backend, place, job_id):
    app = app_of(backend, place)
    (storage.write_bytes(storage.join(place, "secret.json"), b"{}"))
    for method, rest in (("GET", ""), ("GET", "/motors.csv"), ("GET", "/motors.star"), ("DELETE", "")):
        reply = ask(app, method, f"/v1/tomograms/{job_id}{rest}")
        assert reply.status in (404, 422)
        assert "tomogram" in reply.problem(reply.status) or "path" in reply.problem(reply.status)


def test_the_motors_are_read_back_from_csv_and_star(backend, place, tmp_path):
    app, file = app_of(backend, place), tmp_path / "motors.star"
    job_id = finished(place)
    reply = ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv")
    assert reply.header("content-disposition") == 'attachment; filename="tomo_1-motors.csv"'
    table = pd.read_csv(io.BytesIO(reply.body))
    assert table["tomo_id"].tolist() == ["tomo_1", "tomo_1"]
    np.testing.assert_allclose(table[["z", "y", "x", "score"]], [[1.5, 8.25, 9, 0.9], [3, 2, 20, 0.4]])
    np.testing.assert_allclose(table["z_angstrom"], [19.5, 39.0])
    star = stars(file, ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star").body)
    assert star["rlnTomoName"].tolist() == ["tomo_1", "tomo_1"]
    np.testing.assert_allclose(star["rlnCenteredCoordinateZAngst"], [(1.5 - 2) * 13, (3 - 2) * 13])
    np.testing.assert_allclose(star["rlnCenteredCoordinateXAngst"], [(9 - 12) * 13, (20 - 12) * 13])
    star = stars(file, ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star?relion=4").body)
    np.testing.assert_allclose(star["rlnCoordinateY"], [8.25, 2.0])


def test_the_threshold_chooses_among_the_motors(backend, tmp_path):
    app, job_id = app_of(backend, str(tmp_path)), finished(str(tmp_path))
    rows = [
        len(ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv?threshold={t}").body.splitlines()) for t in (0, 0.5, 1)
    ]
    assert rows == [3, 2, 1]
    ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv?threshold=nan").problem(422)
    ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star?relion=6").problem(422)
    ask(app, "GET", f"/v1/tomograms/{job_id}/motors.exe").problem(422)


def test_without_spacing_there_are_voxels_and_a_reason_why_not_more(backend, tmp_path):
    app, job_id = app_of(backend, str(tmp_path)), finished(str(tmp_path), spacing=None)
    assert ask(app, "GET", f"/v1/tomograms/{job_id}").json()["motors"][0]["z_angstrom"] is None
    assert ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv").status == 200
    assert ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star?relion=4").status == 200
    detail = ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star").problem(409)
    assert "relion=4" in detail
    assert "--" not in detail


@pytest.mark.parametrize("name", ['a"; b.mrc', "a\r\nX-Evil: 1", "ä.mrc", "../../etc/passwd", " ", ".mrc", "a b.mrc"])
def test_a_name_of_any_kind_makes_a_safe_file_name(backend, tmp_path, name):
    app, job_id = app_of(backend, str(tmp_path)), finished(str(tmp_path), name=name)
    reply = ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv")
    assert reply.status == 200
    file = (reply.header("content-disposition") or "").removeprefix('attachment; filename="').removesuffix('"')
    assert file.isascii()
    assert not set(file) & set('"\\/;\r\n')
    assert reply.header("x-evil") is None
    assert ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star").status in (200, 409)


def test_a_file_without_motors_has_its_columns_all_the_same(backend, tmp_path):
    app, job_id = app_of(backend, str(tmp_path)), finished(str(tmp_path), motors=[])
    table = pd.read_csv(io.BytesIO(ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv").body))
    assert {"z", "y", "x", "score", "z_angstrom"} <= set(table.columns)
    assert ask(app, "GET", f"/v1/tomograms/{job_id}/motors.star").status == 200


def test_what_is_not_done_has_no_motors_yet(backend, tmp_path):
    app = app_of(backend, str(tmp_path))
    job_id = ask(app, "POST", "/v1/tomograms", MRC).json()["id"]
    assert "queued" in ask(app, "GET", f"/v1/tomograms/{job_id}/motors.csv").problem(409)


def test_a_deleted_tomogram_is_gone_with_all_that_was_kept(backend, place):
    app = app_of(backend, place)
    waiting, done = ask(app, "POST", "/v1/tomograms", MRC).json()["id"], finished(place)
    for job_id in (waiting, done):
        reply = ask(app, "DELETE", f"/v1/tomograms/{job_id}")
        assert (reply.status, reply.body) == (204, b"")
        ask(app, "GET", f"/v1/tomograms/{job_id}").problem(404)
        ask(app, "DELETE", f"/v1/tomograms/{job_id}").problem(404)
    assert kept(place) == {"records": [], "volumes": [], "queue": []}
