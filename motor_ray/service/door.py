"""The outermost layer of Ray Serve's HTTP servers, named to them by an environment variable.

Serve reads the body of a request into memory as fast as it comes, whatever becomes of it. Unless it is told not to
look out for disconnects: then the application takes the body from the socket as it goes, and a slow reader makes the
sender wait. With Serve's proxy written in Python nothing helps, and bodies are counted here instead.
"""

import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from motor_ray.errors import BusyError
from motor_ray.service.intake import Room
from motor_ray.service.problems import ProblemError, answer, problem_of
from motor_ray.service.watching import SAFE, request_id_of

DOOR_BYTES = "MOTOR_RAY_DOOR_BYTES"
"""Environment variable: bytes of bodies at a time, where they must be counted."""

OURS = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve_multiplexed_model_id", b"x-session-id")
"""Headers by which Serve is told things, so that none of them may come from outside."""


class Door:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, most: int | None) -> None:
        self.app, self.room = app, Room(most) if most else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower().replace(b"_", b"-") not in _OURS]
        scope["headers"] = [*headers, (b"x-request-disconnect-disabled", b"?1")]
        if self.room is None:
            await self.app(scope, receive, send)
            return
        try:
            with self.room.for_bytes(_bytes(headers)):
                await self.app(scope, receive, send)
        except (BusyError, ProblemError) as error:
            problem = error if isinstance(error, ProblemError) else problem_of(error)
            refusal = answer(problem, request_id_of(scope))
            refusal.headers.update(SAFE)
            await refusal(scope, receive, send)


_OURS = {name.replace(b"_", b"-") for name in OURS}


def _bytes(headers: list[tuple[bytes, bytes]]) -> int:
    """Bytes of the body. Raises ProblemError if it is sent in chunks, without saying how long it will be."""
    said = dict(headers)
    if b"transfer-encoding" in said:
        raise ProblemError(411, "A body comes with its Content-Length")
    length = said.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18:
        raise ProblemError(400, "The Content-Length is no number, or one beyond reason")
    return int(length)


def doors() -> list[Middleware]:
    """What Serve asks for."""
    most = os.environ.get(DOOR_BYTES)
    return [Middleware(Door, most=int(most) if most else None)]
