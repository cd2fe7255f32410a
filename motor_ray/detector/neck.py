"""The neck: a backbone's feature maps in, the maps that the heads look at out, the finest of stride 4."""

import torch
import torch.nn.functional as F
from torch import nn

from motor_ray.config import ModelSettings
from motor_ray.detector.attention import build_attention
from motor_ray.detector.backbone import Features
from motor_ray.detector.convolutions import convolution


class Pyramid(nn.Module):
    """Lateral 1 x 1 convolutions on C2, C3 and C4, bilinear 2 x from the top down, a 3 x 3 convolution on each sum.

    Its finest `settings.levels` maps are what the heads look at. A light one has separable convolutions and half the
    channels.
    """

    def __init__(self, channels: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        separable = settings.neck == "light"
        self.levels = settings.levels
        self.out_channels = settings.neck_channels // 2 if separable else settings.neck_channels
        c2, c3, c4 = channels[:3]
        self.lateral2 = nn.Conv2d(c2, self.out_channels, 1)
        self.lateral3 = nn.Conv2d(c3, self.out_channels, 1)
        self.lateral4 = nn.Conv2d(c4, self.out_channels, 1)
        self.merge2 = convolution(self.out_channels, self.out_channels, separable=separable)
        self.merge3 = convolution(self.out_channels, self.out_channels, separable=separable)
        self.merge4 = (
            convolution(self.out_channels, self.out_channels, separable=separable)
            if self.levels == 3
            else nn.Identity()
        )
        self.attend2 = build_attention(settings.attention, self.out_channels)
        self.attend3 = build_attention(settings.attention, self.out_channels)

    def forward(self, features: Features) -> list[torch.Tensor]:
        """P2, P3, ... `(b, out_channels, H / stride, W / stride)`, as many as there are levels, finest first."""
        c2, c3, c4, _ = features
        p4 = self.merge4(self.lateral4(c4))
        p3 = self.merge3(self.attend3(_upsampled(p4, c3) + self.lateral3(c3)))
        p2 = self.merge2(self.attend2(_upsampled(p3, c2) + self.lateral2(c2)))
        return [p2, p3, p4][: self.levels]


class Deconvolution(nn.Module):
    """C5 brought to stride 4 by three transposed convolutions, each of half the channels of the one before.

    The neck of the plain CenterNet on a ResNet (Zhou et al. 2019, arXiv 1904.07850), less its deformable convolutions;
    there are no lateral connections.
    """

    def __init__(self, channels: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        widths = [settings.neck_channels // share for share in (1, 2, 4)]
        self.out_channels = widths[-1]
        steps = zip([channels[-1], *widths], widths, strict=False)
        self.stages = nn.ModuleList(_doubling(before, after) for before, after in steps)

    def forward(self, features: Features) -> list[torch.Tensor]:
        """The one map `(b, out_channels, H / 4, W / 4)`, in a list."""
        maps = features.c5
        for stage, finer in zip(self.stages, (features.c4, features.c3, features.c2), strict=True):
            # An odd edge rounds up on its way down, at its far end, so that is where it is cut on its way up.
            maps = stage(maps)[..., : finer.shape[-2], : finer.shape[-1]]
        return [maps]


def build_neck(channels: tuple[int, ...], settings: ModelSettings) -> Pyramid | Deconvolution:
    """The neck that `settings` describe, for features of so many channels; its maps have `out_channels`."""
    return Deconvolution(channels, settings) if settings.neck == "deconvolution" else Pyramid(channels, settings)


def _doubling(in_channels: int, out_channels: int) -> nn.Sequential:
    up = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(up, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _upsampled(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    # To the size of `fine` rather than by 2: an odd edge, such as 45 of 90, rounds up on its way down.
    return F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
