"""The endpoint as a web application: what may be asked, and how. What stands behind it is a Backend.

Knows neither Ray nor torch.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from motor_ray import __version__
from motor_ray.archive.pictures import check_pixels, picture_size
from motor_ray.config import PASSES, Augmentation, RunSettings, settings_from
from motor_ray.errors import BusyError, MotorRayError, StorageError
from motor_ray.service.backend import Ask, Backend, Meter, ModelCard, NoMeter, Picture
from motor_ray.service.bodies import IMAGE_BODY, IMAGES_BODY, TOMOGRAM_BODY
from motor_ray.service.forms import images_of
from motor_ray.service.intake import (
    SPACINGS,
    UPLOAD_BYTES,
    Room,
    body_bytes,
    counted,
    in_time,
    read_body,
    receive_volume,
)
from motor_ray.service.jobs import Jobs, Record, check_allowed, new_id, new_record
from motor_ray.service.keys import Keys
from motor_ray.service.pages import add_pages
from motor_ray.service.problems import ProblemError, describe, problem_of
from motor_ray.service.replies import Health, Model, NamedTomogram, Slice, Slices, Tomogram, Trouble
from motor_ray.service.results import downloaded, shown
from motor_ray.service.settings import DEFAULT_MODEL, ServiceSettings
from motor_ray.service.together import all_or_none
from motor_ray.service.watching import Watch, add_problem_handlers

JSON_BYTES = 65536
"""The largest JSON body: it names one tomogram."""

PARTS_BYTES = 65536
"""What the parts of a form take besides their images."""


def trouble(reasons: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """Statuses of problems, and what they mean, as the API's description has them."""
    content = {"application/problem+json": {"schema": Trouble.model_json_schema()}}
    return {status: {"description": why, "content": content} for status, why in reasons.items()}


TROUBLE = trouble(
    {
        400: "The body is not what it says it is",
        401: "The key is missing or wrong",
        404: "There is no model, or no tomogram, of that name",
        408: "The body takes too long to come",
        411: "There is no Content-Length",
        413: "The body is too large",
        422: "The body or a parameter cannot be used",
        429: "There is no room now; Retry-After says when to try again",
        503: "No detector or no storage answers; Retry-After says when to try again",
        504: "There was no answer in time",
    }
)

Threshold = Annotated[float, Query(ge=0, le=1, description="Only detections with this score or more.")]
Spacing = Annotated[
    float | None,
    Query(
        ge=SPACINGS[0],
        le=SPACINGS[1],
        allow_inf_nan=False,
        description="Edge of a voxel in angstrom, if the file does not say it.",
    ),
]
ModelName = Annotated[str, Query(max_length=100, description="One of the models that GET /v1/model lists.")]
Tta = Annotated[
    Augmentation | None,
    Query(description="Test-time augmentation, if not the endpoint's own: GET /v1/model lists what may be asked for."),
]
TomogramName = Annotated[
    str, Query(min_length=1, max_length=200, description="What to call the tomogram; its motors are listed under it.")
]
TomogramId = Annotated[str, Path(max_length=100, description="The id that POST /v1/tomograms gave.")]


def create_app(
    backend: Backend,
    cards: Mapping[str, ModelCard],
    settings: ServiceSettings,
    keys: Keys,
    jobs: Jobs | None,
    meter: Meter | None = None,
    *,
    tells_id: bool = True,
) -> FastAPI:
    """The application. `cards` are the models by name; without `jobs` no tomograms can be handed in.

    Whoever runs it may put the request's id into answers itself; then `tells_id` is false.
    """
    app = FastAPI(
        title="motor_ray",
        version=__version__,
        summary="Finds bacterial flagellar motors in cryo-electron tomograms",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    desk = Desk(backend, cards, settings, jobs, meter or NoMeter())
    add_problem_handlers(app)
    add_pages(app)
    add_health(app, backend)
    app.include_router(slices_router(desk, keys))
    app.include_router(tomograms_router(desk, keys))
    if settings.serve.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.serve.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["X-Request-ID", "Retry-After", "Location"],
        )
    app.add_middleware(Watch, meter=desk.meter, tells_id=tells_id)
    return app


class Desk:
    """What all routes share: the models, the limits, and what stands behind them."""

    def __init__(
        self,
        backend: Backend,
        cards: Mapping[str, ModelCard],
        settings: ServiceSettings,
        jobs: Jobs | None,
        meter: Meter,
    ) -> None:
        self.backend, self.cards, self.jobs, self.meter = backend, cards, jobs, meter
        self.archive, self.limits = settings.archive, settings.serve
        self.trained = {name: settings_from(card.settings) for name, card in cards.items()}
        self.room = Room(settings.serve.bytes_in_flight)
        # Of their own: an upload may take an hour, and images come meanwhile.
        self.uploads = Room(max(settings.serve.bytes_in_flight, UPLOAD_BYTES))

    def card(self, model: str) -> ModelCard:
        """What is known of a model. Raises ProblemError if there is none of that name."""
        if model not in self.cards:
            raise ProblemError(404, f"There is no model {model!r}; known are {', '.join(self.cards)}")
        return self.cards[model]

    def settings(self, model: str) -> RunSettings:
        """How a model was trained and looks. Raises ProblemError if there is none of that name."""
        self.card(model)
        return self.trained[model]

    def augmentations(self) -> list[Augmentation]:
        """The test-time augmentations that requests may ask for."""
        return [tta for tta, passes in PASSES.items() if passes <= PASSES[self.limits.most_tta]]

    def ask(self, model: str, spacing: float | None, tta: Augmentation | None) -> Ask:
        """What a request wants. Raises ProblemError if there is no such model, or if it wants what is not allowed."""
        self.card(model)
        if tta and tta not in self.augmentations():
            allowed = ", ".join(self.augmentations())
            raise ProblemError(422, f"tta is {tta}, which takes this endpoint too long; it allows {allowed}")
        return Ask(model, spacing, tta)

    async def look(self, image: bytes, name: str, ask: Ask, threshold: float) -> Picture:
        """What is found on an image file. Raises ProblemError or MotorRayError, which say why it cannot be."""
        started = time.perf_counter()
        check_pixels(picture_size(image, name), name, self.limits.image_pixels)
        try:
            async with asyncio.timeout(self.limits.timeout_seconds):
                picture = await self.backend.look(image, ask)
        except TimeoutError:
            raise ProblemError(
                504, f"There was no answer within {self.limits.timeout_seconds:g} s; try again later"
            ) from None
        picture["detections"] = [one for one in picture["detections"] if one["score"] >= threshold]
        picture["seconds"]["total"] = round(time.perf_counter() - started, 6)
        self.meter.detections(len(picture["detections"]))
        return picture

    def need_jobs(self) -> Jobs:
        """Where tomograms are kept. Raises ProblemError if they are not."""
        if self.jobs is None:
            raise ProblemError(503, "This endpoint takes no tomograms: it has no storage for them")
        return self.jobs

    async def record(self, job_id: str) -> Record:
        """What is known of a tomogram. Raises ProblemError if there is none of that id."""
        record = await asyncio.to_thread(self.need_jobs().read, job_id)
        if record is None:
            raise ProblemError(404, "There is no tomogram of that id; it may have been too long ago")
        return record


def authorised(keys: Keys) -> Any:
    """A dependency that lets only the owners of `keys` pass, or everybody if there are none."""

    async def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        key = bearer.credentials if bearer else header
        if keys and (key is None or keys.owner(key) is None):
            what = "That key is not known here" if key else "A key is needed, as Authorization: Bearer KEY"
            raise ProblemError(401, what, headers={"WWW-Authenticate": "Bearer"})

    return Depends(check)


def add_health(app: FastAPI, backend: Backend) -> None:
    """Routes for load balancers."""

    @app.get("/healthz", tags=["health"])
    async def healthz() -> Health:
        """Whether the endpoint is there."""
        return Health(status="ok")

    @app.get("/readyz", tags=["health"], responses={503: TROUBLE[503]})
    async def readyz() -> Health:
        """Whether an image would be looked at."""
        if not backend.is_ready():
            raise ProblemError(503, "The detector is starting")
        return Health(status="ready")


def slices_router(desk: Desk, keys: Keys) -> APIRouter:
    """Routes for the model, and for single images."""
    router = APIRouter(prefix="/v1", tags=["slices"], dependencies=[authorised(keys)], responses=TROUBLE)
    lowest = min(settings.detect.score_threshold for settings in desk.trained.values())

    @router.get("/model")
    async def model(model: ModelName = DEFAULT_MODEL) -> Model:
        """What is known of a model, and what may be sent."""
        card, settings = desk.card(model), desk.settings(model)
        return Model.model_validate(
            {
                "name": model,
                "models": list(desk.cards),
                "sha256": card.sha256,
                "motor_ray": __version__,
                "frame_pixels": settings.frame.size,
                "frame_mode": settings.frame.mode,
                "in_slices": settings.model.in_slices,
                "score_threshold": settings.detect.score_threshold,
                "presence_threshold": settings.evaluate.threshold_or_usual,
                "box_pixels": settings.targets.box_pixels,
                "members": card.members,
                "tta": settings.detect.tta,
                "tta_allowed": desk.augmentations(),
                "metrics": card.metrics,
                "limits": {
                    "image_bytes": desk.limits.image_bytes,
                    "image_pixels": desk.limits.image_pixels,
                    "batch_images": desk.limits.images_per_request,
                    "tomogram_bytes": desk.limits.tomogram_bytes,
                    "uploads": desk.jobs is not None,
                },
            }
        )

    @router.post("/slices", openapi_extra=IMAGE_BODY)
    async def slices(
        request: Request,
        threshold: Threshold = lowest,
        voxel_spacing_angstrom: Spacing = None,
        model: ModelName = DEFAULT_MODEL,
        tta: Tta = None,
    ) -> Slice:
        """Find motors on one image: the body is a JPEG, PNG or TIFF file of a slice, 8 or 16 bits, grey or colour."""
        ask = desk.ask(model, voxel_spacing_angstrom, tta)
        size = body_bytes(request, desk.limits.image_bytes, "image")
        with desk.room.for_bytes(size):
            image = await read_body(request, size, desk.limits.timeout_seconds)
            return Slice.model_validate(await desk.look(image, "The image", ask, threshold))

    @router.post("/slices:batch", openapi_extra=IMAGES_BODY, responses=trouble({415: "The body is no form of files"}))
    async def batch(
        request: Request,
        threshold: Threshold = lowest,
        voxel_spacing_angstrom: Spacing = None,
        model: ModelName = DEFAULT_MODEL,
        tta: Tta = None,
    ) -> Slices:
        """Find motors on several images, each a file of the form's field ``images``."""
        started = time.perf_counter()
        card = desk.card(model)
        ask = desk.ask(model, voxel_spacing_angstrom, tta)
        limits = desk.limits
        most = min(limits.images_per_request * limits.image_bytes + PARTS_BYTES, limits.bytes_in_flight)
        size = body_bytes(request, most, "form")
        with desk.room.for_bytes(size):
            images = await images_of(
                request, size, limits.images_per_request, limits.image_bytes, limits.timeout_seconds
            )
            looked = await all_or_none(look_safely(desk, name, image, ask, threshold) for name, image in images)
        seconds = {"total": round(time.perf_counter() - started, 6)}
        return Slices.model_validate({"model": card.sha256[:12], "slices": looked, "seconds": seconds})

    return router


async def look_safely(desk: Desk, name: str, image: bytes, ask: Ask, threshold: float) -> dict[str, Any]:
    """What is found on one of several images, or why nothing could be."""
    try:
        return {"name": name} | await desk.look(image, "The image", ask, threshold)
    except ProblemError as refused:
        return {"name": name, "problem": describe(refused.status, refused.detail)}
    except BusyError:
        raise  # all or nothing: a client that tries again sends all
    except MotorRayError as error:
        problem = problem_of(error)
        if problem.status >= 500:
            raise
        return {"name": name, "problem": describe(problem.status, problem.detail)}


def tomograms_router(desk: Desk, keys: Keys) -> APIRouter:
    """Routes for whole tomograms."""
    router = APIRouter(prefix="/v1", tags=["tomograms"], dependencies=[authorised(keys)], responses=TROUBLE)
    elsewhere = trouble({403: "The URI is not among the places that this endpoint reads"})
    missing = trouble({404: "There is no tomogram of that id"})
    unfit = trouble({409: "It is not done, or the format cannot hold its motors"})

    @router.post("/tomograms", status_code=202, openapi_extra=TOMOGRAM_BODY, responses=elsewhere)
    async def submit(
        request: Request,
        response: Response,
        voxel_spacing_angstrom: Spacing = None,
        model: ModelName = DEFAULT_MODEL,
        name: TomogramName | None = None,
    ) -> Tomogram:
        """Hand in a tomogram: the body is an MRC file, or JSON that names one in object storage.

        It is looked at as soon as there is room; GET /v1/tomograms/{id} says how far it is, and what was found.
        """
        desk.card(model)
        jobs = desk.need_jobs()
        if len(await asyncio.to_thread(jobs.waiting)) >= desk.limits.tomograms_waiting:
            raise BusyError(f"{desk.limits.tomograms_waiting} tomograms are waiting already; try again later")
        if request.headers.get("content-type", "").split(";")[0].strip() == "application/json":
            record = await named_tomogram(request, desk, name, model, voxel_spacing_angstrom)
        else:
            record = await uploaded_tomogram(request, desk, jobs, name or "upload.mrc", model, voxel_spacing_angstrom)
        await asyncio.to_thread(jobs.submit, record)
        await desk.backend.wake()
        response.headers["Location"] = f"/v1/tomograms/{record['id']}"
        return Tomogram.model_validate(shown(record))

    @router.get("/tomograms/{tomogram_id}", responses=missing)
    async def look_up(tomogram_id: TomogramId) -> Tomogram:
        """How far a tomogram is, and what was found in it."""
        return Tomogram.model_validate(shown(await desk.record(tomogram_id)))

    @router.get("/tomograms/{tomogram_id}/motors.{kind}", responses=missing | unfit, response_class=Response)
    async def download(
        tomogram_id: TomogramId,
        kind: Literal["csv", "star"],
        threshold: Threshold = 0.0,
        relion: Annotated[Literal["4", "5"], Query(description="RELION's version, for STAR.")] = "5",
    ) -> Response:
        """The motors of a tomogram as a table, or as coordinates for RELION."""
        record = await desk.record(tomogram_id)
        if record["status"] != "done":
            raise ProblemError(409, f"The tomogram is {record['status']}; there are motors once it is done")
        return downloaded(record, kind, threshold, int(relion))

    @router.delete("/tomograms/{tomogram_id}", status_code=204, responses=missing)
    async def forget(tomogram_id: TomogramId) -> None:
        """Forget a tomogram, and what was found in it; one that is being looked at is given up."""
        await desk.record(tomogram_id)
        await asyncio.to_thread(desk.need_jobs().forget, tomogram_id)

    return router


async def named_tomogram(request: Request, desk: Desk, name: str | None, model: str, spacing: float | None) -> Record:
    """A record for a tomogram in object storage. Raises ProblemError if it is not one that we may read."""
    size = body_bytes(request, JSON_BYTES, "JSON object")
    body = await read_body(request, size, desk.limits.timeout_seconds)
    try:
        asked = NamedTomogram.model_validate_json(body)
    except ValueError:
        raise ProblemError(422, 'The body is not a JSON object such as {"uri": "s3://bucket/tomogram.mrc"}') from None
    try:
        check_allowed(asked.uri, desk.limits.allow)
    except StorageError as error:
        raise ProblemError(403, str(error)) from None
    name = name or asked.uri.rstrip("/").rsplit("/", 1)[-1]
    return new_record(new_id(), name, model, uri=asked.uri, voxel_spacing_angstrom=spacing)


async def uploaded_tomogram(
    request: Request, desk: Desk, jobs: Jobs, name: str, model: str, spacing: float | None
) -> Record:
    """A record for a tomogram that came whole, and lies in the storage now. Raises ProblemError or TomogramError."""
    size = body_bytes(request, desk.limits.tomogram_bytes, "tomogram")
    job_id, seconds, pixels = new_id(), desk.limits.timeout_seconds, desk.limits.image_pixels
    with desk.uploads.for_bytes(min(size, UPLOAD_BYTES)):
        async with in_time(size, seconds):
            body = counted(request, size, seconds)
            header = await receive_volume(body, jobs.volume(job_id), size, desk.archive, spacing, pixels)
    z, y, x = header.shape
    sizes = {"size_z": z, "size_y": y, "size_x": x, "voxel_spacing_angstrom": header.voxel_spacing_angstrom}
    return new_record(job_id, name, model, **sizes)
