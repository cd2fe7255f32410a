"""Every request has an id, a line in the log without its contents, and an answer even if something breaks."""

import json
import logging
import re
import time
import uuid
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motor_ray.errors import MotorRayError
from motor_ray.service.backend import Meter
from motor_ray.service.problems import OURS, ProblemError, answer, problem_of

SAFE = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Headers of every answer that does not set them itself."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger(__name__)


class Watch:
    """ASGI middleware: request ids, safe headers, the log, and the figures."""

    def __init__(self, app: ASGIApp, meter: Meter, *, tells_id: bool) -> None:
        self.app, self.meter, self.tells_id = app, meter, tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, begun = time.perf_counter(), 500, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = MutableHeaders(scope=message)
                if self.tells_id:
                    headers["X-Request-ID"] = request_id
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        except Exception:
            # Not in a handler of Starlette's: it would answer from outside of this, without our headers.
            log.exception("request %s broke", request_id)
            if begun:
                raise
            await answer(ProblemError(500, OURS[500]), request_id)(scope, receive, send_with_headers)
        finally:
            self._tell(scope, request_id, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # The route, not the path, which holds ids and whatever else people type.
        route = getattr(scope.get("route"), "path", "none")
        self.meter.request(route, status, seconds)
        line: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
        }
        log.info(json.dumps(line))


def request_id_of(scope: Scope) -> str:
    """The id that the client gave, if it is one, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def add_problem_handlers(app: FastAPI) -> None:
    """Turn all that is raised into problem details."""

    def asked(request: Request) -> str:
        return str(request.state.request_id)

    @app.exception_handler(ProblemError)
    async def refused(request: Request, problem: ProblemError) -> Response:
        return answer(problem, asked(request))

    @app.exception_handler(MotorRayError)
    async def failed(request: Request, error: MotorRayError) -> Response:
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("request %s: %s", asked(request), error)
        return answer(problem, asked(request))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        wrong = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return answer(ProblemError(422, "; ".join(wrong)), asked(request))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        detail = {404: "There is nothing at this path; /docs describes the API"}.get(error.status_code, error.detail)
        return answer(ProblemError(error.status_code, detail, headers=dict(error.headers or {})), asked(request))
