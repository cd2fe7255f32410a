"""A detector small enough for tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from motor_ray.config import ModelSettings
from motor_ray.detector.model import Detector, build_model


@pytest.fixture
def small_model() -> Callable[..., Detector]:
    """Build a small detector with random weights, and batch statistics that differ from channel to channel."""

    def build(backbone: str = "resnet18", **changes: Any) -> Detector:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"backbone": backbone, "pretrained": "none", "neck_channels": 16, "head_channels": 8}
        model = build_model(ModelSettings(**(settings | changes)))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        torch.nn.init.normal_(model.heads.heatmap.weight, std=0.3)
        return model.eval()

    return build
