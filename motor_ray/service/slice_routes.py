"""Routes for the model, and for single images."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from motor_ray import __version__
from motor_ray.config import Augmentation
from motor_ray.errors import BusyError, MotorRayError
from motor_ray.service.backend import Ask
from motor_ray.service.bodies import IMAGE_BODY, IMAGES_BODY
from motor_ray.service.desk import TROUBLE, Desk, ModelName, Spacing, Threshold, authorised, trouble
from motor_ray.service.forms import images_of
from motor_ray.service.intake import body_bytes, read_body
from motor_ray.service.keys import Keys
from motor_ray.service.problems import ProblemError, describe, problem_of
from motor_ray.service.replies import Model, Slice, Slices
from motor_ray.service.settings import DEFAULT_MODEL
from motor_ray.service.together import all_or_none

Tta = Annotated[
    Augmentation | None,
    Query(description="Test-time augmentation, if not the endpoint's own: GET /v1/model lists what may be asked for."),
]


def slices_router(desk: Desk, keys: Keys) -> APIRouter:
    """Routes for the model, and for single images."""
    router = APIRouter(prefix="/v1", tags=["slices"], dependencies=[authorised(keys)], responses=TROUBLE)
    lowest = min(settings.detect.score_threshold for settings in desk.trained.values())

    async def asked(voxel_spacing_angstrom: Spacing = None, model: ModelName = DEFAULT_MODEL, tta: Tta = None) -> Ask:
        return desk.ask(model, voxel_spacing_angstrom, tta)

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
                "box_angstrom": settings.targets.box_angstrom,
                "members": card.members,
                "re_scored": card.rescorer_sha256 is not None,
                "tta": settings.detect.tta,
                "tta_allowed": desk.augmentations(),
                "metrics": card.metrics,
                "limits": {
                    "image_bytes": desk.limits.image_bytes,
                    "image_pixels": desk.limits.image_pixels,
                    "batch_images": desk.limits.images_per_request,
                    "batch_bytes": desk.limits.request_bytes,
                    "tomogram_bytes": desk.limits.tomogram_bytes,
                    "uploads": desk.jobs is not None,
                },
            }
        )

    @router.post("/slices", openapi_extra=IMAGE_BODY)
    async def slices(request: Request, ask: Annotated[Ask, Depends(asked)], threshold: Threshold = lowest) -> Slice:
        """Find motors on one image: the body is a JPEG, PNG or TIFF file of a slice, 8 or 16 bits, grey or colour."""
        size = body_bytes(request, desk.limits.image_bytes, "image")
        with desk.room.for_bytes(size):
            image = await read_body(request, size, desk.limits.timeout_seconds)
            return Slice.model_validate(await desk.look(image, "The image", ask, threshold))

    @router.post("/slices:batch", openapi_extra=IMAGES_BODY, responses=trouble({415: "The body is no form of files"}))
    async def batch(request: Request, ask: Annotated[Ask, Depends(asked)], threshold: Threshold = lowest) -> Slices:
        """Find motors on several images, each a file of the form's field ``images``."""
        started = time.perf_counter()
        card, limits = desk.card(ask.model), desk.limits
        size = body_bytes(request, limits.request_bytes, "form")
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
