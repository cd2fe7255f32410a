"""What the endpoint answers, field by field: the API's description is made from it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Detection(Reply):
    """A motor on an image; pixels of the image, a pixel's index is its centre."""

    y: float
    x: float
    height: float
    width: float
    score: float = Field(ge=0, le=1)


class Seconds(Reply):
    """Where the time of a request went."""

    prepare: float
    """Decoding, and making frames of it."""

    queue: float
    """Waiting for the device."""

    model: float
    """The network, for all images that passed through it together."""

    total: float


class Looked(Reply):
    """What was found on an image."""

    height: int
    width: int

    presence: float
    """That the image shows a motor, from 0 to 1."""

    detections: list[Detection]
    """Best first."""

    note: str | None
    """What was mended before it was looked at."""

    seconds: Seconds


class Slice(Looked):
    """What was found on an image, and by whom."""

    model: str
    """First 12 digits of the sha256 of the model's weights."""


class Trouble(Reply):
    """Why something could not be done (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str | None = None


class NamedSlice(Looked):
    """What was found on one of several images."""

    name: str
    """Of its part of the request."""


class FailedSlice(Reply):
    """An image that could not be looked at."""

    name: str
    problem: Trouble


class Slices(Reply):
    """What was found on several images, in their order."""

    model: str
    slices: list[NamedSlice | FailedSlice]
    seconds: dict[str, float]


class Motor(Reply):
    """A motor in a tomogram: its place in voxels, an index is a voxel's centre, and in angstrom if that is known."""

    z: float
    y: float
    x: float
    height: float
    width: float
    score: float
    n_slices: int
    z_angstrom: float | None
    y_angstrom: float | None
    x_angstrom: float | None


class Failure(Reply):
    """A slice that could not be looked at."""

    z: int
    error: str


class Tomogram(Reply):
    """A tomogram that was handed in, and how far it is."""

    id: str
    status: str
    """queued, running, done or failed."""

    created: str
    updated: str
    name: str
    size_z: int | None
    size_y: int | None
    size_x: int | None
    voxel_spacing_angstrom: float | None
    slices_done: int
    slices_planned: int
    """Grows when something was seen that is worth a closer look."""

    problem: Trouble | None
    """Why it failed."""

    motors: list[Motor]
    """Best first; there are some only when it is done."""

    failures: list[Failure]
    model: str | None


class Limits(Reply):
    """What may be sent."""

    image_bytes: int
    image_pixels: int
    batch_images: int
    batch_bytes: int
    """Of the form with all of them."""

    tomogram_bytes: int
    uploads: bool
    """Whether tomograms can be handed in."""


class Member(Reply):
    """A checkpoint of a model."""

    sha256: str
    backbone: str


class Model(Reply):
    """A model, and what the endpoint does with it."""

    name: str
    models: list[str]
    """All that requests may name."""

    sha256: str
    motor_ray: str
    frame_pixels: int
    frame_mode: str
    in_slices: int
    score_threshold: float
    """Peaks below this are never reported."""

    presence_threshold: float
    """Score from which a motor of a tomogram counts, if one has to decide."""

    box_pixels: float
    """Edge of the boxes that the model was taught, in pixels of its frames, unless `box_angstrom` is given."""

    box_angstrom: float | None
    """Edge of these boxes in the specimen, if it was the same in all tomograms."""

    members: list[Member]
    """The checkpoints that answer together; mostly one."""

    re_scored: bool
    """Whether motors of tomograms have the scores of a second look that the model has learned."""

    tta: str
    """Test-time augmentation, if a request asks for none: off, fast or full."""

    tta_allowed: list[str]
    """What requests for slices may ask for."""

    metrics: dict[str, Any]
    """What training measured."""

    limits: Limits


class Health(Reply):
    """That the endpoint is there."""

    status: str


class NamedTomogram(BaseModel):
    """A request for a tomogram in object storage."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(max_length=2000)
