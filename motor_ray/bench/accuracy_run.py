"""One row of the accuracy benchmark with one seed, in a process of its own; or the speed of all that are done.

python -m motor_ray.bench.accuracy_run JOB.json

In WORK/rows/<sizes>/<row>-<seed>/ appear, step by step, each kept until what it depends on changes:

    best/, snapshots/ or a peer's weights, trained.json   train
    seen/calibration.parquet, test.parquet, looked.json   look at slices of whole tomograms
    calibration/, test/, result.json                      link, as finished runs, and score
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
from motor_ray.bench.accuracy_archives import JUDGING, Archive, archive
from motor_ray.bench.accuracy_job import Job, from_json, looking_of, models_of, parameters_of, said_with
from motor_ray.bench.accuracy_peers import PeerTrainee
from motor_ray.bench.accuracy_rows import LEARNED_BEFORE, PEERS
from motor_ray.bench.accuracy_scores import (
    ALARMS,
    alarms,
    average_precisions,
    learn_rescoring,
    link_run,
    look_over,
    scores_of,
)
from motor_ray.bench.accuracy_training import Data, Line, Ours, Trainee, data_of, fit
from motor_ray.bench.accuracy_unlabelled import pretrain_backbone, with_epochs, with_pseudo_labels
from motor_ray.bench.timing import machine, time_in_turn
from motor_ray.config import RunSettings
from motor_ray.detector.description import SNAPSHOTS
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.pseudo_steps import starting_from
from motor_ray.distributed.scoring import images_of
from motor_ray.distributed.soup import make_soup
from motor_ray.storage import read_json, read_table, write_json, write_table

RUNS = 30
"""Slices that are timed of each contestant, in turn."""


Step = Callable[[Job], dict[str, Any]]


def run_row(job: Job) -> None:
    """Train, look at whole tomograms, score: whatever of it is not done."""
    files = [job.folder / f"{name}.json" for name in ("trained", "looked", "result")]
    steps: list[Step] = [train_row, look_row, score_row]
    for place, (file, key, step) in enumerate(zip(files, job.keys, steps, strict=True)):
        if said_with(file, key):
            continue
        for later in files[place:]:
            later.unlink(missing_ok=True)  # what they speak of is being replaced
        started = time.process_time()
        said = step(job)
        write_json(str(file), {"key": key, **said, "cpu_seconds": round(time.process_time() - started, 1)})


def train_row(job: Job) -> dict[str, Any]:
    """See `learn`."""
    for left in ("best", SNAPSHOTS):  # of a run that broke off, or of other settings
        shutil.rmtree(job.folder / left, ignore_errors=True)
    train, validation = (archive(job.work, part, job.sizes) for part in ("train", "validation"))
    history, images = learn(job, train, validation)
    return {"images": images, "history": [slices_of(line) for line in history]}


def look_row(job: Job) -> dict[str, Any]:
    """Look at the tomograms that detectors are judged by, unless a row that it needs has done the same.

    Returns how large the detector is.
    """
    if job.seen_by is job:
        look = looking_of(job)
        for part in JUDGING:
            slabs = look_over(archive(job.work, part, job.sizes), look, job.settings)
            write_table(slabs, str(job.folder / "seen" / f"{part}.parquet"))
    return {"parameters": parameters_of(job)}


def score_row(job: Job) -> dict[str, Any]:
    """Link what was seen, and score; what result.json says."""
    calibration, test = (archive(job.work, part, job.sizes) for part in JUDGING)
    runs = [job.folder / part for part in JUDGING]
    seen = [read_table(str(job.seen_by.folder / "seen" / f"{part}.parquet")) for part in JUDGING]
    link_run(calibration, seen[0], job.settings, runs[0])
    rescore = learn_rescoring(runs[0], calibration, job.seed) if job.row.training == "rescored" else None
    link_run(test, seen[1], job.settings, runs[1], rescore)
    trained, looked = (read_json(str(job.folder / name)) for name in ("trained.json", "looked.json"))
    return {
        "row": job.name,
        "seed": job.seed,
        "simulated": True,
        "scores": scores_of(runs[0], runs[1], (calibration.labels, test.labels), job.sizes.unseen_spacings),
        "calibration": {**average_precisions(runs[0], calibration.labels), ALARMS: alarms(runs[0], calibration.labels)},
        "parameters": looked["parameters"],
        "training_images": trained["images"] + sum(need.done["training_images"] for need in job.needs),
        "history": trained["history"],
    }


def learn(job: Job, train: Archive, validation: Archive) -> tuple[list[Line], int]:
    """Make the row's models, if it has any of its own; what each validation said, and how many frames were learned."""
    settings = job.settings
    if job.row.training in LEARNED_BEFORE:
        return [], 0
    if job.row.training == "soup":
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
    """The needed row's model goes on with what it is sure of on unlabelled tomograms; returns as `learn`."""
    [teacher], settings = job.needs, job.settings
    unlabelled = archive(job.work, "unlabelled", job.sizes)
    found = job.folder / "unlabelled"
    link_run(unlabelled, look_over(unlabelled, looking_of(teacher), teacher.settings), teacher.settings, found)
    known = archive(job.work, "calibration", job.sizes), teacher.folder / "calibration"
    believed = with_pseudo_labels(train, unlabelled.manifest, found, known, settings)
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
    run_row(job)


if __name__ == "__main__":
    main(sys.argv[1])
