"""Networks at work: one, several, and in several views."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from motor_ray.config import LEVEL_STRIDES, Averaging, DetectSettings, ModelSettings, RunSettings
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.inference import Seen
from motor_ray.detector.looks import Look, Looker
from motor_ray.detector.model import Detector, Prediction, build_model
from motor_ray.errors import ConfigError

SETTINGS = DetectSettings(score_threshold=0.0, max_detections=5, mixed_precision=False, batch_frames=2)
SIZE = 64


@pytest.fixture
def saved(small_model: Callable[..., Detector], tmp_path: Path) -> Callable[..., str]:
    """A checkpoint of a small detector; each `seed` is another one."""

    def save(seed: int = 0, backbone: str = "resnet18", **changes: object) -> str:
        model = small_model(backbone, **changes)
        generator = torch.manual_seed(seed)
        for weights in (model.heads.heatmap.weight, model.heads.size.weight, model.heads.offset.weight):
            torch.nn.init.normal_(weights, std=0.3, generator=generator)
        names: dict[str, object] = {"backbone": backbone, "pretrained": "none", "neck_channels": 16, "head_channels": 8}
        settings = RunSettings(model=ModelSettings.model_validate(names | changes))
        save_checkpoint(tmp_path / f"{backbone}-{seed}", model, settings, {})
        return str(tmp_path / f"{backbone}-{seed}")

    return save


def pictures(channels: int = 1, count: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (count, channels, SIZE, SIZE), dtype=np.uint8)


def looker(model: object, **changes: object) -> Looker:
    settings = SETTINGS.model_copy(update=changes)
    return Looker(model, settings, threads=1, compiled="off")  # type: ignore[arg-type]


def assert_same(some: list[Look], others: list[Look], within: float = 0.0) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=within, atol=within)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=within, atol=within)
        np.testing.assert_allclose(one.presence, other.presence, rtol=within, atol=within)


@pytest.mark.parametrize("how", ["logit", "probability"])
def test_a_checkpoint_twice_sees_what_it_sees_alone(saved: Callable[..., str], how: Averaging) -> None:
    one = saved()
    assert_same(looker([one, one], ensemble=how)(pictures()), looker(one)(pictures()), within=1e-4)


def test_one_checkpoint_in_a_list_is_that_checkpoint_to_the_last_bit(saved: Callable[..., str]) -> None:
    one = saved()
    assert_same(looker([one])(pictures()), looker(one)(pictures()))


def test_different_backbones_answer_together_and_each_has_its_say(saved: Callable[..., str]) -> None:
    paths = [saved(1), saved(2, "efficientnet_b3")]
    frames = torch.tensor(pictures())
    together = looker(paths, ensemble="logit").see(frames, "off")[0]
    alone = [looker(path).see(frames, "off")[0] for path in paths]
    torch.testing.assert_close(together.heatmap, (alone[0].heatmap + alone[1].heatmap) / 2)
    assert not torch.allclose(alone[0].heatmap, alone[1].heatmap, atol=0.01)


def test_a_mirrored_frame_gives_mirrored_motors_with_fast_augmentation(saved: Callable[..., str]) -> None:
    """Untrained networks do not turn along; the mean over both views does, for both frames have the same two."""
    look = looker(saved(), tta="fast")
    for plain, mirrored in zip(look(pictures()), look(pictures()[..., ::-1].copy()), strict=True):
        np.testing.assert_allclose(plain.scores, mirrored.scores, rtol=1e-4)
        boxes = mirrored.boxes.copy()
        boxes[:, 1] = SIZE - 1 - boxes[:, 1]
        order = [np.argsort(100 * one[:, 0].round(2) + one[:, 1]) for one in (plain.boxes, boxes)]
        np.testing.assert_allclose(plain.boxes[order[0]], boxes[order[1]], atol=1e-2)


class TurnsAlong:
    """A network of several levels that says of a turned frame exactly what it says of the frame, turned."""

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def seen(self, frames: torch.Tensor) -> Seen:
        return Seen([self.level(frames.float(), stride) for stride in LEVEL_STRIDES[: self.levels]], frames[:, :0])

    def level(self, frames: torch.Tensor, stride: int) -> Prediction:
        grey = F.avg_pool2d(frames, stride)[:, :1]
        centre = torch.full_like(grey, 0.5).expand(-1, 2, -1, -1)
        # Coarse cells see the more, so that it is they who win.
        return Prediction(stride * (grey - 127) / 100, grey.expand(-1, 2, -1, -1), centre, frames[:, 0, 0, 0])


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_network_that_turns_along_says_the_same_with_augmentation(saved: Callable[..., str], levels: int) -> None:
    """Whatever its levels: views in which nothing is new change no score and no box."""
    look = looker(saved())
    look.networks = [TurnsAlong(levels)]  # type: ignore[list-item]
    frames = pictures()
    alone, views = look(frames, "off"), look(frames, "fast")
    assert_same(views, alone, within=1e-4)
    assert levels == 1 or max(one.scores[0] for one in alone) > 0.5


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_networks_that_agree_are_as_sure_together_as_each_alone(saved: Callable[..., str], levels: int) -> None:
    look = looker(saved())
    alone, together = TurnsAlong(levels), [TurnsAlong(levels), TurnsAlong(levels)]
    look.networks = [alone]  # type: ignore[list-item]
    one = look(pictures(), "fast")
    look.networks = together  # type: ignore[assignment]
    assert_same(look(pictures(), "fast"), one, within=1e-4)


def test_networks_with_different_levels_answer_together(saved: Callable[..., str]) -> None:
    look = looker([saved(1), saved(2, levels=2)])
    frames = torch.tensor(pictures())
    together = look.see(frames, "off")[0].heatmap.sigmoid()
    alone = [looker(saved(seed, levels=seed)).see(frames, "off")[0].heatmap.sigmoid() for seed in (1, 2)]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_frames_must_be_whole_cells_of_the_coarsest_level_to_be_mirrored(
    saved: Callable[..., str], levels: int
) -> None:
    edge = LEVEL_STRIDES[levels - 1]
    look = looker(saved(levels=levels), tta="fast")
    odd = np.zeros((1, 1, 64, 64 - edge // 2), np.uint8)
    with pytest.raises(ConfigError, match=f"multiples of {edge} pixels"):
        look(odd)


@pytest.mark.parametrize("in_slices", [1, 3])
def test_full_augmentation_looks_at_frames_with_clahe_switched(saved: Callable[..., str], in_slices: int) -> None:
    look = looker(saved(in_slices=in_slices), tta="full")
    both = pictures(2 * in_slices)
    seen = look.see(torch.tensor(both), "full")[0]
    same = look.see(torch.tensor(np.concatenate([both[:, :in_slices]] * 2, axis=1)), "full")[0]
    assert seen.heatmap.shape == (3, 1, SIZE // 4, SIZE // 4)
    assert not torch.allclose(seen.heatmap, same.heatmap)


def test_augmentation_may_be_asked_for_look_by_look(saved: Callable[..., str]) -> None:
    one = saved()
    assert_same(looker(one)(pictures(), "fast"), looker(one, tta="fast")(pictures()))
    assert_same(looker(one, tta="fast")(pictures(), "off"), looker(one)(pictures()))


@pytest.mark.parametrize("head", ["heatmap", "size", "offset"])
def test_an_answer_that_is_no_number_is_known_as_such(
    small_model: Callable[..., Detector], tmp_path: Path, head: str
) -> None:
    model, settings = small_model(), RunSettings(model=ModelSettings(backbone="resnet18", pretrained="none"))
    torch.nn.init.constant_(getattr(model.heads, head).weight, torch.nan)
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"neck_channels": 16, "head_channels": 8})}
    )
    save_checkpoint(tmp_path / "broken", model, settings, {})
    assert [look.is_sound for look in looker(str(tmp_path / "broken"))(pictures())] == [False] * 3


def test_all_of_an_ensemble_must_answer_with_numbers(saved: Callable[..., str], tmp_path: Path) -> None:
    settings = RunSettings(
        model=ModelSettings(backbone="resnet18", pretrained="none", neck_channels=8, head_channels=8)
    )
    model = build_model(settings.model)
    torch.nn.init.constant_(model.heads.heatmap.weight, torch.nan)
    save_checkpoint(tmp_path / "broken", model, settings, {})
    looks = looker([saved(), str(tmp_path / "broken")])(pictures())
    assert [look.is_sound for look in looks] == [False] * 3
    assert all(look.scores.size == 0 for look in looks)
