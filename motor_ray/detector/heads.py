"""The heads: the neck's features in, centre heatmap, box size and sub-cell offset out; and the presence head."""

import torch
import torch.nn.functional as F
from torch import nn

from motor_ray.config import Attention
from motor_ray.detector.attention import build_attention
from motor_ray.detector.convolutions import convolution
from motor_ray.detector.levels import Maps

HEATMAP_BIAS = -2.19
"""Every cell starts at a probability of 0.1 (Zhou et al. 2019, "Objects as Points")."""

OUTPUTS = (1, 2, 2)
"""Channels of heatmap, size and offset."""


class Heads(nn.Module):
    """Three heads of two convolutions, 3 x 3 and 1 x 1, with a ReLU between them.

    The 3 x 3 convolutions of the three heads read the same input, so they are computed, and stored, as one; its
    output channels belong to heatmap, size and offset in that order.

    Where a pyramid has several levels, all have these same heads. A box has about as many cells on its level as others
    have on theirs, so what there is to learn is the same; and there are few labels, from which all levels learn so.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        box_cells: float,
        *,
        separable: bool = False,
        attention: Attention = "none",
    ) -> None:
        super().__init__()
        self.shared = convolution(in_channels, len(OUTPUTS) * channels, separable=separable)
        self.heatmap, self.size, self.offset = (nn.Conv2d(channels, outputs, 1) for outputs in OUTPUTS)
        for head, start in ((self.heatmap, HEATMAP_BIAS), (self.size, box_cells), (self.offset, 0.0)):
            nn.init.normal_(head.weight, std=0.01)
            head.bias = nn.Parameter(torch.full((head.out_channels,), start))
        self.attention = build_attention(attention, in_channels)

    def forward(self, features: torch.Tensor) -> Maps:
        """Logits `(b, 1, h, w)`, sizes `(b, 2, h, w)` and offsets `(b, 2, h, w)` of `features`, `(b, c, h, w)`."""
        heatmap, size, offset = F.relu(self.shared(self.attention(features))).chunk(len(OUTPUTS), dim=1)
        return self.heatmap(heatmap), self.size(size), self.offset(offset)


class PresenceHead(nn.Module):
    """Does this frame show a motor at all? Global average pool and one linear layer."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(b,)` of `features`, `(b, c, h, w)`."""
        logits: torch.Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits.squeeze(1)
