"""One row of the accuracy benchmark with one seed, in a process of its own; or the speed of all that are done.

python -m motor_ray.bench.accuracy_run JOB.json

In WORK/rows/<sizes>/<row>-<seed>/ appear best/ or a peer's weights, validation/ and test/, which are finished runs, and
result.json, last.
"""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from motor_ray.archive.plan import slab_of
from motor_ray.bench.accuracy_archives import Archive, archive
from motor_ray.bench.accuracy_job import Job, from_json, looking_of, models_of, parameters_of
from motor_ray.bench.accuracy_peers import PeerTrainee
from motor_ray.bench.accuracy_rows import PEERS, key_of
from motor_ray.bench.accuracy_scores import average_precisions, learn_rescoring, look_over, scores_of
from motor_ray.bench.accuracy_training import Data, Line, Ours, Trainee, data_of, fit
from motor_ray.bench.accuracy_unlabelled import pretrain_backbone, with_epochs, with_pseudo_labels
from motor_ray.bench.timing import machine, time_in_turn
from motor_ray.config import RunSettings
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.pseudo_steps import starting_from
from motor_ray.distributed.scoring import images_of
from motor_ray.distributed.soup import make_soup
from motor_ray.storage import read_json, write_json

RUNS = 30
"""Slices that are timed of each contestant, in turn."""


def run_row(job: Job) -> dict[str, Any]:
    """Train, look at all slices of validation and test, score; what result.json says."""
    started, settings = time.process_time(), job.settings
    train, validation, test = (archive(job.work, part, job.sizes) for part in ("train", "validation", "test"))
    history, images = train_row(job, train, validation)
    trained = time.process_time()
    look, runs = looking_of(job), (job.folder / "validation", job.folder / "test")
    look_over(validation, look, settings, runs[0])
    rescore = learn_rescoring(runs[0], validation, job.seed) if job.row.training == "rescored" else None
    look_over(test, look, settings, runs[1], rescore)
    return {
        "key": key_of(job.name, job.seed, job.sizes),
        "row": job.name,
        "seed": job.seed,
        "simulated": True,
        "scores": scores_of(*runs, (validation.labels, test.labels), job.sizes.unseen_spacings),
        "validation": average_precisions(runs[0], validation.labels),
        "parameters": parameters_of(job),
        "training_images": images + sum(need.done["training_images"] for need in job.needs),
        "train_cpu_seconds": round(trained - started, 1),
        "look_cpu_seconds": round(time.process_time() - trained, 1),
        "history": [slices_of(line) for line in history],
    }


def train_row(job: Job, train: Archive, validation: Archive) -> tuple[list[Line], int]:
    """Make the row's models, if it has any of its own; what each validation said, and how many frames were learned."""
    settings = job.settings
    if job.row.training in ("none", "rescored"):
        return [], 0
    if job.row.training == "soup":
        shutil.rmtree(job.folder / "best", ignore_errors=True)  # of a run that broke off
        make_soup(models_of(job.needs[0]), str(job.folder / "best"), train.manifest, settings.archive)
        return [], 0
    if job.row.training == "pseudo":
        return train_on_pseudo_labels(job, train, validation)
    data, before = data_of(job.work, train, validation, settings), 0
    if job.row.training == "pretrained":
        unlabelled = archive(job.work, "unlabelled", job.sizes).manifest
        weights, before = pretrain_backbone(job.work, unlabelled, settings, frames_shown(data, settings), job.folder)
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"pretrained": weights})})
    return fit(trainee_of(job, data, settings), settings), before + frames_shown(data, settings)


def train_on_pseudo_labels(job: Job, train: Archive, validation: Archive) -> tuple[list[Line], int]:
    """The needed row's model goes on with what it is sure of on unlabelled tomograms; returns as `train_row`."""
    [teacher], settings = job.needs, job.settings
    unlabelled = archive(job.work, "unlabelled", job.sizes)
    found = job.folder / "unlabelled"
    look_over(unlabelled, looking_of(teacher), teacher.settings, found)
    looked = teacher.folder / "validation"
    believed = with_pseudo_labels(train, unlabelled.manifest, found, (validation, looked), settings)
    frames = frames_shown(data_of(job.work, train, validation, settings), settings)
    data = data_of(job.work, believed, validation, settings)
    settings = with_epochs(starting_from(settings, models_of(teacher)[0]), frames, len(data.train))
    return fit(trainee_of(job, data, settings), settings), frames_shown(data, settings)


def frames_shown(data: Data, settings: RunSettings) -> int:
    """How many frames a training is shown."""
    return len(data.train) * settings.train.epochs


def slices_of(line: dict[str, Any]) -> dict[str, Any]:
    """What matters of a validation on slices."""
    return {name: line[name] for name in ("epoch", "mAP@0.5", "mAP@0.7", "mAP@0.9")}


def trainee_of(job: Job, data: Data, settings: RunSettings) -> Trainee:
    """The detector that the row trains."""
    if job.row.training in PEERS:
        return PeerTrainee(job.row.training, settings, data, job.folder)
    return Ours(settings, data, job.folder)


def measure_speed(jobs: Sequence[Job]) -> dict[str, Any]:
    """Milliseconds per slice of the trained detectors of `jobs`, on one thread, in turn.

    Each computes as it did when it was scored.
    """
    calls: dict[str, Callable[[], object]] = {}
    for job in jobs:
        image, look = test_image(job), looking_of(job)
        calls[job.name] = lambda look=look, image=image: look(image)  # type: ignore[misc]
    milliseconds = {name: round(1000 * seconds, 3) for name, seconds in time_in_turn(calls, RUNS).items()}
    return {"milliseconds": milliseconds, "machine": machine(torch.device("cpu"))}


def test_image(job: Job) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The middle slice of the first test tomogram as the row's detector takes it, ``(1, channels, size, size)``."""
    tomogram = archive(job.work, "test", job.sizes).manifest.to_pylist()[0]
    load = LoadSlab(job.settings, contrasts=job.settings.detect.contrasts)
    row = load.load(slab_of(tomogram, [tomogram["size_z"] // 2]))
    return images_of(row, row["frames"], 1, job.settings)


def main(path: str) -> None:
    """Do what the file `path` says, and write what came of it where it says."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    said = read_json(path)
    jobs = from_json(said)
    if said["what"] == "speed":
        write_json(said["out"], measure_speed(jobs))
        return
    [job] = jobs
    write_json(str(job.folder / "result.json"), run_row(job))


if __name__ == "__main__":
    main(sys.argv[1])
