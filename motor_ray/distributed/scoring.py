"""Frames of a slab to detections: the second operator of the pipeline, as a plain class that does not know Ray.

PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.config import RunSettings
from motor_ray.distributed.frames import pixels_of
from motor_ray.machine import cores
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.tables import SLABS

if TYPE_CHECKING:
    from motor_ray.detector.description import Models
    from motor_ray.detector.looks import Look

Looking = Callable[[NDArray[np.uint8]], "list[Look]"]
"""What Looker does, and stand-ins for it: ``(n, contrasts * channels, size, size)`` images to a look at each."""

Report = Callable[[str, int, float], None]
"""Is told the tomogram of a slab, its slices, and for how many seconds the device looked at them."""


class ScoreFrames:
    """Looks for motors on frames.

    Several threads may call it at once: while the device works for one, the others unpack their frames and write
    down what was found.

    INPUT   FRAMES table
    OUTPUT  SLABS table, as many rows
    """

    def __init__(
        self,
        settings: RunSettings,
        model: "Models",
        *,
        per_node: int = 1,
        compiled: Literal["on", "off", "if possible"] = "off",
        report: Report | None = None,
    ) -> None:
        # Not at the top: who starts a run names this class, and would wait 3 s for torch, which only actors need.
        from motor_ray.detector.looks import Looker

        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which need not be its share of the node's cores.
        threads = max(cores() // per_node, 1)
        self._begin(settings, Looker(model, settings.detect, threads=threads, compiled=compiled), report)

    def _begin(self, settings: RunSettings, look: Looking, report: Report | None) -> None:
        self.settings, self.look, self.report = settings, look, report
        self._device = ThreadPoolExecutor(1)  # one thread, always the same: torch keeps much of its state by thread

    def __call__(self, frames: pa.Table) -> pa.Table:
        """SLABS rows of FRAMES rows."""
        rows = frames.drop_columns(["frames"]).to_pylist()
        slabs = [self.score(row, pixels) for row, pixels in zip(rows, pixels_of(frames), strict=True)]
        return pa.Table.from_pylist(slabs, schema=SLABS)

    def score(self, row: Mapping[str, Any], pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """The SLABS row of a FRAMES row with these `pixels`."""
        slice_shape = (row["size_y"], row["size_x"])
        good = [entry["z"] for entry in row["loaded"] if entry["status"] == "ok"]
        found: dict[int, dict[str, Any]] = {}
        seconds = 0.0
        if good:
            placement = frames_of(slice_shape, row["voxel_spacing_angstrom"], self.settings.frame)
            images = images_of(row, pixels, len(placement), self.settings)
            looks, seconds = self._device.submit(self._look, images).result()
            found = dict(zip(good, found_on(row, looks, placement, self.settings), strict=True))
        nothing: dict[str, Any] = {"presence": None, "detections": []}
        slices = [entry | found.get(entry["z"], nothing) for entry in row["loaded"]]
        if self.report:
            self.report(row["tomo_id"], len(slices), seconds)
        return {"slab_id": row["slab_id"], "tomo_id": row["tomo_id"], "slices": slices}

    def _look(self, images: NDArray[np.uint8]) -> "tuple[list[Look], float]":
        """What the network says of each image, and for how many seconds it kept the device busy."""
        started = time.perf_counter()
        return self.look(images), time.perf_counter() - started


def images_of(
    row: Mapping[str, Any], pixels: NDArray[np.uint8], tiles: int, settings: RunSettings
) -> NDArray[np.uint8]:
    """The ``(slices * tiles, contrasts * channels, size, size)`` images of the good slices of a FRAMES row."""
    size, channels, contrasts = settings.frame.size, settings.model.in_slices, settings.detect.contrasts
    if channels == contrasts == 1:
        return pixels.reshape(-1, 1, size, size)
    frames = pixels.reshape(-1, contrasts, tiles, size, size)
    seen = frames[np.reshape(row["channels"], (-1, channels))]  # slices, channels, contrasts, tiles, y, x
    return seen.transpose(0, 3, 2, 1, 4, 5).reshape(-1, contrasts * channels, size, size)


def found_on(
    row: Mapping[str, Any], looks: "list[Look]", placement: list[Frame], settings: RunSettings
) -> list[dict[str, Any]]:
    """What was found on each good slice of a FRAMES row, in slice voxels."""
    tiles = len(placement)
    radius = settings.link.merge_distance_angstrom / 2 / (row["voxel_spacing_angstrom"] or 1.0)
    return [
        slice_of(looks[start : start + tiles], placement, radius, settings.detect.max_detections)
        for start in range(0, len(looks), tiles)
    ]


def slice_of(looks: "list[Look]", placement: list[Frame], radius: float, most: int) -> dict[str, Any]:
    """What was found on a slice, from a look at each of its frames; see `merge_frames`."""
    if not all(look.is_sound for look in looks):
        return {"status": "corrupt", "error": "the network's answer is not finite", "presence": None, "detections": []}
    boxes, scores, kept = merge_frames(looks, placement, radius)
    columns = np.column_stack([boxes, scores])[:most].tolist()
    names = ("y", "x", "height", "width", "score")
    detections = [dict(zip(names, values, strict=True)) for values in columns]
    features = [look.features for look in looks if look.features is not None]
    if features:
        packed = np.concatenate(features)[kept]
        detections = [one | {"features": own.tobytes()} for one, own in zip(detections, packed, strict=False)]
    return {"presence": max(look.presence for look in looks), "detections": detections}


def merge_frames(
    looks: "list[Look]", placement: list[Frame], radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """Boxes ``(n, 4)`` in slice voxels and scores ``(n,)`` of all frames of a slice, best first, each motor once.

    The third are their places among the boxes of all `looks`, one look after another.

    A box is dropped if a better one of another frame has its centre within `radius` voxels: where frames overlap,
    both show the same motor. Two boxes of one frame are two motors, as they are on a slice of one frame.
    """
    boxes = np.concatenate([frame.boxes_to_slice(look.boxes) for look, frame in zip(looks, placement, strict=True)])
    scores = np.concatenate([look.scores for look in looks])
    owner = np.repeat(np.arange(len(looks)), [len(look.scores) for look in looks])
    best_first = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    for one in best_first:
        rivals = [other for other in kept if owner[other] != owner[one]]
        if not rivals or np.linalg.norm(boxes[rivals, :2] - boxes[one, :2], axis=1).min() > radius:
            kept.append(one)
    return boxes[kept], scores[kept], kept
