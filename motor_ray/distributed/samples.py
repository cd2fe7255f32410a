"""Which slices a detector learns from, and what it is shown of them; nothing here imports ray.

labels -> PLAN rows of single slices -> LoadSlab -> FrameStore -> Samples -> augmented batches

Which sample comes when depends on the seed, the epoch and the samples alone, not on how many workers share them.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.archive.plan import slab_of
from motor_ray.config import RunSettings
from motor_ray.errors import LabelsError, RunError
from motor_ray.slices.augment import augment, sample_generator
from motor_ray.slices.frame import Frame, frames_of
from motor_ray.slices.targets import Targets, box_on_frame, boxes_on_frame, draw_targets
from motor_ray.tables import PLAN

T = TypeVar("T")

CLEARANCE_ANGSTROM = 500.0
"""A slice this far from every motor along z shows none of one; slices between reach and clearance are left out."""


class Sample(NamedTuple):
    """A slice to learn from: its frames' channels and the true boxes on each, in frame pixels."""

    slice_id: str
    frame: NDArray[np.uint8]
    """``(in_slices, size, size)``"""

    boxes: NDArray[np.float64]
    """``(n, 5)`` centre y, x, height, width, and the peak of the target there."""


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


def sample_plan(manifest: pa.Table, labels: Labels, settings: RunSettings, seed: int) -> pa.Table:
    """A PLAN of single slices to learn from: slices near motors, and slices without one in the asked ratio.

    Slices near what is doubtful are left out.
    Where there are too few slices of tomograms without motor, or too few far from one, the others make up for them.
    The same manifest, labels, settings and seed give the same slices in the same order.
    """
    shown: list[dict[str, Any]] = []
    far: list[dict[str, Any]] = []
    empty: list[dict[str, Any]] = []
    for tomogram in manifest.to_pylist():
        motors = labels.motors_of(tomogram["tomo_id"])
        with_motor, without = _slices_of(tomogram, motors, labels.doubtful_of(tomogram["tomo_id"]), settings)
        shown += [slab_of(tomogram, [z]) for z in with_motor]
        (far if len(motors) else empty).extend(slab_of(tomogram, [z]) for z in without)
    wanted = min(len(far) + len(empty), round(len(shown) * settings.train.negatives_per_positive))
    of_empty = min(len(empty), max(round(wanted * settings.train.empty_share), wanted - len(far)))
    rng = np.random.default_rng(seed)
    chosen = [*_some(empty, of_empty, rng), *_some(far, wanted - of_empty, rng)]
    return pa.Table.from_pylist(shown + chosen, schema=PLAN)


def _some(rows: list[dict[str, Any]], number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    return [rows[place] for place in sorted(rng.choice(len(rows), number, replace=False))] if number else []


def _slices_of(
    tomogram: dict[str, Any], motors: NDArray[np.float64], doubtful: NDArray[np.float64], settings: RunSettings
) -> tuple[list[int], list[int]]:
    """The z of slices that show a motor, thinned evenly per motor, and of those clearly away from any.

    Slices that show something `doubtful` are neither, nor are those without a motor that are not clearly away from it.
    """
    spacing, zs = tomogram["voxel_spacing_angstrom"], np.arange(tomogram["size_z"])
    distances, unsure = (np.abs(zs[:, None] - some[None, :, 0]) * spacing for some in (motors, doubtful))  # (z, motor)
    clear = (unsure > settings.targets.reach_angstrom).all(axis=1)
    shown: set[int] = set()
    for near in settings.targets.reach_angstrom >= distances.T:
        reached = np.flatnonzero(near & clear)
        keep = np.linspace(0, len(reached) - 1, min(len(reached), settings.train.slices_per_motor))
        shown |= set(reached[np.rint(keep).astype(int)].tolist())
    far = np.hstack([distances, unsure]) > CLEARANCE_ANGSTROM
    return sorted(shown), np.flatnonzero(far.all(axis=1)).tolist()


class Frames(Protocol):
    """Where decoded frames are kept."""

    def frame(self, slice_id: str) -> NDArray[np.uint8] | None:
        """``(in_slices, size, size)`` of one frame of a slice; None if the slice could not be read."""


class _Place(NamedTuple):
    """One frame of a slice."""

    slice_id: str
    tomo_id: str
    z: int
    spacing: float
    frame: Frame


class Samples(Sequence["Sample | None"]):
    """All samples of a plan of single slices, in the order of their ids; None stands for one that cannot be read.

    They count and come in the same order whether they can be read or not, so that all workers agree about them.
    """

    def __init__(self, plan: pa.Table, labels: Labels, settings: RunSettings, frames: Frames) -> None:
        self._labels, self._settings, self._frames = labels, settings, frames
        self._places = sorted(_places_of(plan, settings))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Sample | None:  # type: ignore[override]  # slices of it are not needed
        slice_id, tomo_id, z, spacing, frame = self._places[number]
        pixels = self._frames.frame(slice_id)
        if pixels is None:
            return None
        targets, fade = self._settings.targets, self._settings.targets.fade_angstrom
        boxes = boxes_on_frame(
            self._labels.motors_of(tomo_id),
            z,
            targets.reach_angstrom / spacing,
            frame,
            box_on_frame(frame, spacing, self._settings),
            fade / spacing if fade else None,
        )
        return Sample(slice_id, pixels, boxes)


def frame_id(slab_id: str, tile: int) -> str:
    """The name of one of the frames of a slice."""
    return f"{slab_id}/{tile}"


def _places_of(plan: pa.Table, settings: RunSettings) -> Iterator[_Place]:
    for row in plan.to_pylist():
        spacing = row["voxel_spacing_angstrom"]
        for tile, frame in enumerate(frames_of((row["size_y"], row["size_x"]), spacing, settings.frame)):
            yield _Place(frame_id(row["slab_id"], tile), row["tomo_id"], row["zs"][0], spacing, frame)


class Deal(NamedTuple):
    """A worker's part of one step of the optimizer."""

    batches: list[list[int]]
    """The places of its samples, batch by batch; all workers have batches of the same lengths."""

    position: int
    """How many samples of the epoch all workers have seen after it."""


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """All places, shuffled: the same for every worker."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(samples).tolist()
    return order


def deals(order: Sequence[int], position: int, rank: int, workers: int, batch: int, accumulate: int) -> Iterator[Deal]:
    """What worker `rank` does of an epoch from `position` on: each step's samples are dealt to the workers in turn.

    With the last step every sample of the epoch has been seen; a few are seen twice where workers would else have
    different numbers.
    """
    together = workers * batch * accumulate
    for start in range(position, len(order), together):
        chunk = list(order[start : start + together])
        missing = -len(chunk) % workers
        chunk += list(itertools.islice(itertools.cycle(order), missing))
        own = chunk[rank::workers]
        groups = [own[first : first + batch] for first in range(0, len(own), batch)]
        yield Deal(groups, min(start + together, len(order)))


def batches(
    samples: Sequence[Sample | None],
    groups: Iterable[Sequence[int]],
    settings: RunSettings,
    epoch: int | None,
    threads: int = 1,
) -> Generator[Batch, None, None]:
    """A batch of `samples` for each group of places, some ahead in threads; augmented for an `epoch`, plain for None.

    A sample that cannot be read is replaced by the next that can. Raises RunError if there is none.
    """
    return made_ahead(lambda group: _make_batch(samples, group, settings, epoch), groups, threads)


def made_ahead(
    make: Callable[[Sequence[int]], T], groups: Iterable[Sequence[int]], threads: int
) -> Generator[T, None, None]:
    """What `make` makes of each of the `groups`, in their order, some ahead in so many threads."""
    with ThreadPoolExecutor(threads, "batches") as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for group in groups:
                ahead.append(pool.submit(make, group))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for one in ahead:
                one.cancel()


def _make_batch(
    samples: Sequence[Sample | None], places: Sequence[int], settings: RunSettings, epoch: int | None
) -> Batch:
    shown = [prepare_sample(readable(samples, place), settings, epoch) for place in places]
    levels = settings.model.levels
    drawn = [draw_targets(sample.boxes, settings.frame.size, settings.targets, levels) for sample in shown]
    images = torch.from_numpy(np.stack([sample.frame for sample in shown]))
    return Batch(images, Targets(*map(torch.stack, zip(*drawn, strict=True))), [sample.slice_id for sample in shown])


def readable(samples: Sequence[T | None], place: int) -> T:
    """The sample at `place`, or the next that can be read. Raises RunError if none can."""
    for step in range(len(samples)):
        sample = samples[(place + step) % len(samples)]
        if sample is not None:
            return sample
    raise RunError(f"none of {len(samples)} slices can be read")


def prepare_sample(sample: Sample, settings: RunSettings, epoch: int | None) -> Sample:
    """`sample` as the network sees it in `epoch`: the same whatever worker asks. None is for validation: as it is."""
    if epoch is None:
        return sample
    rng = sample_generator(settings.train.seed, epoch, sample.slice_id)
    return Sample(sample.slice_id, *augment(sample.frame, sample.boxes, rng, settings.augment))
