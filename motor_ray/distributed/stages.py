"""The operators of the detection pipeline, as plain classes: nothing here imports ray.

    PLAN row -> LoadSlab (CPU) -> FRAMES row -> ScoreFrames (GPU) -> SLABS row

One row in, one row out, whatever happens to its slices: a slice that cannot be read is a status in the row,
so that counts add up and a row keeps its id from the plan to the file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms, box_convert

from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import RunSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.decode import decode
from motor_ray.detector.device import pick_device
from motor_ray.detector.inference import prepare
from motor_ray.detector.model import Prediction
from motor_ray.errors import MotorRayError, SliceMissingError
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.slices.preprocess import make_frames
from motor_ray.tables import PLAN, SLABS

FRAMES = pa.schema(
    [
        *PLAN,
        ("loaded", pa.list_(pa.struct([("z", pa.int32()), ("status", pa.string()), ("error", pa.string())]))),
        ("frames", pa.large_binary()),
        ("channels", pa.list_(pa.int32())),
    ]
)
"""A PLAN row and its pixels.

``loaded`` has one entry per slice of ``zs``, in order. ``frames`` holds the ``(n, tiles, size, size)`` uint8 frames of
the n slices that were read, neighbours included; ``channels`` the ``(ok, in_slices)`` places in it of each good
slice's channels.
"""

READ_THREADS = 8
"""Slices of a slab that are fetched at the same time."""

SAME_MOTOR_IOU = 0.3
"""Boxes of overlapping frames that share this much show the same motor."""


class LoadSlab:
    """Reads the slices of a slab and makes frames of them.

    INPUT   PLAN table
    OUTPUT  FRAMES table, as many rows
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        # Ray gives the actor one CPU; OpenCV would start a thread for each of the machine's.
        cv2.setNumThreads(1)

    def __call__(self, plan: pa.Table) -> pa.Table:
        """FRAMES rows of PLAN rows."""
        return pa.Table.from_pylist([self.load(row) for row in plan.to_pylist()], schema=FRAMES)

    def load(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The FRAMES row of a PLAN row."""
        wanted = with_neighbours(row["zs"], row["size_z"], self.settings)
        frames = self._read_frames(row, wanted)
        places = {z: place for place, z in enumerate(z for z in wanted if not isinstance(frames[z], Exception))}
        good = [z for z in row["zs"] if z in places]
        pixels = [frame for frame in frames.values() if not isinstance(frame, Exception)]
        return dict(row) | {
            "loaded": [status_of(z, frames[z]) for z in row["zs"]],
            "frames": np.stack(pixels).tobytes() if pixels else b"",
            "channels": [places.get(c, places[z]) for z in good for c in self._channels(z, row["size_z"])],
        }

    def _channels(self, z: int, size_z: int) -> list[int]:
        return with_neighbours([z], size_z, self.settings, clamp=True)

    def _read_frames(self, row: Mapping[str, Any], zs: list[int]) -> dict[int, NDArray[np.uint8] | MotorRayError]:
        shape = (row["size_z"], row["size_y"], row["size_x"])
        try:
            placement = frames_of(shape[1:], row["voxel_spacing_angstrom"], self.settings.frame)
            reader = open_tomogram(row["uri"], row["format"], shape, self.settings.archive)
        except MotorRayError as error:
            return dict.fromkeys(zs, error)
        images = read_slices(reader, zs, READ_THREADS)
        return {z: self._make_frames(image, placement) for z, image in zip(zs, images, strict=True)}

    def _make_frames(
        self, image: NDArray[Any] | MotorRayError, placement: list[Frame]
    ) -> NDArray[np.uint8] | MotorRayError:
        if isinstance(image, Exception):
            return image
        try:
            return make_frames(image, placement, self.settings.preprocess)
        except MotorRayError as error:
            return error


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
        self.predict: Callable[[torch.Tensor], Prediction] = prepare(
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


def with_neighbours(zs: list[int], size_z: int, settings: RunSettings, *, clamp: bool = False) -> list[int]:
    """`zs` and the slices that the model sees beside them.

    Sorted and each once; or, with `clamp`, one per channel in order, a neighbour outside the tomogram replaced by the
    last slice inside.
    """
    reach = settings.model.slice_step if settings.model.in_slices == 3 else 0
    steps = (-reach, 0, reach) if reach else (0,)
    near = [min(max(z + step, 0), size_z - 1) for z in zs for step in steps]
    return near if clamp else sorted(set(near))


def status_of(z: int, frame: NDArray[np.uint8] | MotorRayError) -> dict[str, Any]:
    """What became of slice `z`: an entry of FRAMES' ``loaded``."""
    if not isinstance(frame, Exception):
        return {"z": z, "status": "ok", "error": None}
    status = "missing" if isinstance(frame, SliceMissingError) else "corrupt"
    return {"z": z, "status": status, "error": str(frame)}


def merge_tiles(
    tiles: list[tuple[torch.Tensor, torch.Tensor]], placement: list[Frame], most: int
) -> dict[str, list[dict[str, float]]]:
    """The detections of a slice's frames as one list in slice voxels, best first, each motor once."""
    boxes = torch.cat([torch.from_numpy(f.boxes_to_slice(b)) for f, (b, _) in zip(placement, tiles, strict=True)])
    scores = torch.cat([scores for _, scores in tiles]).float().cpu()
    if len(tiles) > 1:
        corners = box_convert(boxes[:, [1, 0, 3, 2]].float(), "cxcywh", "xyxy")
        kept = batched_nms(corners, scores, torch.zeros(len(scores), dtype=torch.int64), SAME_MOTOR_IOU)[:most]
        boxes, scores = boxes[kept], scores[kept]
    names = ("y", "x", "height", "width")
    rows = zip(boxes.tolist(), scores.tolist(), strict=True)
    return {"detections": [dict(zip(names, box, strict=True)) | {"score": score} for box, score in rows]}
