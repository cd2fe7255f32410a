"""Asks an ASGI application in this process, without a server that would tidy up what is sent."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

LEAVE = object()
"""In place of a piece of a body: the client goes away."""

STALL = object()
"""In place of a piece of a body: the client sends nothing more, and stays."""


class Reply(NamedTuple):
    """An answer, and how much of the body was taken for it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    taken: int
    """Pieces of the request's body that the application asked for."""

    def header(self, name: str) -> str | None:
        """The value of a header, which is there once at most."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, values
        return values[0] if values else None

    def json(self) -> Any:
        """The JSON value of the body."""
        return json.loads(self.body)

    def problem(self, status: int) -> str:
        """What the answer, a problem of this status, says is wrong."""
        assert self.status == status, (self.status, self.body)
        assert self.header("content-type") == "application/problem+json"
        told = self.json()
        assert told.keys() == {"type", "title", "status", "detail", "request_id"}
        assert told["status"] == status
        assert told["request_id"]
        assert (self.header("retry-after") is not None) == (status in (429, 503))
        return str(told["detail"])


class Sender:
    """What a request's body is read from."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self.pieces, self.taken = list(pieces), 0

    async def receive(self) -> Message:
        """The next piece."""
        if self.taken >= len(self.pieces):
            return {"type": "http.disconnect"}
        piece = self.pieces[self.taken]
        self.taken += 1
        if piece is STALL:
            await asyncio.Event().wait()
        if piece is LEAVE:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": self.taken < len(self.pieces)}


def scope_of(method: str, target: str, headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What a server makes of a request line and its headers."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "root_path": "",
        "query_string": query.encode("latin-1"),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 80),
    }


async def asking(
    app: ASGIApp,
    method: str,
    target: str,
    body: bytes | Iterable[Any] = b"",
    headers: Iterable[tuple[str, str]] = (),
    *,
    length: int | str | None = -1,
) -> Reply:
    """The answer to a request. `length` is what it says of its body's: the truth, if not given, None for nothing.

    The body may come in pieces; LEAVE and STALL are such.
    """
    pieces = [body] if isinstance(body, bytes) else list(body)
    headers = list(headers)
    if length == -1:
        length = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
    if length is not None and (method in ("POST", "PUT") or length):
        headers.append(("Content-Length", str(length)))
    sender = Sender(pieces)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope_of(method, target, headers), sender.receive, send)
    if not sent:
        return Reply(0, [], b"", sender.taken)
    assert [message["type"] for message in sent].count("http.response.start") == 1
    start = sent[0]
    told = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
    reply = Reply(start["status"], told, b"".join(one.get("body", b"") for one in sent[1:]), sender.taken)
    check(reply)
    return reply


def ask(app: ASGIApp, *request: Any, **more: Any) -> Reply:
    """`asking`, from where nothing else is going on."""
    return asyncio.run(asking(app, *request, **more))


def check(reply: Reply) -> None:
    """What holds for every answer."""
    assert reply.header("X-Request-ID")
    assert reply.header("X-Content-Type-Options") == "nosniff"
    assert "default-src 'self'" in (reply.header("Content-Security-Policy") or "")
    if reply.status >= 400:
        detail = reply.problem(reply.status)
        for inside in ("Traceback", 'File "', " object at 0x", "site-packages"):
            assert inside not in detail


def form(files: Iterable[tuple[str, bytes]], field: str = "images") -> tuple[bytes, list[tuple[str, str]]]:
    """The body of a form with these files, by name, and the headers that go with it."""
    parts = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
        % (field.encode(), name.encode(), data)
        for name, data in files
    )
    return parts + b"--edge--\r\n", [("Content-Type", "multipart/form-data; boundary=edge")]
