import pytest
import torch

from motor_ray.config import ModelSettings
from motor_ray.detector.model import build_model, standardise
from motor_ray.detector.reconstruction import (
    BACKBONE,
    build_reconstructor,
    hide,
    load_reconstructor,
    reconstruction_losses,
    save_reconstructor,
)

SMALL = ModelSettings(backbone="resnet18", pretrained="none", neck_channels=8, head_channels=8)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b3"])
@pytest.mark.parametrize("in_slices", [1, 3])
def test_an_image_comes_out_as_large_as_it_went_in_and_every_weight_is_taught(backbone, in_slices):
    """A weight without gradient would also stop workers that train together."""
    model = build_reconstructor(SMALL.model_copy(update={"backbone": backbone, "in_slices": in_slices}))
    said = model(torch.randn(2, in_slices, 80, 64))
    assert said.shape == (2, 1, 80, 64)
    said.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_under_the_mask_reaches_the_network():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 8:16, 8:16] = True
    shown = hide(images, mask)
    assert (shown[mask.expand_as(shown)] == 0).all()
    assert torch.equal(shown[..., 16:, :], standardise(images)[..., 16:, :])


def test_mean_grey_scores_one_and_the_truth_nothing():
    target = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    everywhere, nowhere = torch.ones(2, 1, 32, 32, dtype=torch.bool), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    grey = reconstruction_losses(torch.zeros(2, 1, 32, 32), target, nowhere, everywhere)
    assert float(grey["total"]) == pytest.approx(1)
    assert float(grey["masked"]) == 0
    assert float(reconstruction_losses(standardise(target), target, everywhere, everywhere)["total"]) == 0


def test_only_where_the_answer_counts_is_it_compared():
    target = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    counted = torch.rand(1, 1, 32, 32) > 0.5
    said = torch.where(counted, standardise(target), 100.0)
    assert float(reconstruction_losses(said, target, counted, counted)["total"]) == 0


def test_a_detector_starts_from_the_backbone_that_was_written(tmp_path):
    model = build_reconstructor(SMALL)
    with torch.no_grad():
        model.train()(torch.randn(2, 1, 64, 64))  # running statistics are part of it
    save_reconstructor(str(tmp_path), model)
    detector = build_model(SMALL.model_copy(update={"pretrained": str(tmp_path / BACKBONE)}))
    ours, theirs = detector.backbone.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    again = load_reconstructor(str(tmp_path), build_reconstructor(SMALL))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
