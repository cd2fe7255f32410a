"""Training of the accuracy benchmark: one loop for all detectors, in this process and without Ray.

Slices, their order, what is changed of them at random, optimizer, learning rate and the choice of the best epoch are
those of `motor-ray train`, and the same for every detector; only network and loss differ.
"""

import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch

from motor_ray.archive.labels import Labels
from motor_ray.bench.accuracy_archives import Archive, short_hash
from motor_ray.config import RunSettings
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.distributed.frame_store import FrameStore, fill, is_filled, store_name
from motor_ray.distributed.learner import Judged, Learner
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.loop import validations_since_best
from motor_ray.distributed.optimisation import prepared
from motor_ray.distributed.samples import Samples, batches, deals, epoch_order
from motor_ray.distributed.training import new_model, plan_part
from motor_ray.distributed.training_loop import rank_of
from motor_ray.errors import UnfinishedError
from motor_ray.motors.slice_metrics import slice_scores

Line = dict[str, Any]

ROWS_AT_A_TIME = 64

log = logging.getLogger(__name__)


class Data(NamedTuple):
    """Slices to learn from, and those that choose the best epoch."""

    train: Samples
    held_out: Samples


class Trainee(Protocol):
    """A detector under training."""

    def run_epoch(self, number: int) -> None:
        """Learn from every sample once."""

    def judge(self) -> list[Judged]:
        """What it says of the held-out samples."""

    def keep(self, line: Line) -> None:
        """Write it down: no epoch was better."""

    def end_epoch(self, line: Line) -> None:
        """Whatever else there is to do."""


def fit(trainee: Trainee, settings: RunSettings) -> list[Line]:
    """Train through all epochs, keep the best; what each validation said."""
    history: list[Line] = []
    for epoch in range(settings.train.epochs):
        trainee.run_epoch(epoch)
        judged = trainee.judge()
        found = [(one.boxes, one.scores) for one in judged]
        scores = slice_scores(found, [one.truth for one in judged], settings.detect.score_threshold)
        history.append({"epoch": epoch, **scores})
        log.info("epoch %d of %d: mAP@0.5 %.3f", epoch + 1, settings.train.epochs, scores["mAP@0.5"] or 0.0)
        if validations_since_best([rank_of(line) for line in history]) == 0:
            trainee.keep(history[-1])
        trainee.end_epoch(history[-1])
    return history


class Ours:
    """The detector of this repository, checkpoints below `folder`: best/, and snapshots/ after cycles."""

    def __init__(self, settings: RunSettings, data: Data, folder: Path) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        self.learner = Learner(prepared(new_model(settings), settings.train), settings, torch.device("cpu"))
        self.step = 0

    def run_epoch(self, number: int) -> None:
        """See Trainee."""
        groups = list(steps_of(self.data.train, self.settings, number))
        for done, batch in enumerate(batches(self.data.train, groups, self.settings, number)):
            torch.manual_seed(hash((self.settings.train.seed, self.step, 0)))
            self.learner.step([batch], progress(number, done, len(groups), self.settings))
            self.step += 1

    def judge(self) -> list[Judged]:
        """See Trainee."""
        return self.learner.judge(self.data.held_out, range(len(self.data.held_out)))

    def keep(self, line: Line) -> None:
        """See Trainee."""
        save_checkpoint(self.folder / "best", self.learner.kept, self.settings, line)

    def end_epoch(self, line: Line) -> None:
        """See Trainee."""
        train = self.settings.train
        if train.schedule != "cyclic":
            return
        cycle, rest = divmod(line["epoch"] + 1, train.epochs // train.cycles)
        if rest == 0:
            save_checkpoint(self.folder / "snapshots" / f"cycle_{cycle:02d}", self.learner.kept, self.settings, line)


def steps_of(samples: Sized, settings: RunSettings, epoch: int) -> Iterator[list[int]]:
    """The places of the samples of each step of an epoch: those of `motor-ray train` with one worker."""
    order = epoch_order(len(samples), settings.train.seed, epoch)
    each = deals(order, 0, 0, 1, settings.train.batch_size, 1)
    return itertools.chain.from_iterable(deal.batches for deal in each)


def progress(epoch: int, done: int, steps: int, settings: RunSettings) -> float:
    """The share of all training that is done."""
    return (epoch + done / steps) / settings.train.epochs


def require_finite(loss: torch.Tensor, who: str) -> None:
    """Raises UnfinishedError for a loss from which nothing can be learned."""
    if not math.isfinite(loss.item()):
        raise UnfinishedError(f"{who}: the loss is not finite; a lower learning rate may help")


def data_of(work: Path, train: Archive, held_out: Archive, settings: RunSettings) -> Data:
    """Samples of both archives, their frames decoded once and kept in the folder `work`."""
    return Data(_samples(work, train, settings, "train"), _samples(work, held_out, settings, "validation"))


def _samples(work: Path, archive: Archive, settings: RunSettings, part: str) -> Samples:
    names = archive.manifest["tomo_id"].to_pylist()
    plan = plan_part(archive.manifest, archive.labels, settings, names, part)
    return samples_of(work, plan, archive.labels, settings)


def samples_of(work: Path, plan: pa.Table, labels: Labels, settings: RunSettings) -> Samples:
    """The samples of a PLAN of single slices."""
    return Samples(plan, labels, settings, frames_of_plan(work, plan, settings))


def frames_of_plan(work: Path, plan: pa.Table, settings: RunSettings) -> FrameStore:
    """The frames of a PLAN of single slices, decoded once and kept in the folder `work`."""
    # Hashed, because a name that holds every setting may be longer than a file's may be.
    folder = work / "frames" / short_hash(store_name(plan, settings))
    if not is_filled(folder):
        # Two trainings may want the same frames at a time: each writes its own, and the first one's stay.
        fresh = folder.with_name(f".{folder.name}-{os.getpid()}")
        fresh.mkdir(parents=True, exist_ok=True)
        load = LoadSlab(settings)
        pieces = (plan.slice(start, ROWS_AT_A_TIME) for start in range(0, len(plan), ROWS_AT_A_TIME))
        fill(fresh, map(load, pieces), settings, lambda _: None)
        folder = _moved(fresh, folder)
    return FrameStore(folder, settings)


def _moved(fresh: Path, folder: Path) -> Path:
    try:
        return fresh.rename(folder)
    except OSError:  # another one was faster
        shutil.rmtree(fresh)
        return folder
