"""The feature pyramid: coarse features are brought up to the finest map and merged with what is there."""

import torch
import torch.nn.functional as F
from torch import nn


class Neck(nn.Module):
    """Lateral 1 x 1 convolutions on C2, C3 and C4, bilinear 2 x from the top down, a 3 x 3 convolution on each sum."""

    def __init__(self, channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        c2, c3, c4 = channels[:3]
        self.lateral2 = nn.Conv2d(c2, out_channels, 1)
        self.lateral3 = nn.Conv2d(c3, out_channels, 1)
        self.lateral4 = nn.Conv2d(c4, out_channels, 1)
        self.merge2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.merge3 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, c2: torch.Tensor, c3: torch.Tensor, c4: torch.Tensor) -> torch.Tensor:
        """P2, `(b, out_channels, H / 4, W / 4)`, from feature maps of stride 4, 8 and 16."""
        p4 = self.lateral4(c4)
        p3 = self.merge3(_upsampled(p4, c3) + self.lateral3(c3))
        merged: torch.Tensor = self.merge2(_upsampled(p3, c2) + self.lateral2(c2))
        return merged


def _upsampled(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    # To the size of `fine` rather than by 2: an odd edge, such as 45 of 90, rounds up on its way down.
    return F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
