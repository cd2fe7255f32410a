"""Pre-training on a worker: puzzles of slices that nobody has labelled, and a network that learns to solve them."""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from motor_ray.config import RunSettings
from motor_ray.detector.reconstruction import (
    Reconstructor,
    hide,
    load_reconstructor,
    reconstruction_losses,
    save_reconstructor,
)
from motor_ray.distributed.collectives import AgreedError, gathered, share_buffers
from motor_ray.distributed.loop import BATCH_THREADS, Loop
from motor_ray.distributed.optimisation import Optimisation, unwrapped
from motor_ray.distributed.samples import Frames, frame_id, made_ahead, readable
from motor_ray.distributed.worker import Job, guarded, stored
from motor_ray.slices.augment import sample_generator
from motor_ray.slices.frame import frames_of
from motor_ray.slices.puzzle import Puzzle, make_puzzle
from motor_ray.storage import join

GOAL = "validation_loss"


class Picture(NamedTuple):
    """A frame of an unlabelled slice between its neighbours."""

    slice_id: str
    frame: NDArray[np.uint8]
    """``(3, size, size)``"""


class Pictures(Sequence["Picture | None"]):
    """All frames of a plan of single slices, in the order of their ids; None stands for one that cannot be read."""

    def __init__(self, plan: pa.Table, settings: RunSettings, frames: Frames) -> None:
        self._frames = frames
        self._ids = sorted(
            frame_id(row["slab_id"], tile)
            for row in plan.to_pylist()
            for tile in range(
                len(frames_of((row["size_y"], row["size_x"]), row["voxel_spacing_angstrom"], settings.frame))
            )
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: Any) -> Picture | None:  # type: ignore[override]  # slices of it are not needed
        pixels = self._frames.frame(self._ids[number])
        return None if pixels is None else Picture(self._ids[number], pixels)


class Puzzles(NamedTuple):
    """What a step of pre-training takes: the arrays of `Puzzle`, stacked."""

    images: torch.Tensor
    """``(b, in_slices, size, size)`` uint8."""

    targets: torch.Tensor
    masks: torch.Tensor
    counted: torch.Tensor
    """``(b, 1, size, size)`` uint8, and twice bool."""

    slice_ids: list[str]


def puzzle_of(picture: Picture, settings: RunSettings, epoch: int | None) -> Puzzle:
    """The puzzle that a picture is in `epoch`, the same whatever worker asks; None is for validation."""
    rng = sample_generator(settings.train.seed, 0 if epoch is None else epoch, picture.slice_id)
    changes = None if epoch is None else settings.augment
    return make_puzzle(picture.frame, settings.model.in_slices, rng, settings.pretrain, changes)


def puzzles_at(
    pictures: Sequence[Picture | None], settings: RunSettings, epoch: int | None, places: Sequence[int]
) -> Puzzles:
    """The puzzles at `places`; one that cannot be read is replaced by the next that can."""
    shown = [readable(pictures, place) for place in places]
    made = [puzzle_of(picture, settings, epoch) for picture in shown]
    images, targets, masks, counted = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*made, strict=True))
    return Puzzles(images, targets, masks, counted, [picture.slice_id for picture in shown])


class Restorer(Optimisation[Puzzles]):
    """The optimisation of a network that makes frames whole."""

    def losses(self, batch: Puzzles) -> dict[str, torch.Tensor]:
        """The parts of the loss of a batch, and their ``total``, all scalars."""
        return self._losses(self.model, batch)

    def _losses(self, model: nn.Module, batch: Puzzles) -> dict[str, torch.Tensor]:
        mask = self.here(batch.masks)
        with self.precision():
            said = model(hide(self.here(batch.images), mask))
        return reconstruction_losses(said, self.here(batch.targets), mask, self.here(batch.counted))

    @property
    def kept(self) -> Reconstructor:
        """The network that is validated and kept: the average, if there is one."""
        inner = unwrapped(self.model if self.average is None else self.average)
        assert isinstance(inner, Reconstructor)
        return inner

    @torch.no_grad()
    def judge(self, pictures: Pictures, places: Sequence[int]) -> list[float]:
        """The loss on each of the pictures at `places` that can be read."""
        model = self.kept.eval()
        seen = [place for place in places if pictures[place] is not None]
        coming = made_ahead(partial(puzzles_at, pictures, self.settings, None), [[place] for place in seen], 1)
        return [float(self._losses(model, one)["total"]) for one in coming]


class PretrainLoop(Loop[Puzzles]):
    """One worker's part of pre-training."""

    goal = GOAL

    learner: Restorer
    samples: Pictures
    held_out: Pictures

    def start(self) -> Reconstructor:
        """The network that the run starts with."""
        return load_reconstructor(join(self.run_uri, "start"), Reconstructor(self.settings.model))

    def optimisation(self, model: nn.Module, device: torch.device) -> Restorer:
        """What teaches `model`, which may be wrapped for several workers."""
        return Restorer(model, self.settings, device, self.workers)

    def batches(self, groups: Sequence[Sequence[int]]) -> Generator[Puzzles, None, None]:
        """Puzzles of this epoch for each group of their places."""
        return made_ahead(partial(puzzles_at, self.samples, self.settings, self.course.epoch), groups, BATCH_THREADS)

    def scores(self) -> dict[str, Any]:
        """The mean loss on the held-out slices; the same for every worker."""
        share_buffers(self.learner.kept)
        losses = gathered(self.learner.judge(self.held_out, range(self.rank, len(self.held_out), self.workers)))
        if not losses:
            raise AgreedError(f"none of the {len(self.held_out)} validation slices can be read")
        return {GOAL: float(np.mean(sorted(losses))), "n_slices": len(losses)}

    def rank_of(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """By what a validation is compared with others; higher is better."""
        return rank_of(metrics)

    def save(self, uri: str, metrics: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Write the network that is kept, and its backbone."""
        save_reconstructor(uri, self.learner.kept)

    def load(self, folder: str, model: nn.Module) -> None:
        """Copy a network's tensors into `model`."""
        assert isinstance(model, Reconstructor)
        load_reconstructor(folder, model)


def rank_of(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """By what a validation is compared with others; higher is better."""
    return (-metrics[GOAL],)


def pretrain_worker(config: dict[str, Any]) -> None:
    """Pre-train together with the other workers, as `train_worker` trains."""
    guarded(Job(**config), run)


def run(job: Job) -> None:
    """One worker's part of the run."""
    plans, store = stored(job._replace(settings=with_neighbours_seen(job.settings)))
    pictures, held_out = (Pictures(plan, job.settings, store) for plan in plans)
    PretrainLoop(job.name, job.run_uri, job.settings, pictures, held_out, job.board).run()


def with_neighbours_seen(settings: RunSettings) -> RunSettings:
    """`settings` by which a slice is read with the neighbours that a puzzle takes, whatever the network sees."""
    if settings.model.in_slices == 3:
        return settings
    seen = {"in_slices": 3, "slice_step": settings.pretrain.neighbour, "slice_step_angstrom": None}
    return settings.model_copy(update={"model": settings.model.model_copy(update=seen)})
