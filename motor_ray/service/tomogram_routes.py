"""Routes for whole tomograms: handed in, asked for later, taken away."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from motor_ray.errors import BusyError, StorageError
from motor_ray.service.bodies import TOMOGRAM_BODY
from motor_ray.service.desk import TROUBLE, Desk, ModelName, Spacing, Threshold, authorised, trouble
from motor_ray.service.intake import UPLOAD_BYTES, body_bytes, counted, in_time, read_body, receive_volume
from motor_ray.service.jobs import Jobs, Record, check_allowed, new_id, new_record
from motor_ray.service.keys import Keys
from motor_ray.service.problems import ProblemError
from motor_ray.service.replies import NamedTomogram, Tomogram
from motor_ray.service.results import downloaded, shown
from motor_ray.service.settings import DEFAULT_MODEL

JSON_BYTES = 65536
"""The largest JSON body: it names one tomogram."""

TomogramName = Annotated[
    str, Query(min_length=1, max_length=200, description="What to call the tomogram; its motors are listed under it.")
]
TomogramId = Annotated[str, Path(max_length=100, description="The id that POST /v1/tomograms gave.")]


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
