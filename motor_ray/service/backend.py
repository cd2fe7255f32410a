"""What stands behind the endpoint, as the endpoint sees it."""

from typing import Any, NamedTuple, Protocol

from motor_ray.config import Augmentation

Picture = dict[str, Any]
"""What was found on an image: model, height, width, presence, detections, note and seconds."""


class Ask(NamedTuple):
    """What a request wants."""

    model: str
    voxel_spacing_angstrom: float | None
    tta: Augmentation | None = None
    """Test-time augmentation, if not the endpoint's own."""


class ModelCard(NamedTuple):
    """A model that requests may name: a checkpoint, or several that answer together."""

    uris: list[str]
    sha256: str
    settings: dict[str, Any]
    """Of the run that trained it, with the endpoint's own for how to read and detect."""

    metrics: dict[str, Any]
    members: list[dict[str, Any]]
    """The sha256 and the backbone of each checkpoint."""

    rescorer_sha256: str | None = None
    """Of the head that judges what it finds in tomograms, if it has learned one."""


class Backend(Protocol):
    """Detectors, wherever they run."""

    async def look(self, image: bytes, ask: Ask) -> Picture:
        """What is found on an image file.

        Raises SliceCorruptError or TomogramError if it is the image's fault, BusyError if there is no room, OutageError
        if no detector could answer.
        """

    async def wake(self) -> None:
        """Say that there is a new tomogram in the queue; it would be found before long anyway."""

    def is_ready(self) -> bool:
        """Whether an image that came now would be looked at."""


class Meter(Protocol):
    """Counts what happens, for those who watch."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""

    def detections(self, number: int) -> None:
        """So many motors were found on an image."""


class NoMeter:
    """Counts nothing."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """Nothing."""

    def detections(self, number: int) -> None:
        """Nothing."""
