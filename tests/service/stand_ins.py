"""What stands in for detectors, and the files that are sent to the endpoint."""

import asyncio
import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motor_ray.archive.pictures import decode_picture
from motor_ray.config_values import settings_from
from motor_ray.service.app import create_app
from motor_ray.service.backend import Ask, ModelCard, Picture
from motor_ray.service.jobs import Jobs
from motor_ray.service.keys import Keys
from motor_ray.service.settings import ServeSettings, ServiceSettings

RNG = np.random.default_rng(0)
GREY: NDArray[np.uint8] = RNG.integers(0, 256, (60, 48), dtype=np.uint8)
NOTHING = Keys({})
SHA = "0123456789abcdef" * 4
SCORES = (0.9, 0.5, 0.2)


class FakeBackend:
    """Finds the same on every image, after decoding it as a detector does."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Ask]] = []
        self.woken = 0
        self.ready = True
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        """Answers wait for it."""

        self.given_up = 0
        """Questions whose answer nobody waits for any more."""

    async def look(self, image: bytes, ask: Ask) -> Picture:
        self.asked.append((image, ask))
        if self.gate:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.given_up += 1
                raise
        if self.error:
            raise self.error
        height, width = decode_picture(image, "The image", 2**26).shape
        return {
            "model": SHA[:12],
            "height": height,
            "width": width,
            "presence": 0.75,
            "detections": [{"y": 1.5, "x": 2.5, "height": 9.0, "width": 8.0, "score": score} for score in SCORES],
            "note": None,
            "seconds": {"prepare": 0.01, "queue": 0.0, "model": 0.02},
        }

    async def wake(self) -> None:
        self.woken += 1

    def is_ready(self) -> bool:
        return self.ready


class Figures:
    """A Meter that remembers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.found = 0

    def request(self, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, status))

    def detections(self, number: int) -> None:
        self.found += number


def card(settings: Mapping[str, Any] | None = None) -> ModelCard:
    """A model whose run had these settings."""
    member = {"model": "nowhere", "sha256": SHA, "backbone": "resnet101"}
    return ModelCard(["nowhere"], SHA, settings_from(settings or {}).model_dump(mode="json"), {"ap": 0.5}, [member])


def app_of(
    backend: Any,
    storage: str | None = None,
    *,
    keys: Keys = NOTHING,
    meter: Any = None,
    cards: Mapping[str, ModelCard] | None = None,
    jobs: Jobs | None = None,
    tells_id: bool = True,
    **limits: Any,
) -> Any:
    """The application in front of `backend`; `limits` are ServeSettings."""
    settings = ServiceSettings(serve=ServeSettings(storage=storage, **limits))
    if storage and jobs is None:
        jobs = Jobs(storage, settings.archive)
    return create_app(backend, cards or {"default": card()}, settings, keys, jobs, meter, tells_id=tells_id)


def saved(pixels: NDArray[Any] | Image.Image, kind: str, **options: Any) -> bytes:
    """An image file that Pillow writes."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


JPEG = saved(GREY, "JPEG")
PNG = saved(GREY, "PNG")
TIFF = saved(GREY, "TIFF")


def png_claiming(height: int, width: int) -> bytes:
    """A PNG of 100 bytes that says it is of this size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def jpeg_claiming(height: int, width: int) -> bytes:
    """A JPEG that says it is of this size, whatever is in it."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def tiff_claiming(height: int, width: int) -> bytes:
    """A TIFF with nothing but a header, of this size."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, height)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, 100)])
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags) + 1) + entries + bytes(104)


def mrc(volume: NDArray[Any], spacing: float = 13.0, *, mode: int | None = None) -> bytes:
    """An MRC file; `spacing` 0 stands for unknown."""
    z, y, x = volume.shape
    if mode is None:
        mode = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}[volume.dtype.name]
    cell = (x * spacing, y * spacing, z * spacing)
    words = struct.pack("<10i6f3i3f2i", x, y, z, mode, 0, 0, 0, x, y, z, *cell, 90, 90, 90, 1, 2, 3, 0, 0, 0, 0, 0)
    header = bytearray(1024)
    header[: len(words)] = words
    header[208:216] = b"MAP DD\x00\x00"
    return bytes(header) + volume.tobytes()
