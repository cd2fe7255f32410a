"""Rows of the accuracy benchmark that learn from tomograms without labels: what `motor-ray pretrain` and
`motor-ray pseudo-label` do, in this process and without Ray.
"""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from motor_ray.archive.labels import with_guesses
from motor_ray.archive.manifest import join_manifests
from motor_ray.bench.accuracy_archives import Archive
from motor_ray.bench.accuracy_training import frames_of_plan, progress, steps_of
from motor_ray.config import RunSettings
from motor_ray.detector.reconstruction import BACKBONE, save_reconstructor
from motor_ray.distributed.optimisation import prepared
from motor_ray.distributed.pretrain_loop import Pictures, Restorer, puzzles_at, with_neighbours_seen
from motor_ray.distributed.pretraining import new_reconstructor, pretrain_plans
from motor_ray.distributed.pseudo_steps import Data, as_labels, chosen, sure_of
from motor_ray.distributed.samples import made_ahead
from motor_ray.errors import UnfinishedError
from motor_ray.tables import FAILURES


def with_epochs(settings: RunSettings, frames: int, samples: int) -> RunSettings:
    """`settings` whose epochs of so many samples show about so many frames, one epoch at least."""
    epochs = max(round(frames / samples), 1)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": epochs})})


def pretrain_backbone(
    work: Path, manifest: pa.Table, settings: RunSettings, frames: int, folder: Path
) -> tuple[str, int]:
    """Teach a backbone what slices look like, on about so many frames of the MANIFEST's tomograms.

    Returns the file of its weights, in `folder`, and how many frames it was shown. The last weights are kept: the
    learning rate has fallen to zero by then.
    """
    plan = pretrain_plans(manifest, settings)["train"]
    pictures = Pictures(plan, settings, frames_of_plan(work, plan, with_neighbours_seen(settings)))
    settings = with_epochs(settings, frames, len(pictures))
    learner = Restorer(prepared(new_reconstructor(settings), settings.train), settings, torch.device("cpu"))
    for epoch in range(settings.train.epochs):
        groups = list(steps_of(pictures, settings, epoch))
        coming = made_ahead(partial(puzzles_at, pictures, settings, epoch), groups, threads=1)
        for done, batch in enumerate(coming):
            learner.step([batch], progress(epoch, done, len(groups), settings))
    save_reconstructor(str(folder), learner.kept)
    return str(folder / BACKBONE), settings.train.epochs * len(pictures)


def with_pseudo_labels(
    labelled: Archive, unlabelled: pa.Table, found: Path, known: tuple[Archive, Path], settings: RunSettings
) -> Archive:
    """`labelled` and those of the `unlabelled` tomograms (a MANIFEST) of which a model is sure.

    `found` is a finished run of the model on them; `known` are others, whose labels say from which scores on it may
    be, and its run on these. Raises UnfinishedError if it is sure of no motor.
    """
    nothing = FAILURES.empty_table()
    data = Data(str(found), labelled.manifest, labelled.labels, unlabelled, nothing, settings, (1, 1))
    others, looked = known
    choice = chosen(data, str(found), sure_of(data._replace(labels=others.labels), str(looked)))
    if not choice.with_motor:
        raise UnfinishedError(f"{found}: the model is sure of no motor, so there is nothing that it could teach")
    believed = pc.is_in(unlabelled["tomo_id"], pa.array([*choice.with_motor, *choice.negatives]))
    guesses = as_labels(choice, unlabelled, settings)
    manifest = join_manifests(labelled.manifest, unlabelled.filter(believed))
    return Archive(manifest, with_guesses(labelled.labels, guesses))
