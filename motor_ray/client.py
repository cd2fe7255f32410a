"""Asks an endpoint of `motor-ray serve`, with nothing but Python's standard library.

    client = Client("http://127.0.0.1:8000")
    client.slice("slice.jpg")["detections"]
    client.tomogram("tomogram.mrc")["motors"]

Answers are the endpoint's JSON objects, which its /docs describe: places are z, y, x in pixels or voxels, where an
index is a centre.
"""

import contextlib
import http.client
import json
import logging
import mimetypes
import os
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from motor_ray.errors import ConfigError, MotorRayError

Answer = dict[str, Any]
Image = str | os.PathLike[str] | bytes
"""An image file: where it is, or what is in it."""

BUSY = 429
"""There is no room now, and nothing was done."""

PASSING = (BUSY, 502, 503)
"""Not now: there is no room, no storage or no detector, or whoever was at work is gone, as load balancers say it."""

PAUSE_SECONDS = 0.1
"""Before a request is sent again, if the endpoint does not say when; twice as long each time."""

LONGEST_PAUSE_SECONDS = 10.0

PATIENCE_SECONDS = 120.0
"""An endpoint that wants us to wait longer is not asked again."""

HEAD_BYTES = 1024
"""What a file takes in a form besides itself, with the longest name."""

PIECE = 2**20
"""Bytes of an upload that are read and sent together."""

log = logging.getLogger(__name__)


class EndpointError(MotorRayError, RuntimeError):
    """A request that was refused, and why, or that got no answer; then its `status` is None."""

    def __init__(self, status: int | None, title: str, detail: str, request_id: str | None = None) -> None:
        which = f" (request {request_id})" if request_id else ""
        super().__init__(f"{f'{status} ' if status else ''}{title}: {detail}{which}")
        self.status, self.title, self.detail, self.request_id = status, title, detail, request_id


class Client:
    """An endpoint. Threads may share one; it keeps their connections open for the next requests.

    key
        What the endpoint knows us by, if it asks.
    timeout
        Seconds without a byte after which a request has failed.
    retries
        How often a request is sent again that found no room, or whose connection broke. An upload whose connection
        broke is not, because it may have arrived.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60.0, retries: int = 8) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{url}: not the address of an endpoint, such as http://127.0.0.1:8000")
        self.host, self.port, self.prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
        self.timeout, self.retries = timeout, retries
        self.retried = 0
        """Requests that were sent again so far."""
        self._idle: list[http.client.HTTPConnection] = []

    def model(self, name: str | None = None) -> Answer:
        """What is known of a model, the endpoint's usual one if no `name` is given, and what may be sent."""
        return self._json(Request("GET", "/v1/model", {"model": name}))

    def slice(
        self,
        image: Image,
        *,
        threshold: float | None = None,
        voxel_spacing_angstrom: float | None = None,
        model: str | None = None,
        tta: str | None = None,
    ) -> Answer:
        """What is found on one image, a JPEG, PNG or TIFF file: detections best first, in its pixels, and presence.

        Without a `threshold` all that the model reports is there; `tta` off, fast or full is test-time augmentation.
        Raises EndpointError, or OSError if there is no such
        file.
        """
        asked = _wishes(threshold, voxel_spacing_angstrom, model, tta)
        data, _ = _file(image, 0)
        return self._json(Request("POST", "/v1/slices", asked, data))

    def slices(
        self,
        images: Iterable[Image],
        *,
        threshold: float | None = None,
        voxel_spacing_angstrom: float | None = None,
        model: str | None = None,
        tta: str | None = None,
    ) -> list[Answer]:
        """What is found on several images, in their order, as many to a request as the endpoint takes.

        One that cannot be looked at has a "problem" instead of detections. Raises EndpointError or OSError.
        """
        asked = _wishes(threshold, voxel_spacing_angstrom, model, tta)
        images = list(images)
        limits = self.model(model)["limits"] if images else {}
        found: list[Answer] = []
        for files in _batches(images, limits):
            body, kind = _form(files)
            found += self._json(Request("POST", "/v1/slices:batch", asked, body, kind))["slices"]
        return found

    def tomogram(
        self,
        tomogram: str | os.PathLike[str],
        *,
        name: str | None = None,
        voxel_spacing_angstrom: float | None = None,
        model: str | None = None,
        wait: bool = True,
        progress: Callable[[Answer], object] | None = None,
        every: float = 1.0,
    ) -> Answer:
        """Hand in a tomogram, an MRC file or an s3:// URI that the endpoint may read, and wait for its motors.

        `progress` gets what is known of it, `every` so many seconds. With `wait` off it returns at once, and `status`
        tells how far it is. Raises EndpointError, also if the tomogram fails, or OSError if there is no such file.
        """
        record = self.submit(tomogram, name=name, voxel_spacing_angstrom=voxel_spacing_angstrom, model=model)
        while wait and record["status"] not in ("done", "failed"):
            if progress:
                progress(record)
            time.sleep(every)
            record = self.status(record["id"])
        if progress:
            progress(record)
        if record["status"] == "failed":
            problem = record["problem"]
            raise EndpointError(problem["status"], problem["title"], problem["detail"], problem.get("request_id"))
        return record

    def submit(
        self,
        tomogram: str | os.PathLike[str],
        *,
        name: str | None = None,
        voxel_spacing_angstrom: float | None = None,
        model: str | None = None,
    ) -> Answer:
        """Hand in a tomogram, as `tomogram`; what is known of it now. A file is sent as it is read."""
        asked = {"name": name, "voxel_spacing_angstrom": voxel_spacing_angstrom, "model": model}
        if isinstance(tomogram, str) and tomogram.startswith("s3://"):
            body = json.dumps({"uri": tomogram}).encode()
            return self._json(Request("POST", "/v1/tomograms", asked, body, "application/json", pure=False))
        with Path(tomogram).open("rb") as file:
            asked["name"] = name or Path(tomogram).name
            return self._json(Request("POST", "/v1/tomograms", asked, file, pure=False))

    def status(self, tomogram_id: str) -> Answer:
        """How far a tomogram is, and what was found in it."""
        return self._json(Request("GET", _path_of(tomogram_id)))

    def forget(self, tomogram_id: str) -> None:
        """Have a tomogram forgotten, and what was found in it."""
        self._ask(Request("DELETE", _path_of(tomogram_id)))

    def motors_csv(self, tomogram_id: str, threshold: float | None = None) -> str:
        """The motors of a tomogram as a CSV table."""
        return self._table(tomogram_id, "csv", {"threshold": threshold})

    def star(self, tomogram_id: str, threshold: float | None = None, relion: int | None = None) -> str:
        """The motors of a tomogram as coordinates for RELION, of version 4 or 5."""
        return self._table(tomogram_id, "star", {"threshold": threshold, "relion": relion})

    def close(self) -> None:
        """Close the connections; another request opens a new one."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _table(self, tomogram_id: str, kind: str, query: Mapping[str, Any]) -> str:
        return self._ask(Request("GET", f"{_path_of(tomogram_id)}/motors.{kind}", query)).decode()

    def _json(self, request: "Request") -> Answer:
        data = self._ask(request)
        try:
            answer: Answer = json.loads(data)
        except ValueError:
            raise EndpointError(None, "Not an endpoint of ours", f"{self.host} answers {data[:80]!r}") from None
        return answer

    def _ask(self, request: "Request") -> bytes:
        """The answer's body."""
        for attempt in range(self.retries + 1):
            pause = min(PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS)
            try:
                status, said, data = self._exchange(request)
            except (OSError, http.client.HTTPException) as error:
                failure = EndpointError(None, "No answer", f"{self.host}: {error or type(error).__name__}")
                broken = isinstance(error, ConnectionError | http.client.HTTPException)
                again = broken and (request.pure or isinstance(error, ConnectionRefusedError))
            else:
                if status < 300:
                    return data
                failure = _problem(status, said, data)
                pause = _seconds(said.get("Retry-After"), pause)
                again = status == BUSY or (request.pure and (status in PASSING or _is_bare(status, said)))
            if not again or attempt == self.retries or pause > PATIENCE_SECONDS:
                break
            log.info("%s %s: %s; again in %.1f s", request.method, request.path, failure, pause)
            self.retried += 1
            # Not all at the same time, if many were refused at the same time.
            time.sleep(pause * random.uniform(1.0, 1.25))
        raise failure

    def _exchange(self, request: "Request") -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of an answer. Raises OSError or HTTPException if there is none."""
        # What cannot be sent again is not put on a connection that the other side may have closed meanwhile.
        connection = self._idle.pop() if self._idle and request.pure else self._connection()
        try:
            # Who refuses a body may do so, and hang up, before it has come; then there is an answer all the same.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(
                    request.method, self.prefix + request.target(), request.body, self.headers | request.headers()
                )
            response = connection.getresponse()
            answer = response.status, response.headers, response.read()
        except BaseException:
            connection.close()
            raise
        if request.pure and not response.will_close:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        return self.kind(self.host, self.port, timeout=self.timeout, blocksize=PIECE)


class Request(NamedTuple):
    """What is asked."""

    method: str
    path: str
    query: Mapping[str, Any] = {}
    """Without what is None."""

    body: bytes | BinaryIO | None = None
    kind: str = "application/octet-stream"
    """The body's Content-Type."""

    pure: bool = True
    """Whether it does no harm to send it twice."""

    def target(self) -> str:
        """Path and query."""
        given = urlencode({name: value for name, value in self.query.items() if value is not None})
        return f"{self.path}?{given}" if given else self.path

    def headers(self) -> dict[str, str]:
        """What is said of the body; a file will be read from its start."""
        if self.body is None:
            return {}
        size = len(self.body) if isinstance(self.body, bytes) else _rewound(self.body)
        return {"Content-Type": self.kind, "Content-Length": str(size)}


def _wishes(threshold: float | None, spacing: float | None, model: str | None, tta: str | None) -> dict[str, Any]:
    return {"threshold": threshold, "voxel_spacing_angstrom": spacing, "model": model, "tta": tta}


def _path_of(tomogram_id: str) -> str:
    return f"/v1/tomograms/{quote(tomogram_id, safe='')}"


def _file(image: Image, number: int) -> tuple[bytes, str]:
    """What is in an image file, and its name."""
    if isinstance(image, bytes):
        return image, f"image {number}"
    return Path(image).read_bytes(), Path(image).name


def _batches(images: Iterable[Image], limits: Mapping[str, int]) -> Iterator[list[tuple[bytes, str]]]:
    """The files of `images`, as many together as the endpoint takes: of one that is too large alone it says so."""
    batch: list[tuple[bytes, str]] = []
    size = 0
    for number, image in enumerate(images):
        data, name = _file(image, number)
        weight = len(data) + HEAD_BYTES
        if batch and (len(batch) == limits["batch_images"] or size + weight > limits["batch_bytes"]):
            yield batch
            batch, size = [], 0
        batch.append((data, name))
        size += weight
    if batch:
        yield batch


def _rewound(file: BinaryIO) -> int:
    """Bytes of a file that will be read from its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _form(files: Iterable[tuple[bytes, str]]) -> tuple[bytes, str]:
    """Files as a multipart form, and its Content-Type."""
    boundary = secrets.token_hex(16)
    pieces = []
    for data, name in files:
        escaped = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{escaped}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        pieces += [head.encode(), data, b"\r\n"]
    return b"".join([*pieces, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def _problem(status: int, headers: http.client.HTTPMessage, data: bytes) -> EndpointError:
    """What an answer says went wrong: problem details of RFC 9457, or what is in its place."""
    request_id = headers.get("X-Request-ID")
    try:
        said = json.loads(data)
        return EndpointError(status, str(said["title"]), str(said["detail"]), said.get("request_id", request_id))
    except (ValueError, KeyError, TypeError):
        title = http.client.responses.get(status, "Unknown status")
        detail = data[:200].decode(errors="replace").strip() or "no more is said"
        return EndpointError(status, title, detail, request_id)


def _is_bare(status: int, headers: http.client.HTTPMessage) -> bool:
    """Whether HAProxy says that whoever was at work is gone: an ingress adds details to its errors."""
    return status == 500 and headers.get_content_type() != "application/problem+json"


def _seconds(retry_after: str | None, otherwise: float) -> float:
    """How long to wait. Dates, which Retry-After may hold, too, count as nothing said: our endpoint sends none."""
    return float(retry_after) if retry_after and retry_after.isdigit() else otherwise
