import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from motor_ray.client import Client, EndpointError
from motor_ray.errors import ConfigError, MotorRayError

Reply = Callable[["Handler"], None]

BIG = 64 * 2**20


class Seen(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    size: int
    body: bytes
    connection: Any


class Stub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client may hang up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def take(self) -> None:
        reply = self.server.replies.pop(0)
        if reply is not refuse_unread:
            self.note(int(self.headers.get("Content-Length", 0)))
        reply(self)

    do_GET = do_POST = do_DELETE = take  # noqa: N815

    def note(self, size: int) -> None:
        kept, left = b"", size
        while left and (piece := self.rfile.read(min(left, 2**16))):
            left -= len(piece)
            if size <= 2**20:
                kept += piece
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, url.path, parse_qs(url.query), headers, size - left, kept, self.client_address)
        self.server.seen.append(seen)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def answer(status: int, value: Any, kind: str = "application/json", **headers: str) -> Reply:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()

    def reply(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for name, said in headers.items():
            handler.send_header(name.replace("_", "-"), said)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def refused(status: int, **headers: str) -> Reply:
    problem = {"type": "about:blank", "title": "Title", "status": status, "detail": "Why.", "request_id": "r-1"}
    return answer(status, problem, "application/problem+json", **headers)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def refuse_unread(handler: Handler) -> None:
    refused(429, Retry_After="1", Connection="close")(handler)
    handler.close_connection = True


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(stub) -> Iterator[Client]:
    with Client(stub.url, "secret", timeout=10, retries=3) as one:
        yield one


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def test_a_slice_goes_as_it_is_with_what_is_asked_and_our_key(stub, client, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    stub.replies += [answer(200, {"detections": []}), answer(200, {"detections": []})]
    assert client.slice(tmp_path / "a.jpg", threshold=0.0, voxel_spacing_angstrom=13.1) == {"detections": []}
    client.slice(b"other", model="small", tta="fast")
    first, second = stub.seen
    assert (first.method, first.path, first.body) == ("POST", "/v1/slices", b"image")
    assert first.query == {"threshold": ["0.0"], "voxel_spacing_angstrom": ["13.1"]}
    assert first.headers["authorization"] == "Bearer secret"
    assert (second.query, second.body) == ({"model": ["small"], "tta": ["fast"]}, b"other")
    assert first.connection == second.connection, "one connection does for both"


def test_an_address_may_have_a_path_and_a_key_a_line_end(stub):
    stub.replies += [answer(200, {})]
    with Client(f"{stub.url}/motors/", "secret\n") as one:
        one.model("best")
    assert (stub.seen[0].path, stub.seen[0].query) == ("/motors/v1/model", {"model": ["best"]})
    assert stub.seen[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host?x=1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="not the address of an endpoint"):
        Client(url)


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_slice_is_sent_again_when_the_endpoint_says(stub, client, pauses, status):
    stub.replies += [refused(status, Retry_After="7"), answer(200, {"presence": 0.5})]
    assert client.slice(b"image")["presence"] == 0.5
    assert [seen.body for seen in stub.seen] == [b"image", b"image"]
    assert len(pauses) == 1
    assert 7 <= pauses[0] <= 7 * 1.25
    assert client.retried == 1


def test_a_slice_is_sent_again_when_haproxy_says_that_the_ingress_is_gone(stub, client):
    stub.replies += [answer(500, b"Internal Server Error", "text/plain"), answer(200, {"presence": 0.5})]
    assert client.slice(b"image")["presence"] == 0.5


def test_a_slice_that_the_endpoint_breaks_on_is_not_sent_again(stub, client):
    stub.replies += [refused(500), answer(200, {})]
    with pytest.raises(EndpointError, match="500"):
        client.slice(b"image")
    assert len(stub.seen) == 1


def test_it_is_sent_again_so_often_and_not_more(stub, client, pauses):
    stub.replies += [refused(503)] * 9
    with pytest.raises(EndpointError):
        client.slice(b"image")
    assert len(stub.seen) == 1 + 3
    assert pauses == sorted(pauses)


def test_an_endpoint_that_wants_us_to_wait_for_hours_is_not_asked_again(stub, client, pauses):
    stub.replies += [refused(503, Retry_After="7200")]
    with pytest.raises(EndpointError):
        client.model()
    assert not pauses


def test_a_slice_is_sent_again_when_the_connection_breaks(stub, client):
    stub.replies += [answer(200, {}), hang_up, hang_up, answer(200, {"presence": 0.5})]
    client.slice(b"image")
    assert client.slice(b"image") == {"presence": 0.5}
    assert client.retried == 2


def test_nobody_there_is_an_error_of_ours(pauses):
    with Stub() as closed:
        url = closed.url
    with pytest.raises(EndpointError, match="No answer") as caught:
        Client(url, retries=2).model()
    assert caught.value.status is None
    assert isinstance(caught.value, MotorRayError)
    assert len(pauses) == 2


def test_an_endpoint_that_says_nothing_is_given_up(stub, pauses):
    stub.replies += [lambda _: threading.Event().wait(1.0)]
    with Client(stub.url, timeout=0.2) as one, pytest.raises(EndpointError, match="timed out"):
        one.slice(b"image")
    assert not pauses


def test_a_refusal_says_why_and_which_request(stub, client):
    stub.replies += [refused(422)]
    with pytest.raises(EndpointError, match=r"422 Title: Why\. \(request r-1\)") as caught:
        client.slice(b"not an image")
    error = caught.value
    assert (error.status, error.title, error.detail, error.request_id) == (422, "Title", "Why.", "r-1")
    assert len(stub.seen) == 1


@pytest.mark.parametrize("said", [b"<html>gone</html>", b"[]", b'{"title": 1}', b"\xff"])
def test_a_refusal_of_somebody_in_between_is_told_as_it_is(stub, client, said):
    stub.replies += [answer(404, said, X_Request_ID="r-2")]
    with pytest.raises(EndpointError, match="404 Not Found") as caught:
        client.model()
    assert caught.value.request_id == "r-2"


def test_what_is_no_json_does_not_come_from_an_endpoint(stub, client):
    stub.replies += [answer(200, b"<html>hello</html>")]
    with pytest.raises(EndpointError, match="Not an endpoint of ours"):
        client.model()


def test_slices_go_together_as_many_as_the_endpoint_takes(stub, client, tmp_path):
    (tmp_path / 'a "b".png').write_bytes(b"\r\n--first\r\n")
    limits = answer(200, {"limits": {"batch_images": 2, "batch_bytes": 2**20}})
    stub.replies += [limits, answer(200, {"slices": [{"n": 0}, {"n": 1}]}), answer(200, {"slices": [{"n": 2}]})]
    images = [tmp_path / 'a "b".png', b"second", b"third"]
    assert client.slices(iter(images), threshold=0.5) == [{"n": 0}, {"n": 1}, {"n": 2}]
    _, first, second = stub.seen
    assert (first.path, first.query) == ("/v1/slices:batch", {"threshold": ["0.5"]})
    assert parts_of(first) == [("images", "a %22b%22.png", b"\r\n--first\r\n"), ("images", "image 1", b"second")]
    assert parts_of(second) == [("images", "image 2", b"third")]


def test_slices_that_weigh_too_much_together_go_apart(stub, client):
    limits = answer(200, {"limits": {"batch_images": 32, "batch_bytes": 10_000}})
    stub.replies += [limits, *(answer(200, {"slices": [{"n": n}]}) for n in range(2)), answer(200, {"slices": []})]
    client.slices([b"a" * 6000, b"b" * 3000, b"c" * 2000, b"d" * 20_000])
    _, *asked = stub.seen
    assert [[len(data) for *_, data in parts_of(one)] for one in asked] == [[6000], [3000, 2000], [20_000]]
    assert all(one.size <= 10_000 for one in asked[:2])


def parts_of(seen: Seen) -> list[tuple[Any, Any, Any]]:
    head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
    form: Any = message_from_bytes(head + seen.body, policy=HTTP)
    return [
        (part.get_param("name", header="content-disposition"), part.get_filename(), part.get_payload(decode=True))
        for part in form.iter_parts()
    ]


def test_no_slices_are_not_asked_for(client):
    assert client.slices([]) == []


def record(status: str, **known: Any) -> Reply:
    said = {"id": "i-1", "status": status, "motors": [], "problem": None, **known}
    return answer(202 if status == "queued" else 200, said)


def test_a_tomogram_is_streamed_and_waited_for(stub, client, tmp_path, pauses):
    with (tmp_path / "big.mrc").open("wb") as file:
        file.truncate(BIG)
    stub.replies += [record("queued"), record("running", slices_done=3), record("done", motors=[{"z": 1.0}])]
    told: list[str] = []
    tracemalloc.start()
    done = client.tomogram(
        tmp_path / "big.mrc", voxel_spacing_angstrom=10.0, progress=lambda known: told.append(known["status"]), every=2
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done["motors"] == [{"z": 1.0}]
    assert told == ["queued", "running", "done"]
    assert pauses == [2, 2]
    upload, *rest = stub.seen
    assert (upload.method, upload.path, upload.size) == ("POST", "/v1/tomograms", BIG)
    assert upload.query == {"voxel_spacing_angstrom": ["10.0"], "name": ["big.mrc"]}
    assert upload.headers["content-length"] == str(BIG)
    assert [one.path for one in rest] == ["/v1/tomograms/i-1"] * 2
    assert peak < BIG / 4, "the file was read whole"


def test_one_need_not_wait_for_a_tomogram(stub, client, tmp_path):
    (tmp_path / "a.mrc").write_bytes(b"voxels")
    stub.replies += [record("queued")]
    assert client.tomogram(tmp_path / "a.mrc", name="of Monday", wait=False)["status"] == "queued"
    assert stub.seen[0].query["name"] == ["of Monday"]


def test_a_tomogram_that_fails_says_why(stub, client):
    problem = {"title": "Unprocessable", "status": 422, "detail": "Cut short."}
    stub.replies += [record("queued"), record("failed", problem=problem)]
    with pytest.raises(EndpointError, match="Cut short") as caught:
        client.tomogram("s3://bucket/a.mrc", model="small")
    assert caught.value.status == 422
    assert json.loads(stub.seen[0].body) == {"uri": "s3://bucket/a.mrc"}
    assert stub.seen[0].headers["content-type"] == "application/json"
    assert stub.seen[0].query == {"model": ["small"]}


@pytest.mark.parametrize("ending", [hang_up, refused(503), refused(502)], ids=["broken", "503", "502"])
def test_an_upload_that_may_have_arrived_is_not_sent_again(stub, client, tmp_path, ending):
    (tmp_path / "a.mrc").write_bytes(b"voxels")
    stub.replies += [ending, record("queued")]
    with pytest.raises(EndpointError):
        client.submit(tmp_path / "a.mrc")
    assert len(stub.seen) == 1


def test_an_upload_that_found_no_room_is_sent_again_from_its_start(stub, client, tmp_path):
    (tmp_path / "a.mrc").write_bytes(b"voxels")
    stub.replies += [refused(429, Retry_After="1"), record("queued")]
    assert client.submit(tmp_path / "a.mrc")["id"] == "i-1"
    assert [seen.body for seen in stub.seen] == [b"voxels", b"voxels"]


def test_an_upload_that_is_refused_before_it_has_come_is_told_so_or_that_it_broke(stub, client, tmp_path):
    with (tmp_path / "big.mrc").open("wb") as file:
        file.truncate(BIG)
    # Whether the answer outlives the sudden end of the connection is the kernel's affair.
    stub.replies += [refuse_unread] * 4
    with pytest.raises(EndpointError) as caught:
        client.submit(tmp_path / "big.mrc")
    assert caught.value.status in (429, None)


def test_ids_are_quoted_and_tables_come_as_text(stub, client):
    stub.replies += [answer(200, b"z,y,x\n"), answer(200, b"data_particles\n"), record("done"), answer(204, b"")]
    assert client.motors_csv("i/1", threshold=0.2) == "z,y,x\n"
    assert client.star("i-1", relion=4) == "data_particles\n"
    assert client.status("i-1")["status"] == "done"
    client.forget("i-1")
    assert [(seen.method, seen.path) for seen in stub.seen] == [
        ("GET", "/v1/tomograms/i%2F1/motors.csv"),
        ("GET", "/v1/tomograms/i-1/motors.star"),
        ("GET", "/v1/tomograms/i-1"),
        ("DELETE", "/v1/tomograms/i-1"),
    ]
    assert [seen.query for seen in stub.seen[:2]] == [{"threshold": ["0.2"]}, {"relion": ["4"]}]


def test_threads_may_share_a_client(stub, client):
    stub.replies += [answer(200, {"presence": 0.5})] * 40
    found: list[float] = []

    def ask() -> None:
        found.extend(client.slice(b"image")["presence"] for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0.5] * 40


def test_it_needs_nothing_but_python():
    code = """
import sys, motor_ray.client
import_of = {name.split('.')[0] for name in sys.modules}
sys.exit(bool({'numpy', 'torch', 'ray', 'pydantic', 'aiohttp', 'pyarrow'} & import_of))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
