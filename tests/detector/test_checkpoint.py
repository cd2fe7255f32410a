import contextlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import motor_ray
from motor_ray import storage
from motor_ray.config import FrameSettings, ModelSettings, RunSettings
from motor_ray.detector import checkpoint
from motor_ray.detector.checkpoint import load_checkpoint, load_weights, save_checkpoint
from motor_ray.detector.description import CALIBRATION, Description, describe_checkpoint
from motor_ray.detector.model import Detector
from motor_ray.errors import CheckpointError, ConfigError, StorageError

SmallModel = Callable[..., Detector]

# A name that could not be fetched here: loading must not try.
MODEL = ModelSettings(backbone="resnet18", pretrained="imagenet", neck_channels=16, head_channels=8)
SETTINGS = RunSettings(model=MODEL, frame=FrameSettings(size=128))


@pytest.fixture
def saved(small_model: SmallModel, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "best", small_model(), SETTINGS, {"map_50": 0.5})
    return tmp_path / "best"


def edit(folder: Path, **changes: Any) -> None:
    """Change values of the description in `folder`; None removes one."""
    path = folder / "model.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b3"])
def test_a_loaded_model_predicts_bit_for_bit_what_the_saved_one_did(
    small_model: SmallModel, tmp_path: Path, backbone: str
) -> None:
    model = small_model(backbone)
    settings = SETTINGS.model_copy(update={"model": MODEL.model_copy(update={"backbone": backbone})})
    sha256 = save_checkpoint(tmp_path / "a", model, settings, {"map_50": 0.5, "epoch": 3})
    loaded = load_checkpoint(str(tmp_path / "a"))
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(image), model(image), strict=True))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert describe_checkpoint(tmp_path / "a") == Description(settings, {"map_50": 0.5, "epoch": 3}, sha256)


def test_equal_weights_have_equal_hashes(small_model: SmallModel, tmp_path: Path) -> None:
    first, again = (save_checkpoint(tmp_path / name, small_model(), SETTINGS, {}) for name in "ab")
    other = save_checkpoint(tmp_path / "c", small_model(head_channels=16), SETTINGS, {})
    assert first == again != other


def test_the_recipes_own_settings_survive(small_model: SmallModel, tmp_path: Path) -> None:
    settings = RunSettings(model=MODEL)
    save_checkpoint(tmp_path / "a", small_model(), settings, {})
    assert describe_checkpoint(tmp_path / "a").settings == settings


def test_loading_leaves_the_random_numbers_of_others_alone(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(saved)
    assert torch.equal(torch.rand(3), expected)


def test_weights_can_be_copied_into_a_model_that_exists(saved: Path, small_model: SmallModel) -> None:
    model = small_model().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(saved, model)
    expected = small_model().state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


def test_a_checkpoint_is_two_files_and_says_what_wrote_it(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["model.json", "model.safetensors"]
    assert os.listdir(saved.parent) == ["best"]
    description = json.loads((saved / "model.json").read_text())
    assert description["format_version"] == 1
    assert {"motor_ray", "git_commit"} <= description.keys()


def test_a_newer_checkpoint_replaces_the_older(saved: Path, small_model: SmallModel) -> None:
    save_checkpoint(saved, small_model(), SETTINGS, {"map_50": 0.75})
    assert describe_checkpoint(saved).metrics == {"map_50": 0.75}


@pytest.mark.parametrize(("step", "call"), [("_write", 1), ("os.rename", 1), ("os.rename", 2)])
def test_a_failure_while_writing_leaves_the_checkpoint_that_was_there(
    saved: Path, small_model: SmallModel, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    calls, rename = itertools.count(1), os.rename

    def fail(*places: Path) -> None:
        if next(calls) == call:
            raise OSError("No space left on device")
        rename(*places)

    with monkeypatch.context() as patch:
        patch.setattr(f"motor_ray.detector.checkpoint.{step}", fail)
        with pytest.raises(StorageError, match="cannot be written"):
            save_checkpoint(saved, small_model(), SETTINGS, {"map_50": 0.75})
    assert describe_checkpoint(saved).metrics == {"map_50": 0.5}
    assert os.listdir(saved.parent) == ["best"]


@pytest.mark.parametrize("requests", range(5))
def test_in_an_object_store_a_crash_after_any_request_leaves_a_good_checkpoint(
    small_model: SmallModel, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """Which is the one of before until the new one can be read."""
    uri, left = "memory://bucket/run/best", [requests]
    save_checkpoint(uri, small_model(head_channels=8), SETTINGS, {"map_50": 0.5})

    def crashes(function: Callable[..., None]) -> Callable[..., None]:
        def request(*arguments: Any) -> None:
            if not left[0]:
                raise StorageError("the plug was pulled")
            left[0] -= 1
            function(*arguments)

        return request

    with monkeypatch.context() as patch, contextlib.suppress(StorageError):
        for name in ("write_bytes", "remove"):
            patch.setattr(storage, name, crashes(getattr(storage, name)))
        save_checkpoint(uri, small_model(head_channels=16), SETTINGS, {"map_50": 0.75})
    assert describe_checkpoint(uri).metrics == {"map_50": 0.5 if requests < 2 else 0.75}
    save_checkpoint(uri, small_model(head_channels=24), SETTINGS, {"map_50": 0.9})
    assert describe_checkpoint(uri).metrics == {"map_50": 0.9}
    assert len(storage.list_names(uri)) == 2
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize("memory", [True, False])
def test_a_new_model_replaces_an_old_one_and_what_was_learned_of_it(
    tmp_path: Path, small_model: SmallModel, memory: bool
) -> None:
    uri = "memory://bucket/learned/best" if memory else str(tmp_path / "best")
    save_checkpoint(uri, small_model(), SETTINGS, {})
    storage.write_json(storage.join(uri, CALIBRATION), {"threshold": 0.2})
    load_checkpoint(uri)
    another = small_model()
    torch.nn.init.zeros_(another.heads.heatmap.weight)
    save_checkpoint(uri, another, SETTINGS, {})
    assert len(storage.list_names(uri)) == 2
    assert not storage.exists(storage.join(uri, CALIBRATION))
    load_checkpoint(uri)


def test_a_directory_with_other_things_is_not_replaced(tmp_path: Path, small_model: SmallModel) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(StorageError, match=r"holds thesis\.txt.*give a new directory"):
        save_checkpoint(tmp_path, small_model(), SETTINGS, {})
    with pytest.raises(StorageError, match="is a file, expected a directory"):
        save_checkpoint(tmp_path / "thesis.txt", small_model(), SETTINGS, {})
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read.*a checkpoint is a directory of"):
        load_checkpoint(saved)


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.json: cannot be read"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="has no format_version"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_format_version_is_refused(saved: Path, version: object) -> None:
    edit(saved, format_version=version, motor_ray="9.9.9")
    with pytest.raises(
        CheckpointError, match=rf"format version {version!r} \(written by motor_ray 9\.9\.9\).*version 1"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["sha256", "settings", "metrics"])
def test_an_incomplete_description_is_refused(saved: Path, name: str) -> None:
    edit(saved, **{name: None})
    with pytest.raises(CheckpointError, match=f"{name} missing or malformed"):
        load_checkpoint(saved)


def test_an_unknown_setting_is_refused(saved: Path) -> None:
    edit(saved, settings={"model": {"backbon": "resnet18"}})
    with pytest.raises(ConfigError, match=r"model\.json: model\.backbon: unknown setting; did you mean backbone"):
        load_checkpoint(saved)


def test_damaged_tensors_are_noticed(saved: Path) -> None:
    tensors = saved / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the tensors have sha256"):
        load_checkpoint(saved)


def test_tensors_of_another_network_are_refused(saved: Path, small_model: SmallModel) -> None:
    edit(saved, settings=RunSettings(model=MODEL.model_copy(update={"neck_channels": 24})).model_dump(mode="json"))
    with pytest.raises(CheckpointError, match=r"do not fit the network: neck\..* \(16, .* instead of \(24, .* more of"):
        load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"missing; .* unexpected"):
        load_weights(saved, small_model("efficientnet_b3"))


def test_the_commit_is_that_of_the_source_tree_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motor_ray, "__file__", str(tmp_path / "motor_ray" / "__init__.py"))
    assert checkpoint._git_commit() is None
    (tmp_path / ".git").mkdir()
    assert checkpoint._git_commit() is None
