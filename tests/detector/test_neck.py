from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from motor_ray.config import LEVEL_STRIDES, Backbone, ModelSettings
from motor_ray.detector.model import Detector, build_model

SmallModel = Callable[..., Detector]

SHAPE = (112, 80)  # of which 32 is no divisor, as it is none of 720

NETWORKS = [("pyramid", 1), ("pyramid", 2), ("pyramid", 3), ("light", 1), ("light", 2), ("light", 3)]
NETWORKS += [("deconvolution", 1)]


def on_meta(backbone: str, **changes: Any) -> Detector:
    """A network without numbers, of which only shapes can be asked."""
    settings = {"backbone": backbone, "pretrained": "none", **changes}
    with torch.device("meta"):
        return build_model(ModelSettings.model_validate(settings))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["none", "cbam"])
@pytest.mark.parametrize(("neck", "levels"), NETWORKS)
@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_every_network_says_of_every_cell_of_every_level_what_it_is(
    backbone: str, neck: str, levels: int, attention: str
) -> None:
    model = on_meta(backbone, neck=neck, levels=levels, attention=attention)
    images = torch.empty(2, 1, *SHAPE, device="meta")
    height, width = (edge // 4 for edge in SHAPE)
    told = [tuple(part.shape) for part in model.eval()(images)]
    assert told == [(2, 1, height, width), (2, 2, height, width), (2, 2, height, width), (2,)]
    cells = sum((SHAPE[0] // stride) * (SHAPE[1] // stride) for stride in LEVEL_STRIDES[:levels])
    apart = [tuple(part.shape) for part in model.train()(images)]
    if levels > 1:
        assert apart == [(2, 1, 1, cells), (2, 2, 1, cells), (2, 2, 1, cells), (2,)]
    else:
        assert apart == told


def test_levels_share_their_heads_and_attention_is_small() -> None:
    usual = parameters(on_meta("resnet50"))
    assert parameters(on_meta("resnet50", levels=2)) == usual
    assert parameters(on_meta("resnet50", levels=3)) - usual == 256 * 256 * 9 + 256
    assert 0 < parameters(on_meta("resnet50", attention="cbam")) - usual < 0.002 * usual


def test_a_light_neck_and_its_heads_have_a_tenth_of_the_parameters() -> None:
    def own(neck: str) -> int:
        model = on_meta("resnet18", neck=neck)
        return parameters(model.neck) + parameters(model.heads)

    assert own("light") < own("pyramid") / 10


def test_the_parameters_of_the_default_network_keep_their_names() -> None:
    names = {name for name in on_meta("resnet18").state_dict() if not name.startswith("backbone.")}
    layers = [*(f"neck.{layer}" for layer in ("lateral2", "lateral3", "lateral4", "merge2", "merge3"))]
    layers += [*(f"heads.{layer}" for layer in ("shared", "heatmap", "size", "offset")), "presence.linear"]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_a_deconvolution_looks_at_the_coarsest_features_alone(small_model: SmallModel) -> None:
    model = small_model(neck="deconvolution")
    features = model.backbone(torch.randn(1, 3, 96, 64))
    blank = features._replace(**{name: torch.zeros_like(getattr(features, name)) for name in ("c2", "c3", "c4")})
    with torch.no_grad():
        assert torch.equal(model.neck(features)[0], model.neck(blank)[0])
        assert model.neck(features)[0].shape == (1, 4, 24, 16)  # a quarter of 16 channels


@pytest.mark.parametrize("neck", ["pyramid", "light", "deconvolution"])
def test_a_network_sees_where_things_are(small_model: SmallModel, neck: str) -> None:
    """What is said of a place changes most where the picture changed, also where edges were rounded on the way."""
    model = small_model(neck=neck)
    image = torch.zeros(1, 1, 144, 144)  # 4.5 cells of C5
    changed = image.clone()
    changed[..., 100:116, 100:116] = 3.0
    with torch.no_grad():
        difference = (model(changed).size - model(image).size).abs().sum(dim=1)[0]
    weights = difference / difference.sum()
    centre = [(weights.sum(dim=1 - axis) * torch.arange(36)).sum().item() for axis in (0, 1)]
    assert centre == pytest.approx([26.5, 26.5], abs=4)
