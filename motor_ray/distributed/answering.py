"""A model that answers single requests: an image file, or a slab of a tomogram, in; what was found on it, out.

Plain classes that know neither Ray nor the web. The way of a slice is that of bulk detection: the same frames, the
same network, the same boxes.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from motor_ray.archive.pictures import decode_picture
from motor_ray.config import Augmentation, RunSettings
from motor_ray.detector.description import Models
from motor_ray.detector.looks import Look, Looker
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.scoring import found_on, images_of
from motor_ray.errors import SliceCorruptError
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.slices.preprocess import contrasts_of, make_frames
from motor_ray.slices.repair import repair_asked, repaired


class Prepared(NamedTuple):
    """Slices that are ready for the network."""

    row: Mapping[str, Any]
    """Their FRAMES row, without pixels."""

    images: NDArray[np.uint8]
    """``(n, contrasts * channels, size, size)``; several a slice where it takes several frames to cover it."""

    placement: list[Frame]
    tta: Augmentation

    started: float
    """Seconds of the clock when preparing began, and"""

    ready: float
    """when it was done."""


class Answer(NamedTuple):
    """What was found on the slices of a Prepared."""

    slices: list[dict[str, Any]]
    """Like the entries of SLABS' ``slices``."""

    seconds: dict[str, float]
    """Of preparing, of waiting for the device, and of the network."""


class Answerer:
    """Owns a model, or several that answer together.

    Any thread may prepare; `look` is for one thread, always the same.
    """

    def __init__(self, model: Models, sha256: str, settings: RunSettings, *, threads: int) -> None:
        self.settings, self.sha256 = settings, sha256
        # A network is not compiled for requests: each number of images would take half a minute the first time.
        compiled: Literal["on", "off"] = "on" if settings.detect.compile == "on" else "off"
        self.looker = Looker(model, settings.detect, threads=threads, compiled=compiled)
        self.loader = LoadSlab(**loader_arguments(settings))

    def warm_up(self) -> None:
        """Look at one empty frame, so that the first request does not wait for what is done only once."""
        self.looker(self._no_images(1), self.settings.detect.tta)

    def prepare_picture(
        self, data: bytes, spacing: float | None, most_pixels: int, tta: Augmentation | None = None
    ) -> Prepared:
        """An image file as frames, for another test-time augmentation than the endpoint's own if given.

        Raises SliceCorruptError, or TomogramError for a spacing that cannot be.
        """
        started, settings = time.perf_counter(), with_tta(self.settings, tta)
        image = decode_picture(data, "The image", most_pixels)
        placement = frames_of((image.shape[0], image.shape[1]), spacing, self.settings.frame)
        fault = repair_asked([image], self.settings)
        mended, ways = repaired(image, fault), contrasts_of(settings.preprocess, settings.detect.contrasts)
        try:
            frames = np.concatenate([make_frames(mended, placement, way) for way in ways])
        except cv2.error as error:
            raise SliceCorruptError(f"The image cannot be made a frame ({error.err})") from None
        channels = self.settings.model.in_slices
        row = {
            "size_y": image.shape[0],
            "size_x": image.shape[1],
            "voxel_spacing_angstrom": spacing,
            "loaded": [{"z": 0, "status": "ok", "error": None, "note": fault.note}],
            "channels": [0] * channels,  # it stands for its neighbours, too, as at the end of a tomogram
        }
        images = images_of(row, frames, len(placement), settings)
        return Prepared(row, images, placement, settings.detect.tta, started, time.perf_counter())

    def prepare_slab(self, plan: Mapping[str, Any]) -> Prepared:
        """The slices of a PLAN row as frames; those that cannot be read have a status. Raises OutageError."""
        started = time.perf_counter()
        row = self.loader.load(plan)
        frames = row.pop("frames")
        tta = self.settings.detect.tta
        if not len(frames):
            return Prepared(row, self._no_images(0), [], tta, started, time.perf_counter())
        placement = frames_of((row["size_y"], row["size_x"]), row["voxel_spacing_angstrom"], self.settings.frame)
        images = images_of(row, frames, len(placement), self.settings)
        return Prepared(row, images, placement, tta, started, time.perf_counter())

    def look(self, together: Sequence[Prepared]) -> list[Answer]:
        """What the network says of each; those of one test-time augmentation pass through it together."""
        began = time.perf_counter()
        looks = {tta: self._looks(together, tta) for tta in {one.tta for one in together}}
        ended = time.perf_counter()
        answers = []
        for one in together:
            own = list(itertools.islice(looks[one.tta], len(one.images)))
            seconds = {"prepare": one.ready - one.started, "queue": began - one.ready, "model": ended - began}
            answers.append(Answer(self._slices(one, own), {name: round(value, 6) for name, value in seconds.items()}))
        return answers

    def _looks(self, together: Sequence[Prepared], tta: Augmentation) -> Iterator[Look]:
        return iter(self.looker(np.concatenate([one.images for one in together if one.tta == tta]), tta))

    def _no_images(self, count: int) -> NDArray[np.uint8]:
        size, channels = self.settings.frame.size, self.settings.detect.contrasts * self.settings.model.in_slices
        return np.zeros((count, channels, size, size), np.uint8)

    def _slices(self, one: Prepared, looks: list[Look]) -> list[dict[str, Any]]:
        found = iter(found_on(one.row, looks, one.placement, self.settings)) if looks else iter(())
        nothing: dict[str, Any] = {"presence": None, "detections": []}
        return [entry | (next(found) if entry["status"] == "ok" else nothing) for entry in one.row["loaded"]]


def with_tta(settings: RunSettings, tta: Augmentation | None) -> RunSettings:
    """`settings` with another test-time augmentation, if one is given."""
    if tta is None:
        return settings
    return settings.model_copy(update={"detect": settings.detect.model_copy(update={"tta": tta})})


def picture_of(one: Prepared, answer: Answer, sha256: str) -> dict[str, Any]:
    """What a request for an image gets to see. Raises SliceCorruptError if the network's answer is no number."""
    (entry,) = answer.slices
    if entry["status"] != "ok":
        raise SliceCorruptError(f"The image: {entry['error']}")
    # Features are for judging what is linked from many slices.
    boxes = [{name: value for name, value in box.items() if name != "features"} for box in entry["detections"]]
    return {
        "model": sha256[:12],
        "height": one.row["size_y"],
        "width": one.row["size_x"],
        "presence": entry["presence"],
        "detections": boxes,
        "note": entry["note"],
        "seconds": answer.seconds,
    }
