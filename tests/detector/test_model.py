from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from motor_ray.config import ModelSettings
from motor_ray.detector.backbone import build_backbone
from motor_ray.detector.heads import Heads
from motor_ray.detector.model import Detector, build_model, standardise

SmallModel = Callable[..., Detector]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b3"])
def test_every_backbone_has_features_of_stride_4_8_16_and_32(name: str) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = build_backbone(name).eval()  # type: ignore[arg-type]
        features = backbone(torch.zeros(1, 3, 96, 64))
    for stride, channels, feature in zip((4, 8, 16, 32), backbone.channels, features, strict=True):
        assert feature.shape == (1, channels, 96 // stride, 64 // stride)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b3"])
def test_predictions_lie_on_cells_of_four_pixels(small_model: SmallModel, name: str) -> None:
    model = small_model(name)
    # 80 / 32 is not whole, as 720 / 32 is not.
    with torch.no_grad():
        prediction = model(torch.zeros(2, 1, 80, 128))
    assert [tuple(part.shape) for part in prediction] == [(2, 1, 20, 32), (2, 2, 20, 32), (2, 2, 20, 32), (2,)]


def test_a_grey_slice_is_three_equal_slices(small_model: SmallModel) -> None:
    grey, stacked = small_model(), small_model(in_slices=3)
    stacked.load_state_dict(grey.state_dict())
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), stacked(image.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 64, 64)])
def test_images_of_another_shape_are_refused(small_model: SmallModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(b, 1, H, W\), got shape"):
        small_model()(torch.zeros(shape))


def test_merged_heads_equal_three_separate_heads() -> None:
    heads = Heads(6, 4, box_cells=25.0)
    features = torch.randn(2, 6, 9, 7)
    assert isinstance(heads.shared, nn.Conv2d)
    separate = []
    for number, last in enumerate((heads.heatmap, heads.size, heads.offset)):
        first = nn.Conv2d(6, 4, 3, padding=1)
        first.weight.data = heads.shared.weight.data[4 * number : 4 * number + 4]
        assert first.bias is not None
        assert heads.shared.bias is not None
        first.bias.data = heads.shared.bias.data[4 * number : 4 * number + 4]
        separate.append(last(F.relu(first(features))))
    torch.testing.assert_close(heads(features), tuple(separate))


def test_an_untrained_network_gives_every_cell_a_tenth_and_every_box_the_usual_size() -> None:
    torch.manual_seed(0)
    settings = ModelSettings(backbone="resnet18", pretrained="none", neck_channels=16, head_channels=8)
    with torch.no_grad():
        prediction = build_model(settings).eval()(torch.randn(1, 1, 64, 64))
    assert prediction.heatmap.sigmoid().mean().item() == pytest.approx(0.1, abs=0.02)
    assert prediction.size.mean().item() == pytest.approx(25.0, abs=1.0)


def test_equal_seeds_give_equal_networks() -> None:
    settings = ModelSettings(backbone="resnet18", pretrained="none")
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build_model(settings).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_standardised_slices_have_mean_zero_and_deviation_one_each() -> None:
    frames = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    frames[1] //= 8
    images = standardise(frames)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.mean(dim=(2, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(2, 3), correction=0), torch.ones(2, 3))


@pytest.mark.parametrize("grey", [0, 137, 255])
def test_a_constant_slice_becomes_zeros_beside_one_that_is_not(grey: int) -> None:
    frames = torch.full((1, 2, 97, 91), grey, dtype=torch.uint8)
    frames[0, 1, 0, 0] = 100
    images = standardise(frames)
    assert (images[0, 0] == 0).all()
    assert images[0, 1].std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    assert images.isfinite().all()
