"""CBAM: which channels and which places of a feature map matter (Woo et al. 2018, arXiv 1807.06521)."""

import torch
from torch import nn

from motor_ray.config import Attention

REDUCTION = 16
"""Channels to a hidden one of the channel attention, as published."""

FEWEST_HIDDEN = 4

KERNEL = 7
"""Edge of the spatial attention's kernel, as published."""


def build_attention(kind: Attention, channels: int) -> nn.Module:
    """Attention for maps of so many channels; for 'none' a module without parameters that returns its input."""
    return CBAM(channels) if kind == "cbam" else nn.Identity()


class CBAM(nn.Module):
    """Channel attention, then spatial attention: gates that multiply a feature map `(b, c, h, w)`.

    A gate is twice a sigmoid, and its last weights start at zero, so that an untrained module is exactly the identity.
    Published gates start at about a half, and the two of a module would leave a quarter of what comes in: the layers
    behind would not see what they were initialised, or trained, for. A sigmoid that is nearly open instead has hardly
    a gradient. The factor 2 changes nothing of what can be learned, as the next convolution can halve it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, FEWEST_HIDDEN)
        # Its maps are of 1 x 1 cells, so these are the two layers of a perceptron.
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2)
        for last in (self.excite, self.spatial):
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`features` with what matters raised and the rest lowered, of the same shape."""
        mean, most = features.mean(dim=(2, 3), keepdim=True), features.amax(dim=(2, 3), keepdim=True)
        features = features * _gate(self._channels(mean) + self._channels(most))
        places = torch.cat([features.mean(dim=1, keepdim=True), features.amax(dim=1, keepdim=True)], dim=1)
        return features * _gate(self.spatial(places))

    def _channels(self, pooled: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.excite(self.squeeze(pooled).relu())
        return logits


def _gate(logits: torch.Tensor) -> torch.Tensor:
    return 2 * logits.sigmoid()
