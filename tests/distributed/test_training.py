"""Training on a real Ray, on one worker and on two; the optimisation itself is tested without."""

import json
import math
from pathlib import Path

import pytest
import torch

from motor_ray import storage
from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.description import describe_checkpoint
from motor_ray.distributed.cluster import root_cause
from motor_ray.distributed.loop import validations_since_best
from motor_ray.distributed.training import compare_tomograms, plan_part, run_at, train
from motor_ray.distributed.training_loop import rank_of
from motor_ray.errors import CheckpointError, LabelsError, RunError, StorageError, UnfinishedError


@pytest.fixture
def manifest(archive, settings):
    return make_manifest(archive.uri, settings.archive)


def quality(*values):
    return [{"mAP@0.5": value, "mAP@0.7": None, "mAP@0.9": None} for value in values]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("workers", "slices_per_motor"), [(1, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_a_run_leaves_checkpoints_that_detect_reads_and_a_line_per_epoch(
    manifest, archive, settings, tmp_path, workers, slices_per_motor
):
    """With three workers there are fewer validation slices than workers, and still each is judged exactly once."""
    few = {"slices_per_motor": slices_per_motor, "negatives_per_positive": 0 if workers == 3 else 1}
    settings = settings_from(settings.model_dump() | {"train": settings.train.model_dump() | few})
    run = train(manifest, archive.labels, settings, str(tmp_path), "run", workers=(workers, workers), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert workers == 1 or run["slices"]["validation"] < workers
    assert all(line["n_slices"] == run["slices"]["validation"] for line in lines)
    assert all(line["loss_total"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert run["unread"] == 0
    best, last = (describe_checkpoint(tmp_path / "run" / name) for name in ("best", "last"))
    assert best.settings == settings
    assert best.metrics == run["best"]
    assert last.metrics == lines[-1]
    start, trained = (load_checkpoint(tmp_path / "run" / name).state_dict() for name in ("start", "last"))
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert any((tensor != trained[name]).any() for name, tensor in start.items())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_run_is_not_overwritten_and_goes_on_where_it_stopped(manifest, archive, settings, tmp_path):
    def run(epochs: int, *, resume: bool):
        some = settings_from(settings.model_dump() | {"train": settings.train.model_dump() | {"epochs": epochs}})
        return train(manifest, archive.labels, some, str(tmp_path), "run", workers=(1, 1), resume=resume)

    with pytest.raises(RunError, match="there is no run to resume"):
        run(2, resume=True)
    first = run(2, resume=False)
    with pytest.raises(RunError, match="a run of this name is there; give another --name, or --resume"):
        run(2, resume=False)
    with pytest.raises(RunError, match=r"was started with other settings: train\.epochs was 2, is 3; resume"):
        run(3, resume=True)
    assert run(2, resume=True) == first
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_slices_that_cannot_be_read_do_not_stop_training_and_are_listed(archive, settings, tmp_path):
    copy = tmp_path / "archive"
    for tomogram in Path(archive.uri).iterdir():
        (copy / tomogram.name).mkdir(parents=True)
        for path in tomogram.iterdir():
            (copy / tomogram.name / path.name).write_bytes(path.read_bytes()[: 300 if "0010" in path.name else None])
    manifest = make_manifest(str(copy), settings.archive)
    run = train(manifest, archive.labels, settings, str(tmp_path), "run", workers=(2, 2), resume=False)
    failures = storage.read_table(str(tmp_path / "run" / "failures.parquet")).to_pylist()
    assert run["unread"] == len(failures) > 0
    assert {row["z"] for row in failures} == {10}
    assert run["epochs"] == settings.train.epochs


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_fails_says_why_in_one_sentence(manifest, archive, settings, tmp_path):
    wild = settings_from(settings.model_dump() | {"train": settings.train.model_dump() | {"learning_rate": 1e30}})
    with pytest.raises(UnfinishedError, match=r"stopped: the loss of step \d is not finite, on slices tomo_\w+/"):
        train(manifest, archive.labels, wild, str(tmp_path), "run", workers=(1, 1), resume=False)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_cycles_leave_snapshots_and_a_run_may_start_from_another(manifest, archive, settings, checkpoint, tmp_path):
    """With averaged weights, several batches a step, frozen statistics and more validations than epochs."""
    asked = {
        "schedule": "cyclic",
        "cycles": 2,
        "start_from": checkpoint,
        "batch_norm": "frozen",
        "ema_decay": 0.5,
        "accumulate": 2,
        "validate_steps": 4,
        "tomograms": "end",
    }
    some = settings_from(settings.model_dump() | {"train": settings.train.model_dump() | asked})
    run = train(manifest, archive.labels, some, str(tmp_path), "run", workers=(1, 1), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    per_epoch = math.ceil(run["slices"]["train"] / 8)
    assert [line["step"] for line in lines] == [
        *range(4, per_epoch, 4),
        per_epoch,
        *range(8, 2 * per_epoch, 4),
        2 * per_epoch,
    ]
    start, first, second = (
        load_checkpoint(tmp_path / "run" / name).state_dict()
        for name in ("start", "snapshots/cycle_01", "snapshots/cycle_02")
    )
    given = load_checkpoint(checkpoint).state_dict()
    assert all((start[name] == given[name]).all() for name in given)
    assert any((first[name] != second[name]).any() for name in first)
    assert describe_checkpoint(tmp_path / "run" / "snapshots" / "cycle_02").metrics == lines[-1]
    assert run["validation"]["tomograms"]["n_tomograms"] == 1
    assert (tmp_path / "run" / "validation.png").exists()
    assert (tmp_path / "run" / "curve.png").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_storage_that_cannot_be_written_is_noticed_before_the_first_epoch(manifest, archive, settings, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be"):
        train(manifest, archive.labels, settings, str(tmp_path / "file"), "run", workers=(1, 1), resume=False)


def test_labels_of_tomograms_that_are_not_there_are_told(manifest, archive, caplog):
    counts = compare_tomograms(manifest.slice(2), archive.labels)
    assert counts == {"labelled": 10, "without_labels": 0, "labelled_but_not_there": 2}
    [warning] = caplog.messages
    assert warning.startswith("of 12 tomograms that are labelled, 2 are not in the archive, such as tomo_")


def test_weights_that_cannot_be_had_stop_a_run_before_it_starts(manifest, archive, settings, tmp_path):
    absent = settings_from(settings.model_dump() | {"model": {"backbone": "resnet18", "pretrained": "/no/weights.pt"}})
    with pytest.raises(CheckpointError, match=r"/no/weights\.pt"):
        train(manifest, archive.labels, absent, str(tmp_path), "run", workers=(1, 1), resume=False)
    assert not (tmp_path / "run").exists()


def test_an_archive_without_motors_is_refused_before_anything_starts(manifest, archive, settings, tmp_path):
    nothing = Labels(archive.labels.tomograms, archive.labels.motors.iloc[:0])
    with pytest.raises(LabelsError, match="no motor is labelled in the train part"):
        train(manifest, nothing, settings, str(tmp_path), "run", workers=(1, 1), resume=False)
    assert not (tmp_path / "run").exists()


def test_a_part_without_motors_is_named_with_its_size(manifest, archive, settings):
    with pytest.raises(LabelsError, match=r"validation part of the archive \(0 of 12 tomograms\)"):
        plan_part(manifest, archive.labels, settings, [], "validation")


def test_a_run_may_start_where_there_is_none(tmp_path):
    assert run_at(str(tmp_path / "run"), {"settings": {}, "samples_hash": ""}, resume=False) == {}


def test_epochs_are_counted_since_the_best_and_equal_ones_do_not_count_as_better():
    assert validations_since_best([rank_of(line) for line in quality(0.1, 0.5, 0.5)]) == 1
    assert validations_since_best([rank_of(line) for line in quality(0.1, 0.5, 0.6)]) == 0
    assert validations_since_best([rank_of(line) for line in quality(None, None)]) == 1
    assert rank_of({"mAP@0.5": 0.5, "mAP@0.7": 0.4, "mAP@0.9": None}) > rank_of(quality(0.5)[0])


def test_the_innermost_reason_of_a_failure_is_told_in_one_line():
    outer = RuntimeError("worker died")
    outer.__cause__ = ValueError("the\n disk is full")
    assert root_cause(outer) == "the disk is full"
