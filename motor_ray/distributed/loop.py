"""The epochs of a worker: steps, validation, and what is kept of them. Goes on from where a run was left.

Runs inside Ray Train; every collective call here is made by all workers, the same number of times.
"""

import contextlib
import itertools
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic

import ray.train
import ray.train.torch
import torch
from torch import nn

from motor_ray.config import RunSettings
from motor_ray.detector.device import can_compile
from motor_ray.distributed.collectives import AgreedError, gathered
from motor_ray.distributed.optimisation import B, NotFiniteError, Optimisation, prepared, unwrapped
from motor_ray.distributed.progress import Board
from motor_ray.distributed.samples import Deal, deals, epoch_order
from motor_ray.errors import RunError
from motor_ray.storage import join, write_bytes
from motor_ray.tracking import open_trackers

PREEMPTION_BATCHES = 20
"""After so many batches workers ask whether one of their nodes is about to go: together, which takes time."""

BATCH_THREADS = 2
"""Threads of a worker that make batches ahead of it."""


@dataclass
class Course:
    """How far a run is: what must be restored beside weights and optimizer."""

    epoch: int = 0
    position: int = 0
    """Samples of the epoch that all workers together have seen."""

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """The first worker's, summed over the steps since the last validation."""

    steps: int = 0
    """How many steps those are."""

    history: list[dict[str, Any]] = field(default_factory=list)
    """The metrics of each validation."""


class Rate:
    """How fast a worker is since the rate was begun, whatever it did, and how long it waited for batches."""

    def __init__(self) -> None:
        self.began, self.frames, self.waited = time.perf_counter(), 0, 0.0

    def add(self, frames: int, waited: float) -> None:
        """A step on so many frames was done."""
        self.frames, self.waited = self.frames + frames, self.waited + waited

    def summary(self, workers: int) -> dict[str, float]:
        """Images per second of all workers, and the share of the time that went in waiting."""
        seconds = time.perf_counter() - self.began
        return {"images_per_second": workers * self.frames / seconds, "wait_share": self.waited / seconds}


class Loop(ABC, Generic[B]):
    """One worker's part of a run, whatever the network is taught."""

    goal: str
    """The validation metric that is shown as the best so far."""

    def __init__(
        self, name: str, run_uri: str, settings: RunSettings, samples: Sized, held_out: Sized, board: Board
    ) -> None:
        self.name, self.run_uri, self.settings, self.board = name, run_uri, settings, board
        self.samples, self.held_out = samples, held_out
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        if settings.train.compile and not can_compile(ray.train.torch.get_device()):
            raise RunError(
                "--train.compile: there is no compiler on this node (g++, or Triton for a GPU); leave it out"
            )
        start = prepared(self.start(), settings.train)
        # Gradients are summed where they lie, not copied there and back.
        model = ray.train.torch.prepare_model(start, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
        self.learner = self.optimisation(model, ray.train.torch.get_device())
        self.course = self.restored()

    @abstractmethod
    def start(self) -> nn.Module:
        """The network that the run starts with."""

    @abstractmethod
    def optimisation(self, model: nn.Module, device: torch.device) -> Optimisation[B]:
        """What teaches `model`, which may be wrapped for several workers."""

    @abstractmethod
    def batches(self, groups: Sequence[Sequence[int]]) -> Generator[B, None, None]:
        """A batch of samples of this epoch for each group of their places, made ahead in BATCH_THREADS."""

    @abstractmethod
    def scores(self) -> dict[str, Any]:
        """The metrics of a validation; the same for every worker."""

    @abstractmethod
    def rank_of(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """By what a validation is compared with others; higher is better."""

    @abstractmethod
    def save(self, uri: str, metrics: Mapping[str, Any]) -> None:
        """Write the network that is kept to the folder `uri`."""

    @abstractmethod
    def load(self, folder: str, model: nn.Module) -> None:
        """Copy what `save` wrote to the folder into `model`."""

    def looks_at_tomograms(self, ended: bool) -> "bool | ray.train.ValidationTaskConfig":  # noqa: ARG002
        """What Ray Train is to do with the checkpoint, beside the training that goes on."""
        return False

    def run(self) -> None:
        """Epochs from where the run is until it is done."""
        train = self.settings.train
        with contextlib.ExitStack() as stack:
            if self.rank == 0:
                self.trackers = stack.enter_context(open_trackers(self.run_uri, self.name, train))
                self.keep()  # again: the run may have ended between a checkpoint and what follows from it
            self.rate = Rate()
            while self.course.epoch < train.epochs and not self.is_stuck():
                self.run_epoch()
        if self.rank == 0:
            self.save(join(self.run_uri, "last"), self.course.history[-1])

    def is_stuck(self) -> bool:
        """Whether validations have not become better for too long; the later cycles of a schedule are always run."""
        train = self.settings.train
        return train.schedule != "cyclic" and self.since_best() >= train.patience

    def run_epoch(self) -> None:
        """What is left of an epoch."""
        train, course = self.settings.train, self.course
        order = epoch_order(len(self.samples), train.seed, course.epoch)
        steps = list(deals(order, course.position, self.rank, self.workers, train.batch_size, train.accumulate))
        groups = [group for deal in steps for group in deal.batches]
        coming = self.batches(groups)
        with contextlib.closing(coming):
            for deal in steps:
                began = time.perf_counter()
                own = list(itertools.islice(coming, len(deal.batches)))
                got = time.perf_counter()
                losses = self.step(own)
                frames = sum(len(batch.slice_ids) for batch in own)
                self.rate.add(frames, got - began)
                self.advance(deal, losses)

    def step(self, own: list[B]) -> dict[str, float]:
        """Learn from this worker's batches of a step. Raises AgreedError if a loss is not finite."""
        course = self.course
        # A function of the step, so that a run that goes on draws what one that was never stopped would.
        torch.manual_seed(hash((self.settings.train.seed, course.step, self.rank)))
        try:
            return self.learner.step(own, self.progress())
        except NotFiniteError as error:
            names = ", ".join(gathered(error.slice_ids)) or "none in particular: a gradient overflowed"
            raise AgreedError(
                f"the loss of step {course.step} is not finite, on slices {names}; look at them, or lower "
                "--train.learning-rate; checkpoints of before are kept"
            ) from None

    def progress(self) -> float:
        """The share of all training that is done."""
        return (self.course.epoch + self.course.position / len(self.samples)) / self.settings.train.epochs

    def advance(self, deal: Deal, losses: dict[str, float]) -> None:
        """Note that a step is done, and do what comes after it."""
        course, train = self.course, self.settings.train
        course.losses = {name: course.losses.get(name, 0.0) + value for name, value in losses.items()}
        course.position, course.step, course.steps = deal.position, course.step + 1, course.steps + 1
        self.tell()
        ended = course.position == len(self.samples)
        if ended or (train.validate_steps and course.step % train.validate_steps == 0):
            self.validate(ended)
        elif course.step % train.checkpoint_steps == 0 or self.is_losing_a_node():
            self.commit({})

    def tell(self) -> None:
        """Show how far it is."""
        if self.rank:
            return
        course, rate = self.course, self.rate.summary(self.workers)
        mean = {name: value / course.steps for name, value in course.losses.items()}
        parts = " ".join(f"{name} {value:.3g}" for name, value in mean.items() if name != "total")
        best = max(course.history, key=self.rank_of, default=None)
        words = [
            f"epoch {course.epoch + 1} of {self.settings.train.epochs}",
            f"loss {mean['total']:.3f} ({parts})",
            f"lr {self.learner.rate:.2g}",
            f"{rate['images_per_second']:.1f} images/s",
            f"{rate['wait_share']:.0%} waiting",
            *([f"best {self.goal} {best[self.goal] or 0.0:.3f}"] if best is not None else []),
        ]
        self.board.show(course.epoch * len(self.samples) + course.position, ", ".join(words))

    def is_losing_a_node(self) -> bool:
        """Whether a node of ours is about to be taken away: until it is, every answer leaves a checkpoint."""
        every = max(PREEMPTION_BATCHES // self.settings.train.accumulate, 1)
        return self.course.step % every == 0 and ray.train.get_preemption_info() is not None

    def validate(self, ended: bool) -> None:
        """Judge the held-out slices of all workers, keep the model if it is the best, and report."""
        course = self.course
        line = {"epoch": course.epoch, "step": course.step, **self.training_metrics(), **self.scores()}
        course.history.append(line)
        course.losses, course.steps = {}, 0
        if ended:
            course.epoch, course.position = course.epoch + 1, 0
        if self.rank == 0:
            # Before Ray Train hears of it, and may end the run.
            text = "".join(json.dumps(one) + "\n" for one in course.history)
            write_bytes(join(self.run_uri, "metrics.jsonl"), text.encode())
        self.commit(line, self.looks_at_tomograms(ended))
        if self.rank == 0:
            self.keep()
        self.rate = Rate()

    def training_metrics(self) -> dict[str, float]:
        """Mean losses since the last validation, and how fast it went."""
        losses = {f"loss_{name}": value / self.course.steps for name, value in self.course.losses.items()}
        rate = {"learning_rate": self.learner.rate, "workers": self.workers, **self.rate.summary(self.workers)}
        return losses | rate

    def keep(self) -> None:
        """If the model was just validated, tell trackers, and keep it if it is the best or ends a cycle."""
        course, train = self.course, self.settings.train
        if not course.history or course.steps:
            return
        line = course.history[-1]
        self.trackers.log(course.step, line)
        if self.since_best() == 0:
            self.save(join(self.run_uri, "best"), line)
        cycle, rest = divmod(course.epoch, train.epochs // train.cycles) if train.schedule == "cyclic" else (0, 1)
        if course.position == rest == 0:
            self.save(join(self.run_uri, "snapshots", f"cycle_{cycle:02d}"), line)

    def since_best(self) -> int:
        """How many validations ago the best one was."""
        return validations_since_best(list(map(self.rank_of, self.course.history)))

    def commit(self, line: dict[str, Any], validation: "bool | ray.train.ValidationTaskConfig" = False) -> None:
        """Report, with a checkpoint that has all that is needed to go on from here."""
        if self.rank:
            ray.train.report(line)
            return
        weights = None if self.learner.average is None else unwrapped(self.learner.model).state_dict()
        state = {"course": asdict(self.course), "weights": weights, **self.learner.state()}
        with tempfile.TemporaryDirectory(prefix="motor-ray-checkpoint-") as folder:
            self.save(folder, line)
            torch.save(state, Path(folder) / "training_state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(line, checkpoint=checkpoint, validation=validation)

    def restored(self) -> Course:
        """Take up the run's latest checkpoint, if it has one; how far the run is."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Course()
        model = unwrapped(self.learner.model)
        with checkpoint.as_directory() as folder:
            # Our own tensors and numbers; weights_only keeps it so even if someone else can write to the bucket.
            path = Path(folder) / "training_state.pt"
            state = torch.load(path, map_location=self.learner.device, weights_only=True)
            self.load(folder, model)
        if state["weights"] is not None:
            model.load_state_dict(state["weights"])
        self.learner.restore(state)
        return Course(**state["course"])


def validations_since_best(ranks: Sequence[tuple[float, ...]]) -> int:
    """How many validations ago the best one was, by their ranks; 0 if it is the last, or there is none."""
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0
