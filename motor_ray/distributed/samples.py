"""Which slices a detector learns from, and what it is shown of them; nothing here imports ray.

labels -> PLAN rows of single slices -> LoadSlab -> FrameStore on the worker's disk -> augmented batches
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.archive.plan import slab_of
from motor_ray.config import RunSettings
from motor_ray.errors import LabelsError
from motor_ray.slices.augment import augment, sample_generator
from motor_ray.slices.frame import frames_of
from motor_ray.slices.targets import Targets, boxes_on_frame, draw_targets
from motor_ray.tables import PLAN

CLEARANCE_ANGSTROM = 500.0
"""A slice this far from every motor along z shows none of one; slices between reach and clearance are left out."""


class Sample(NamedTuple):
    """A slice to learn from: its frames' channels and the true boxes on each, in frame pixels."""

    slice_id: str
    frame: NDArray[np.uint8]
    """``(in_slices, size, size)``"""

    boxes: NDArray[np.float64]
    """``(n, 4)`` centre y, x, height, width."""


class Batch(NamedTuple):
    """What a training step takes."""

    images: torch.Tensor
    """``(b, in_slices, size, size)`` uint8."""

    targets: Targets
    slice_ids: list[str]


def with_labelled_spacing(manifest: pa.Table, labels: Labels) -> pa.Table:
    """The labelled part of `manifest`, its voxel spacings those of the labels where the files say none.

    Raises LabelsError if no tomogram is labelled, or if a shape in the labels is not that of the files.
    """
    known = {row["tomo_id"]: row for row in labels.tomograms.to_dict("records")}
    rows = [row for row in manifest.to_pylist() if row["tomo_id"] in known]
    if not rows:
        raise LabelsError(
            f"none of the {len(manifest)} tomograms of the archive is labelled; the labels speak of "
            f"{', '.join(list(known)[:3])}: do archive and labels belong together?"
        )
    for row in rows:
        label = known[row["tomo_id"]]
        files, said = ([int(source[f"size_{axis}"]) for axis in "zyx"] for source in (row, label))
        if files != said:
            raise LabelsError(f"{row['tomo_id']}: the files hold {files} voxels (z, y, x), the labels say {said}")
        row["voxel_spacing_angstrom"] = row["voxel_spacing_angstrom"] or float(label["voxel_spacing_angstrom"])
    return pa.Table.from_pylist(rows, schema=manifest.schema)


def sample_plan(manifest: pa.Table, labels: Labels, settings: RunSettings) -> pa.Table:
    """A PLAN of single slices to learn from: slices near motors, and slices without one in the asked ratio.

    The same manifest, labels and settings give the same slices in the same order.
    """
    shown, empty = [], []
    for tomogram in manifest.to_pylist():
        with_motor, without = _slices_of(tomogram, labels.motors_of(tomogram["tomo_id"]), settings)
        shown += [slab_of(tomogram, [z]) for z in with_motor]
        empty += [slab_of(tomogram, [z]) for z in without]
    wanted = min(len(empty), round(len(shown) * settings.train.negatives_per_positive))
    rng = np.random.default_rng(settings.train.seed)
    chosen = sorted(rng.choice(len(empty), wanted, replace=False)) if wanted else []
    return pa.Table.from_pylist(shown + [empty[place] for place in chosen], schema=PLAN)


def _slices_of(
    tomogram: dict[str, Any], motors: NDArray[np.float64], settings: RunSettings
) -> tuple[list[int], list[int]]:
    """The z of slices that show a motor, thinned evenly per motor, and of those clearly away from any."""
    spacing, zs = tomogram["voxel_spacing_angstrom"], np.arange(tomogram["size_z"])
    distances = np.abs(zs[:, None] - motors[None, :, 0]) * spacing  # (z, motor)
    shown: set[int] = set()
    for near in settings.targets.reach_angstrom >= distances.T:
        reached = np.flatnonzero(near)
        keep = np.linspace(0, len(reached) - 1, min(len(reached), settings.train.slices_per_motor))
        shown |= set(reached[np.rint(keep).astype(int)].tolist())
    return sorted(shown), np.flatnonzero((distances > CLEARANCE_ANGSTROM).all(axis=1)).tolist()


def pad_to_multiple(plan: pa.Table, number: int) -> pa.Table:
    """`plan` with its first rows once more until `number` divides it: Ray drops the tail of an uneven split."""
    missing = math.ceil(len(plan) / number) * number - len(plan)
    return pa.concat_tables([plan, *[plan] * (missing // max(len(plan), 1)), plan.slice(0, missing % len(plan))])


class FrameStore:
    """Samples of a worker, in the order of their ids; decoded once, and kept in a file on its disk until closed.

    A frame of 720 x 720 is half a megabyte, so a day's training set fits a disk but not a memory.
    """

    def __init__(self, tables: Iterable[pa.Table], labels: Labels, settings: RunSettings) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="motor-ray-frames-")
        self.ids: list[str] = []
        self.unread: list[dict[str, Any]] = []
        self._boxes: list[NDArray[np.float64]] = []
        file = Path(self.folder.name) / "frames"
        with file.open("wb") as frames:
            for table in tables:
                for row in table.to_pylist():
                    self._take(row, frames, labels, settings)
        shape = (len(self.ids), settings.model.in_slices, settings.frame.size, settings.frame.size)
        self._frames = np.memmap(file, np.uint8, "r", shape=shape) if self.ids else np.empty(shape, np.uint8)

        # Ray hands rows out in any order; sorted, the same seed makes the same batches.
        self.order = sorted(range(len(self.ids)), key=self.ids.__getitem__)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Sample:
        there = self.order[place]
        return Sample(self.ids[there], np.asarray(self._frames[there]), self._boxes[there])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        del self._frames
        self.folder.cleanup()

    def _take(self, row: dict[str, Any], file: Any, labels: Labels, settings: RunSettings) -> None:
        [entry] = row["loaded"]
        if entry["status"] != "ok":
            self.unread.append(
                {name: row[name] for name in ("tomo_id", "uri")} | {name: entry[name] for name in ("z", "error")}
            )
            return
        size, in_slices = settings.frame.size, settings.model.in_slices
        spacing = row["voxel_spacing_angstrom"]
        placement = frames_of((row["size_y"], row["size_x"]), spacing, settings.frame)
        pixels = np.frombuffer(row["frames"], np.uint8).reshape(-1, len(placement), size, size)
        images = pixels[np.reshape(row["channels"], in_slices)]  # (in_slices, tiles, y, x)
        motors, targets = labels.motors_of(row["tomo_id"]), settings.targets
        for tile, frame in enumerate(placement):
            file.write(np.ascontiguousarray(images[:, tile]).tobytes())
            self.ids.append(f"{row['slab_id']}/{tile}")
            reach = targets.reach_angstrom / spacing
            self._boxes.append(boxes_on_frame(motors, entry["z"], reach, frame, targets.box_pixels))


def batches(
    store: Sequence[Sample] | FrameStore, order: Sequence[int], settings: RunSettings, epoch: int | None
) -> Iterator[Batch]:
    """Batches of `store` in the given order, one ahead in a thread; augmented for an `epoch`, plain for None."""
    step = settings.train.batch_size
    groups = [order[start : start + step] for start in range(0, len(order), step)]
    with ThreadPoolExecutor(1, "batches") as ahead:
        coming = None
        for group in groups:
            ready, coming = coming, ahead.submit(_make_batch, store, group, settings, epoch)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def _make_batch(
    store: Sequence[Sample] | FrameStore, places: Sequence[int], settings: RunSettings, epoch: int | None
) -> Batch:
    samples = [prepare_sample(store[place], settings, epoch) for place in places]
    drawn = [draw_targets(sample.boxes, settings.frame.size, settings.targets) for sample in samples]
    images = torch.from_numpy(np.stack([sample.frame for sample in samples]))
    return Batch(images, Targets(*map(torch.stack, zip(*drawn, strict=True))), [sample.slice_id for sample in samples])


def prepare_sample(sample: Sample, settings: RunSettings, epoch: int | None) -> Sample:
    """`sample` as the network sees it in `epoch`: the same whatever worker asks. None is for validation: as it is."""
    if epoch is None:
        return sample
    rng = sample_generator(settings.train.seed, epoch, sample.slice_id)
    return Sample(sample.slice_id, *augment(sample.frame, sample.boxes, rng, settings.augment))
