"""Frames of a slab to detections: the second operator of the pipeline, as a plain class that does not know Ray.

PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from motor_ray.config import RunSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.decode import decode
from motor_ray.detector.device import can_compile, cores, pick_device
from motor_ray.detector.inference import prepare
from motor_ray.distributed.frames import pixels_of
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.tables import SLABS


class Look(NamedTuple):
    """What the network says of one frame."""

    boxes: NDArray[np.float64]
    """``(n, 4)`` centre y, x, height and width in frame pixels, best first."""

    scores: NDArray[np.float64]
    """``(n,)`` in [0, 1]."""

    presence: float
    """That the frame shows a motor, in [0, 1]."""

    is_sound: bool
    """False if a number of the answer is not finite."""


class ScoreFrames:
    """Looks for motors on frames. It owns the model and the device; the heatmaps never leave it.

    INPUT   FRAMES table
    OUTPUT  SLABS table, as many rows
    """

    def __init__(
        self,
        settings: RunSettings,
        model: str,
        *,
        per_node: int = 1,
        compiled: Literal["on", "off", "if possible"] = "off",
        report: Callable[[str, int, float], None] | None = None,
    ) -> None:
        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which need not be its share of the node's cores.
        torch.set_num_threads(max(cores() // per_node, 1))
        self.settings, self.report = settings, report
        device = pick_device()
        self.predict = prepare(
            load_checkpoint(model).model,
            device,
            mixed_precision=settings.detect.mixed_precision,
            compiled=compiled == "on" or (compiled == "if possible" and can_compile(device)),
        )

    def __call__(self, frames: pa.Table) -> pa.Table:
        """SLABS rows of FRAMES rows."""
        rows = frames.drop_columns(["frames"]).to_pylist()
        slabs = [self.score(row, pixels) for row, pixels in zip(rows, pixels_of(frames), strict=True)]
        return pa.Table.from_pylist(slabs, schema=SLABS)

    def score(self, row: Mapping[str, Any], pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """The SLABS row of a FRAMES row with these `pixels`."""
        started = time.perf_counter()
        slice_shape = (row["size_y"], row["size_x"])
        good = [entry["z"] for entry in row["loaded"] if entry["status"] == "ok"]
        found: dict[int, dict[str, Any]] = {}
        if good:
            placement = frames_of(slice_shape, row["voxel_spacing_angstrom"], self.settings.frame)
            found = dict(zip(good, self._score_slices(row, pixels, placement), strict=True))
        nothing: dict[str, Any] = {"presence": None, "detections": []}
        slices = [entry | found.get(entry["z"], nothing) for entry in row["loaded"]]
        if self.report:
            self.report(row["tomo_id"], len(slices), time.perf_counter() - started)
        return {"slab_id": row["slab_id"], "tomo_id": row["tomo_id"], "slices": slices}

    def _score_slices(
        self, row: Mapping[str, Any], pixels: NDArray[np.uint8], placement: list[Frame]
    ) -> list[dict[str, Any]]:
        """What was found on each good slice of a FRAMES row, in slice voxels."""
        size, tiles = self.settings.frame.size, len(placement)
        frames = pixels.reshape(-1, tiles, size, size)
        channels = np.reshape(row["channels"], (-1, self.settings.model.in_slices))
        # (slices, channels, tiles, y, x) -> a batch of (slices * tiles) images
        images = frames[channels].swapaxes(1, 2).reshape(-1, channels.shape[1], size, size)
        looks = self._look(images)
        radius = self.settings.link.merge_distance_angstrom / 2 / (row["voxel_spacing_angstrom"] or 1.0)
        return [
            slice_of(looks[start : start + tiles], placement, radius, self.settings.detect.max_detections)
            for start in range(0, len(looks), tiles)
        ]

    def _look(self, images: NDArray[np.uint8]) -> list[Look]:
        """What the network says of each of ``(n, channels, size, size)`` images."""
        detect = self.settings.detect
        looks: list[Look] = []
        for start in range(0, len(images), detect.batch_frames):
            prediction = self.predict(torch.from_numpy(images[start : start + detect.batch_frames]))
            sound = prediction.heatmap.isfinite().all(dim=(1, 2, 3)) & prediction.presence.isfinite()
            found = decode(prediction, detect.max_detections, detect.score_threshold)
            numbers = zip(prediction.presence.sigmoid().tolist(), sound.tolist(), strict=True)
            for (boxes, scores), (presence, is_sound) in zip(found, numbers, strict=True):
                looks.append(Look(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), presence, is_sound))
        return looks


def slice_of(looks: list[Look], placement: list[Frame], radius: float, most: int) -> dict[str, Any]:
    """What was found on a slice, from a look at each of its frames; see `merge_frames`."""
    if not all(look.is_sound for look in looks):
        return {"status": "corrupt", "error": "the network's answer is not finite", "presence": None, "detections": []}
    boxes, scores = merge_frames(looks, placement, radius)
    columns = np.column_stack([boxes, scores])[:most].tolist()
    names = ("y", "x", "height", "width", "score")
    detections = [dict(zip(names, values, strict=True)) for values in columns]
    return {"presence": max(look.presence for look in looks), "detections": detections}


def merge_frames(
    looks: list[Look], placement: list[Frame], radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes ``(n, 4)`` in slice voxels and scores ``(n,)`` of all frames of a slice, best first, each motor once.

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
    return boxes[kept], scores[kept]
