from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision

from motor_ray.config import ModelSettings
from motor_ray.detector.model import Detector, build_model
from motor_ray.errors import CheckpointError

SmallModel = Callable[..., Detector]


def settings_with(pretrained: str | Path, backbone: str = "resnet18") -> ModelSettings:
    return ModelSettings.model_validate(
        {"backbone": backbone, "pretrained": str(pretrained), "neck_channels": 16, "head_channels": 8}
    )


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b3"])
def test_torchvisions_state_dict_fills_the_backbone(tmp_path: Path, backbone: str, suffix: str) -> None:
    whole = torchvision.models.get_model(backbone, weights=None).state_dict()
    path = save(whole, tmp_path / f"weights{suffix}")
    filled = build_model(settings_with(path, backbone)).backbone.state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in filled.items())


def test_a_detectors_tensors_fill_the_backbone_of_another(tmp_path: Path, small_model: SmallModel) -> None:
    detector = small_model()
    path = save(detector.state_dict(), tmp_path / "model.safetensors")
    filled = build_model(settings_with(path)).backbone.state_dict()
    assert all(torch.equal(detector.backbone.state_dict()[name], tensor) for name, tensor in filled.items())


def test_imagenet_means_torchvisions_weights_through_its_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: dict[str, torch.Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    asked: list[str] = []

    def fetch(url: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return whole

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    model = build_model(settings_with("imagenet"))
    assert asked == [torchvision.models.ResNet18_Weights.DEFAULT.url]
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], whole["conv1.weight"])


@pytest.mark.parametrize("error", [URLError("Name or service not known"), RuntimeError("invalid hash value")])
def test_without_network_one_sentence_says_how_to_give_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        build_model(settings_with("imagenet", "resnet101"))
    message = str(caught.value)
    assert "\n" not in message
    assert "Name or service not known" in message or "invalid hash value" in message
    assert "--model.pretrained FILE" in message
    assert "--model.pretrained none" in message
    url = torchvision.models.ResNet101_Weights.DEFAULT.url
    assert url in message
    assert str(tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]) in message


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    whole = torchvision.models.resnet18(weights=None).state_dict()
    del whole["bn1.weight"]
    whole["extra.weight"] = torch.zeros(1)
    whole["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(CheckpointError, match=r"as weights of resnet18: the tensors do not fit") as caught:
        build_model(settings_with(save(whole, tmp_path / "weights.pt")))
    assert "bn1.weight missing; extra.weight unexpected; conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in str(
        caught.value
    )


def test_a_long_list_of_missing_tensors_is_counted(tmp_path: Path) -> None:
    path = save({"something.else": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"conv1\.weight, bn1\.weight, bn1\.bias and \d+ more missing"):
        build_model(settings_with(path))


class Dangerous:
    """Unpickled without care, it makes the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Dangerous(tmp_path / "pwned")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="is damaged or not a file of tensors alone"):
        build_model(settings_with(tmp_path / "weights.pth"))
    assert not (tmp_path / "pwned").exists()


def test_a_training_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\) alone"):
        build_model(settings_with(tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_damaged_file_of_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match=f"{name}: is damaged or not a file of tensors"):
        build_model(settings_with(tmp_path / name))


def test_a_missing_file_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.pt: cannot be read.*give the path or URI of a state dict"):
        build_model(settings_with(tmp_path / "weights.pt"))


def test_a_misspelt_name_is_not_taken_for_a_file() -> None:
    with pytest.raises(CheckpointError, match=r"imagnet: weights come from a \.safetensors, \.pt or \.pth file"):
        build_model(settings_with("imagnet"))
