"""An endpoint with answers made up beforehand, behind the real page, on a port of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

import motor_ray

WEB = Path(motor_ray.__file__).parent / "web"
POLICY = "default-src 'self'; img-src 'self' blob: data:"
TOMOGRAM_ID = "abcdefghijklmnopqrstuv"
TOMOGRAM = f"/v1/tomograms/{TOMOGRAM_ID}"

MODEL = {
    "name": "default",
    "models": ["default"],
    "sha256": "0123456789abcdef" * 4,
    "motor_ray": "0.1.0",
    "frame_pixels": 720,
    "frame_mode": "fit",
    "in_slices": 1,
    "score_threshold": 0.1,
    "presence_threshold": 0.15,
    "re_scored": False,
    "box_pixels": 100.0,
    "box_angstrom": None,
    "metrics": {},
    "limits": {
        "image_bytes": 10**7,
        "image_pixels": 10**7,
        "batch_images": 32,
        "batch_bytes": 2**29,
        "tomogram_bytes": 10**8,
        "uploads": True,
    },
}


@dataclass
class StandIn:
    """What the endpoint answers, and what it was asked."""

    url: str = ""
    key: str | None = None
    """Without which the answer is 401."""

    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    detections: list[dict[str, float]] = field(default_factory=list)
    note: str | None = None
    size: tuple[int, int, int] = (1, 1, 1)
    """z, y, x of the slice or tomogram that is sent."""

    motors: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Answers about the tomogram, before it is done."""

    failures: list[dict[str, Any]] = field(default_factory=list)
    problem: Response | None = None
    """Answers the next POST in place of what was found."""

    gate: threading.Event | None = None
    """A POST of a slice waits for it."""

    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """Method, path, query and body of each request to the API."""

    def asked_for(self, method: str, path: str) -> list[tuple[dict[str, str], bytes]]:
        """Query and body of each such request."""
        return [(query, body) for way, where, query, body in self.asked if (way, where) == (method, path)]


def problem(status: int, title: str, detail: str, **headers: str) -> Response:
    """A problem as the endpoint words it."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": "r-1"}
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def motor(z: float, y: float, x: float, score: float, **more: float) -> dict[str, Any]:
    """A motor as the endpoint words it."""
    lengths = {"z_angstrom": None, "y_angstrom": None, "x_angstrom": None}
    return {"z": z, "y": y, "x": x, "height": 6.0, "width": 6.0, "score": score, "n_slices": 3, **lengths, **more}


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve until the block ends."""
    server = uvicorn.Server(uvicorn.Config(_app(stand_in), port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    stand_in.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield stand_in
    finally:
        server.should_exit = True
        thread.join(30)


def _app(stand_in: StandIn) -> FastAPI:
    app = FastAPI(docs_url=None)
    app.mount("/static", StaticFiles(directory=WEB))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1/"):
            query, body = dict(request.query_params), await request.body()
            stand_in.asked.append((request.method, request.url.path, query, body))
            if stand_in.key and request.headers.get("authorization") != f"Bearer {stand_in.key}":
                return problem(401, "Unauthorized", "A key is needed")
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/")
    def page() -> Response:
        return FileResponse(WEB / "index.html")

    @app.get("/docs")
    def docs() -> Response:
        return Response("the API")

    @app.get("/v1/model")
    def model(model: str = "default") -> dict[str, Any]:
        return {**stand_in.model, "name": model}

    @app.post("/v1/slices")
    def slices() -> Any:
        _, height, width = stand_in.size
        answer = {"model": "0123456789ab", "height": height, "width": width, "presence": 0.93, "note": stand_in.note}
        looked = _problem_of(stand_in) or {**answer, "detections": stand_in.detections, "seconds": {"total": 0.1}}
        if stand_in.gate is not None:
            stand_in.gate.wait(30)
        return looked

    @app.post("/v1/tomograms", status_code=202)
    def tomograms() -> Any:
        return _problem_of(stand_in) or _tomogram(stand_in, status="queued")

    @app.get(TOMOGRAM)
    def tomogram() -> Any:
        if stand_in.steps:
            step = stand_in.steps.pop(0)
            return step.get("response") or _tomogram(stand_in, **step)
        return _tomogram(stand_in, status="done", motors=stand_in.motors, failures=stand_in.failures)

    @app.delete(TOMOGRAM, status_code=204)
    def forget() -> None:
        pass

    @app.get(TOMOGRAM + "/motors.{kind}")
    def motors(kind: str, threshold: float) -> Response:
        return Response(f"{kind} from {threshold}\n")

    return app


def _problem_of(stand_in: StandIn) -> Response | None:
    answer, stand_in.problem = stand_in.problem, None
    return answer


def _tomogram(stand_in: StandIn, **answer: Any) -> dict[str, Any]:
    z, y, x = stand_in.size
    sizes = {"size_z": z, "size_y": y, "size_x": x, "voxel_spacing_angstrom": None}
    start: dict[str, Any] = {"slices_done": 0, "slices_planned": 0, "problem": None, "motors": [], "failures": []}
    return {"id": TOMOGRAM_ID, "name": "upload.mrc", "model": "0123456789ab", **sizes, **start, **answer}
