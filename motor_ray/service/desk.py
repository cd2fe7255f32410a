"""What the routes of all resources share: the models, the limits, who may ask, and what can be answered."""

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Query, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from motor_ray.archive.pictures import check_pixels, picture_size
from motor_ray.config import PASSES, Augmentation, RunSettings
from motor_ray.config_values import settings_from
from motor_ray.service.backend import Ask, Backend, Meter, ModelCard, Picture
from motor_ray.service.intake import SPACINGS, UPLOAD_BYTES, Room
from motor_ray.service.jobs import Jobs, Record
from motor_ray.service.keys import Keys
from motor_ray.service.problems import ProblemError
from motor_ray.service.replies import Trouble
from motor_ray.service.settings import ServiceSettings


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
