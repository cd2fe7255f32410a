"""Feature extractors: an image in, feature maps of stride 4, 8, 16 and 32 out.

They are torchvision's networks cut after their last stage, under torchvision's own parameter names. Where
their weights come from is not known here.
"""

from typing import NamedTuple

import torch
import torchvision
from torch import nn

from motor_ray.config import Backbone


class Features(NamedTuple):
    """Feature maps `(b, channels, H / stride, W / stride)`, finest first; a remainder rounds up."""

    c2: torch.Tensor
    c3: torch.Tensor
    c4: torch.Tensor
    c5: torch.Tensor


class ResNet(nn.Module):
    """A torchvision ResNet, truncated after ``layer4``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        # Blocks that start as the identity (Goyal et al. 2017, arXiv 1706.02677). Otherwise an untrained ResNet-101
        # amplifies rounding: bfloat16 changed its C4 by half of its deviation, which hides what it learns at first.
        whole = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
        self.conv1 = whole.conv1
        self.bn1 = whole.bn1
        self.relu = whole.relu
        self.maxpool = whole.maxpool
        self.layer1 = whole.layer1
        self.layer2 = whole.layer2
        self.layer3 = whole.layer3
        self.layer4 = whole.layer4
        width = whole.fc.in_features
        self.channels = (width // 8, width // 4, width // 2, width)

    def forward(self, images: torch.Tensor) -> Features:
        """Features of `images`, `(b, 3, H, W)`."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return Features(c2, c3, c4, self.layer4(c4))


class EfficientNet(nn.Module):
    """A torchvision EfficientNet up to its last stage; the wide 1 x 1 convolution before its classifier is left out.

    Two pairs of its stages share a stride; the deeper one of a pair gives the features.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        whole = torchvision.models.get_model(name, weights=None)
        self.features = whole.features[:8]
        self.channels = tuple(self.features[stage][-1].out_channels for stage in (2, 3, 5, 7))

    def forward(self, images: torch.Tensor) -> Features:
        """Features of `images`, `(b, 3, H, W)`."""
        c2 = self.features[:3](images)
        c3 = self.features[3](c2)
        c4 = self.features[4:6](c3)
        return Features(c2, c3, c4, self.features[6:8](c4))


def build_backbone(name: Backbone) -> ResNet | EfficientNet:
    """The feature extractor `name` with random weights; `channels` holds the channels of its four feature maps."""
    return EfficientNet(name) if name.startswith("efficientnet") else ResNet(name)
