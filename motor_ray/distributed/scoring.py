"""Frames of a slab to detections: the second operator of the pipeline, as a plain class that does not know Ray.

PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchvision.ops import box_convert, nms

from motor_ray.config import RunSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.decode import decode
from motor_ray.detector.device import pick_device
from motor_ray.detector.inference import prepare
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.tables import SLABS

SAME_MOTOR_IOU = 0.3
"""Boxes of overlapping frames that share this much show the same motor."""


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
        threads: int = 1,
        compiled: bool = False,
        count: Callable[[int], None] | None = None,
    ) -> None:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS to the actor's CPUs, which need not be the cores
        self.settings, self.count = settings, count
        self.predict = prepare(
            load_checkpoint(model).model,
            pick_device(),
            mixed_precision=settings.detect.mixed_precision,
            compiled=compiled,
        )

    def __call__(self, frames: pa.Table) -> pa.Table:
        """SLABS rows of FRAMES rows."""
        return pa.Table.from_pylist([self.score(row) for row in frames.to_pylist()], schema=SLABS)

    def score(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The SLABS row of a FRAMES row."""
        slice_shape = (row["size_y"], row["size_x"])
        good = [entry["z"] for entry in row["loaded"] if entry["status"] == "ok"]
        found: dict[int, dict[str, Any]] = {}
        if good:
            placement = frames_of(slice_shape, row["voxel_spacing_angstrom"], self.settings.frame)
            found = dict(zip(good, self._score_slices(row, placement), strict=True))
        nothing: dict[str, Any] = {"presence": None, "detections": []}
        slices = [entry | {"note": None} | found.get(entry["z"], nothing) for entry in row["loaded"]]
        if self.count:
            self.count(len(slices))
        return {"slab_id": row["slab_id"], "tomo_id": row["tomo_id"], "slices": slices}

    def _score_slices(self, row: Mapping[str, Any], placement: list[Frame]) -> list[dict[str, Any]]:
        """Presence and detections of each good slice of a FRAMES row, in slice voxels."""
        size, tiles = self.settings.frame.size, len(placement)
        pixels = np.frombuffer(row["frames"], np.uint8).reshape(-1, tiles, size, size)
        channels = np.reshape(row["channels"], (-1, self.settings.model.in_slices))
        # (slices, channels, tiles, y, x) -> a batch of (slices * tiles) images
        images = pixels[channels].swapaxes(1, 2).reshape(-1, channels.shape[1], size, size)
        boxes, presence = self._score_images(images)
        return [
            merge_tiles(boxes[start : start + tiles], placement, self.settings.detect.max_detections)
            | {"presence": float(presence[start : start + tiles].max())}
            for start in range(0, len(images), tiles)
        ]

    def _score_images(self, images: NDArray[np.uint8]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        detect = self.settings.detect
        boxes: list[tuple[torch.Tensor, torch.Tensor]] = []
        presence: list[torch.Tensor] = []
        for start in range(0, len(images), detect.batch_frames):
            prediction = self.predict(torch.from_numpy(images[start : start + detect.batch_frames]))
            boxes += decode(prediction, detect.max_detections, detect.score_threshold)
            presence.append(prediction.presence.sigmoid().cpu())
        return boxes, torch.cat(presence)


def merge_tiles(
    tiles: list[tuple[torch.Tensor, torch.Tensor]], placement: list[Frame], most: int
) -> dict[str, list[dict[str, float]]]:
    """The detections of a slice's frames as one list in slice voxels, best first, each motor once."""
    boxes = torch.cat([torch.from_numpy(f.boxes_to_slice(b)) for f, (b, _) in zip(placement, tiles, strict=True)])
    scores = torch.cat([scores for _, scores in tiles]).float().cpu()
    if len(tiles) > 1:
        corners = box_convert(boxes[:, [1, 0, 3, 2]].float(), "cxcywh", "xyxy")
        kept = nms(corners, scores, SAME_MOTOR_IOU)[:most]
        boxes, scores = boxes[kept], scores[kept]
    names = ("y", "x", "height", "width")
    rows = zip(boxes.tolist(), scores.tolist(), strict=True)
    return {"detections": [dict(zip(names, box, strict=True)) | {"score": score} for box, score in rows]}
