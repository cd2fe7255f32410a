"""Every setting of the endpoint, as one tree of frozen models; `motor_ray.config` has those of a run."""

from ipaddress import ip_address
from typing import Literal

from pydantic import Field, model_validator

from motor_ray.config import ArchiveSettings, Augmentation, DetectSettings, LinkSettings, Settings

DEFAULT_MODEL = "default"
"""Name of the model that answers when a request names none."""

SEPARATOR = ","
"""Stands between checkpoints that answer together under one name."""

KEYS_VARIABLE = "MOTOR_RAY_API_KEYS"
"""Environment variable that may hold what `keys_file` holds."""


FORM_BYTES = 65536
"""What the parts of a form take besides their images."""


class ServeSettings(Settings):
    """The endpoint: who may ask what, and how much of it runs."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which needs keys."""

    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""

    models: dict[str, str] = Field(default={})
    """Checkpoint folders by the names that requests give them; several, separated by commas, answer together. The one
    called 'default' answers the others."""

    ingresses: int = Field(1, ge=1)
    """Processes that take requests, check them, and hand them on."""

    min_detectors: int = Field(1, ge=0)
    """Processes that hold the model, at least; with 0 the first request after a pause waits until one has started."""

    max_detectors: int = Field(1, ge=1)
    """Processes that hold the model, at most."""

    detector_cpus: int | None = Field(None, ge=1)
    """CPUs of a detector. When not given: 4 beside a GPU; without GPUs all cores of a machine."""

    detector_gpus: float | None = Field(None, ge=0)
    """GPUs of a detector, or a share of one. When not given: 1 if the cluster has any, else 0."""

    batch_images: int = Field(8, ge=1)
    """Images that wait together pass through the network together, up to so many."""

    batch_wait_seconds: float = Field(0.0, ge=0)
    """How long an image waits for others to come; those that came while the device was busy go together anyway."""

    most_tta: Augmentation = "full"
    """The most test-time augmentation that a request may ask for; with 'full' its images take eight times as long."""

    queue: int = Field(64, ge=1)
    """Images that may wait for each ingress's detectors; with more the answer is 429."""

    upscale_seconds: float = Field(5.0, ge=0)
    """Load that lasts so long starts another detector."""

    downscale_seconds: float = Field(120.0, ge=0)
    """A detector that was not needed for so long is stopped, the last one only if `min_detectors` is 0."""

    timeout_seconds: float = Field(60.0, gt=0)
    """An image that has no answer after so long gets 504; a body of which nothing more came for so long, 408."""

    replace: Literal["after", "before"] = "after"
    """With another model or other settings a detector is stopped after its successor has started, which takes room for
    one more, or before that."""

    drain_seconds: float = Field(20.0, ge=0)
    """What requests at work get to finish before their process is stopped."""

    image_bytes: int = Field(64 * 2**20, ge=1)
    """The largest image file."""

    image_pixels: int = Field(2**26, ge=1)
    """The most pixels of an image, refused before anything is decoded."""

    images_per_request: int = Field(32, ge=1)
    """Images that one request may bring."""

    tomogram_bytes: int = Field(8 * 2**30, ge=1)
    """The largest tomogram that may be uploaded."""

    bytes_in_flight: int = Field(2**29, ge=2**20)
    """Bytes of images that an ingress holds at a time, and as many again of uploads; with more the answer is 429."""

    storage: str | None = None
    """Folder or s3:// prefix for uploaded tomograms and what was found in them; it must be the same for all nodes. One
    in the folder for temporary files when not given."""

    keep_hours: float = Field(24.0, gt=0)
    """A tomogram is forgotten so long after it was finished."""

    tomograms_at_once: int = Field(2, ge=1)
    """Tomograms that are looked at side by side; others wait."""

    tomograms_waiting: int = Field(100, ge=1)
    """Tomograms that may wait; with more the answer is 429."""

    allow: tuple[str, ...] = ()
    """s3:// prefixes of tomograms that requests may name; none when not given."""

    keys_file: str | None = None
    """File of those who may ask: lines of a name and the sha256 of their key. MOTOR_RAY_API_KEYS may hold them, too."""

    insecure: bool = False
    """Listen beyond this machine although there are no keys."""

    cors_origins: tuple[str, ...] = ()
    """Origins of other sites whose pages may ask, such as https://lab.example.org."""

    ssl_certfile: str | None = None
    """PEM file of the certificate for https."""

    ssl_keyfile: str | None = None
    """PEM file of its private key."""

    @property
    def request_bytes(self) -> int:
        """The largest form with several images that is taken."""
        return min(self.images_per_request * self.image_bytes + FORM_BYTES, self.bytes_in_flight)

    @model_validator(mode="after")
    def _limits_agree(self) -> "ServeSettings":
        if self.max_detectors < max(self.min_detectors, 1):
            raise ValueError(f"max_detectors {self.max_detectors} is below min_detectors {self.min_detectors}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("https takes both ssl_certfile and ssl_keyfile, got one of them")
        if self.queue < self.images_per_request:
            raise ValueError(
                f"queue {self.queue} is below images_per_request {self.images_per_request}: such a request never fits"
            )
        if self.image_bytes > self.bytes_in_flight:
            raise ValueError(
                f"image_bytes {self.image_bytes} is above bytes_in_flight {self.bytes_in_flight}, so no such image fits"
            )
        wrong = [prefix for prefix in self.allow if not prefix.startswith("s3://") or len(prefix) < len("s3://b")]
        if wrong:
            raise ValueError(f"allow takes prefixes such as s3://bucket/tomograms/, got {', '.join(wrong)}")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


class ServiceSettings(Settings):
    """Every setting of the endpoint."""

    archive: ArchiveSettings = ArchiveSettings()
    detect: DetectSettings = DetectSettings()
    link: LinkSettings = LinkSettings()
    serve: ServeSettings = ServeSettings()


def checkpoints_of(model: str) -> list[str]:
    """The checkpoint folders of one of `ServeSettings.models`."""
    return model.split(SEPARATOR)
