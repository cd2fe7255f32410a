"""Which checkpoints `--model` names, and whether they can answer together."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motor_ray.cli import parse
from motor_ray.config_values import settings_from
from motor_ray.detector.description import (
    DESCRIPTION,
    FORMAT_VERSION,
    TENSORS,
    describe_checkpoint,
    describe_models,
    find_checkpoints,
)
from motor_ray.errors import CheckpointError
from motor_ray.storage import join, write_bytes, write_json

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """A checkpoint of that name, without a network, whose run had these settings."""

    def save_one(name: str, folder: str = "", **groups: dict[str, Any]) -> str:
        uri = f"{folder or tmp_path}/{name}"
        description = {
            "format_version": FORMAT_VERSION,
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "settings": settings_from(groups).model_dump(mode="json"),
            "metrics": {"epoch": 1},
            "tensors": TENSORS,
        }
        write_bytes(join(uri, TENSORS), name.encode())
        write_json(join(uri, DESCRIPTION), description)
        return uri

    return save_one


def test_one_checkpoint_goes_by_its_own_hash_and_several_by_that_of_theirs_in_their_order(save: Save) -> None:
    a, b = save("a"), save("b", model={"backbone": "efficientnet_b3"})
    hashes = [describe_checkpoint(uri).sha256 for uri in (a, b)]
    assert describe_models(a).sha256 == describe_models([a]).sha256 == hashes[0]
    assert describe_models([a, b]).sha256 == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert describe_models([b, a]).sha256 != describe_models([a, b]).sha256
    assert describe_models([a, b]).told() == [
        {"model": a, "sha256": hashes[0], "backbone": "resnet101"},
        {"model": b, "sha256": hashes[1], "backbone": "efficientnet_b3"},
    ]


def test_only_one_alone_has_what_training_measured(save: Save) -> None:
    a, b = save("a"), save("b")
    assert describe_models(a).metrics == {"epoch": 1}
    assert describe_models([a, b]).metrics == {}


@pytest.mark.parametrize(
    ("group", "changed", "told"),
    [
        ("frame", {"size": 512}, "frame.size 512, but .*/a with 720"),
        ("frame", {"mode": "spacing"}, "frame.mode spacing, but .*/a with fit"),
        ("preprocess", {"clahe": False}, "preprocess.clahe False, but .*/a with True"),
        ("preprocess", {"clip_percentiles": (1, 99)}, "preprocess.clip_percentiles .*1.0, 99.0.*, but .*/a with"),
        ("model", {"in_slices": 3}, "model.in_slices 3, but .*/a with 1"),
        ("targets", {"box_pixels": 80}, "targets.box_pixels 80.0, but .*/a with 100.0"),
        ("targets", {"reach_angstrom": 30}, "targets.reach_angstrom 30.0, but .*/a with 60.0"),
    ],
)
def test_models_that_see_other_frames_or_mean_other_boxes_are_refused(
    save: Save, group: str, changed: dict[str, Any], told: str
) -> None:
    a, b = save("a"), save("b", **{group: changed})
    with pytest.raises(
        CheckpointError, match=f"{b}: was trained with {told}.*leave one out, or train it with --"
    ) as why:
        describe_models([a, a, b])
    hint = str(why.value).rpartition("train it with ")[2]
    needed = ["--archive", "a", "--labels", "b", "--storage", "c", "--name", "d"]
    parse(["train", *needed, *hint.split()])  # it can be typed


def test_how_models_were_trained_may_differ(save: Save) -> None:
    a = save("a")
    b = save("b", train={"epochs": 3}, targets={"sigma": 3.0}, augment={"flips": True}, model={"slice_step": 4})
    assert len(describe_models([a, b]).members) == 2


def test_a_step_between_slices_matters_only_to_models_that_see_several(save: Save) -> None:
    a, b = (save(name, model={"in_slices": 3, "slice_step": step}) for name, step in (("a", 1), ("b", 4)))
    with pytest.raises(CheckpointError, match=r"model\.slice_step 4, but .* --model.slice-step 1"):
        describe_models([a, b])


@pytest.mark.parametrize("folder", ["", "memory://bucket/other"])
def test_a_folder_called_snapshots_stands_for_the_checkpoints_in_it(save: Save, tmp_path: Path, folder: str) -> None:
    folder = folder or str(tmp_path)
    snapshots = [save(f"snapshots/cycle_{number:02d}", folder) for number in (2, 1, 3)]
    best = save("best", folder)
    assert find_checkpoints([best, f"{folder}/snapshots/"]) == [best, *sorted(snapshots)]
    assert describe_models(f"{folder}/snapshots").sha256 == describe_models(sorted(snapshots)).sha256


def test_a_checkpoint_may_be_called_snapshots_itself(save: Save) -> None:
    assert find_checkpoints(uri := save("snapshots")) == [uri]


def test_a_run_that_kept_no_snapshots_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "empty").mkdir(parents=True)
    for uri in (f"{tmp_path}/snapshots", f"{tmp_path}/nowhere/snapshots"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoints; .* --train\.schedule cyclic"):
            find_checkpoints(uri)
    with pytest.raises(CheckpointError, match="give --model one or several"):
        find_checkpoints([])
