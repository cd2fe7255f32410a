"""The epochs of a detector: batches of labelled slices, and how it does on those that were held out."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import ray.train
import torch
from torch import nn

from motor_ray.detector.checkpoint import load_checkpoint, load_weights, save_checkpoint
from motor_ray.detector.model import Detector
from motor_ray.distributed.collectives import AgreedError, gathered, share_buffers
from motor_ray.distributed.learner import Learner, unwrap
from motor_ray.distributed.loop import BATCH_THREADS, Loop
from motor_ray.distributed.samples import Batch, Samples, batches
from motor_ray.motors.slice_metrics import slice_scores
from motor_ray.storage import join

SCORES = ("mAP@0.5", "mAP@0.7", "mAP@0.9")
"""The validation metrics by which epochs are compared; the later ones break ties."""


class TrainingLoop(Loop[Batch]):
    """One worker's part of the training of a detector."""

    goal = SCORES[0]

    learner: Learner
    samples: Samples
    held_out: Samples

    def start(self) -> Detector:
        """The network that the run starts with."""
        return load_checkpoint(join(self.run_uri, "start"))

    def optimisation(self, model: nn.Module, device: torch.device) -> Learner:
        """What teaches `model`, which may be wrapped for several workers."""
        return Learner(model, self.settings, device, self.workers)

    def batches(self, groups: Sequence[Sequence[int]]) -> Generator[Batch, None, None]:
        """A batch of augmented slices for each group of their places."""
        return batches(self.samples, groups, self.settings, self.course.epoch, BATCH_THREADS)

    def scores(self) -> dict[str, Any]:
        """Average precision, precision and recall on all held-out slices; the same for every worker."""
        share_buffers(self.learner.kept)
        own = range(self.rank, len(self.held_out), self.workers)
        judged = sorted(gathered(self.learner.judge(self.held_out, own)), key=lambda one: one.slice_id)
        if not judged:
            raise AgreedError(f"none of the {len(self.held_out)} validation slices can be read")
        found, truth = [(one.boxes, one.scores) for one in judged], [one.truth for one in judged]
        return slice_scores(found, truth, self.settings.detect.score_threshold)

    def rank_of(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """By what a validation is compared with others; higher is better."""
        return rank_of(metrics)

    def save(self, uri: str, metrics: Mapping[str, Any]) -> None:
        """Write the detector that is kept as a checkpoint."""
        save_checkpoint(uri, self.learner.kept, self.settings, metrics)

    def load(self, folder: str, model: nn.Module) -> None:
        """Copy a checkpoint's tensors into `model`."""
        load_weights(folder, unwrap(model))

    def looks_at_tomograms(self, ended: bool) -> "bool | ray.train.ValidationTaskConfig":
        """What Ray Train is to do with the checkpoint, beside the training that goes on."""
        train, epoch = self.settings.train, self.course.epoch
        if not ended or train.tomograms != "during" or epoch % train.tomograms_epochs:
            return False
        return ray.train.ValidationTaskConfig(fn_kwargs={"run_uri": self.run_uri, "epoch": epoch})


def rank_of(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """By what a validation is compared with others; higher is better, and what is not defined counts as 0."""
    return tuple(metrics[name] or 0.0 for name in SCORES)
