from collections.abc import Callable
from typing import Any

import pytest
import torch

from motor_ray.detector.attention import CBAM
from motor_ray.detector.model import Detector

SmallModel = Callable[..., Detector]


def trained(channels: int) -> CBAM:
    """Attention whose gates are not all open."""
    torch.manual_seed(0)
    module = CBAM(channels)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("changes", [{}, {"levels": 3}, {"neck": "light"}, {"neck": "deconvolution"}])
def test_a_network_with_untrained_attention_is_the_one_without(
    small_model: SmallModel, changes: dict[str, Any]
) -> None:
    plain, attentive = small_model(**changes), small_model(attention="cbam", **changes)
    missing, unexpected = attentive.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    assert all("attend" in name or "attention" in name for name in missing)
    images = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        for said, expected in zip(attentive(images), plain(images), strict=True):
            assert torch.equal(said, expected)


def test_untrained_attention_learns_from_the_first_step_on() -> None:
    module = CBAM(32)
    module(torch.randn(2, 32, 9, 9)).square().sum().backward()
    for last in (module.excite, module.spatial):
        assert last.weight.grad is not None
        assert last.weight.grad.abs().max() > 0


def test_attention_is_a_gate_for_each_channel_and_each_place_between_zero_and_two() -> None:
    module, features = trained(32), torch.randn(2, 32, 9, 7).exp()
    gates = module(features) / features
    assert 0 < gates.min() < 0.9
    assert 1.1 < gates.max() < 4
    # the gates of a map are the product of one vector and one picture
    for own in gates.flatten(2):
        assert torch.linalg.matrix_rank(own, rtol=1e-3) == 1


def test_attention_of_moved_features_is_moved_attention() -> None:
    module, features = trained(16), torch.zeros(1, 16, 30, 30)
    features[..., 8:12, 8:12] = torch.randn(1, 16, 4, 4)
    moved = features.roll((7, 5), dims=(2, 3))
    torch.testing.assert_close(module(moved), module(features).roll((7, 5), dims=(2, 3)))
