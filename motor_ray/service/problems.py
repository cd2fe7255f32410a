"""What goes wrong with a request, as clients get to see it: problem details of RFC 9457."""

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

from motor_ray.errors import (
    BusyError,
    ConfigError,
    ExportError,
    ManifestError,
    MotorRayError,
    OutageError,
    SliceCorruptError,
    SliceMissingError,
    StorageError,
    TomogramError,
)

STATUS: dict[type[MotorRayError], int] = {
    BusyError: 429,
    OutageError: 503,
    SliceCorruptError: 422,
    SliceMissingError: 422,
    TomogramError: 422,
    ManifestError: 422,
    ExportError: 409,
    ConfigError: 422,
    StorageError: 503,
}
"""The status of each kind of error, the first of those that an error is."""

RETRY_AFTER = {429: "1", 503: "5"}
"""Seconds after which it is worth trying again."""


class ProblemError(Exception):
    """A request that is refused, and why."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def problem_of(error: MotorRayError) -> ProblemError:
    """An error of ours as an answer: what came from the client is its fault, the rest is ours."""
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    return ProblemError(status, str(error) if status < 500 else OURS[status])


OURS = {
    500: "Something went wrong here; it is in the log under this request id",
    503: "No detector, or no storage, answers; try again later",
}
"""What clients are told when the fault is ours: not where, for messages name files and buckets."""


def describe(status: int, detail: str, request_id: str | None = None) -> dict[str, Any]:
    """The JSON object of a problem."""
    own = {"request_id": request_id} if request_id else {}
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **own}


def answer(problem: ProblemError, request_id: str) -> JSONResponse:
    """The response that tells a problem."""
    headers = {"Retry-After": RETRY_AFTER[problem.status]} if problem.status in RETRY_AFTER else {}
    return JSONResponse(
        describe(problem.status, problem.detail, request_id),
        problem.status,
        headers=headers | problem.headers,
        media_type="application/problem+json",
    )
