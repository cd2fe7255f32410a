"""The detector: a z-scored frame in, a centre heatmap, box sizes, offsets and a presence score out.

After "Objects as Points" (Zhou et al. 2019, arXiv 1904.07850), by default on a feature pyramid. It knows nothing of
tomograms, of where boxes come from or of devices.
"""

from typing import NamedTuple

import torch
from torch import nn

from motor_ray.config import HEATMAP_STRIDE, ModelSettings, TargetSettings
from motor_ray.detector.backbone import build_backbone
from motor_ray.detector.heads import Heads, PresenceHead
from motor_ray.detector.levels import merge_levels, side_by_side
from motor_ray.detector.neck import build_neck
from motor_ray.detector.pretrained import load_pretrained


class Prediction(NamedTuple):
    """What the network says of `b` frames of `(H, W)` pixels, on cells of `HEATMAP_STRIDE` pixels.

    While a network of several levels trains, the cells of all its levels stand in one row, `(b, c, 1, n)`, finest level
    first, and lengths are in cells of the own level; see `motor_ray.detector.levels`.
    """

    heatmap: torch.Tensor
    """Logits `(b, 1, h, w)` of 'a motor's centre lies in this cell'."""

    size: torch.Tensor
    """Height and width `(b, 2, h, w)` of the box centred here, in cells."""

    offset: torch.Tensor
    """Where in the cell the centre lies, y and x `(b, 2, h, w)`, from 0 to 1; outside that if the box is of a coarser
    level, whose centre may lie in another cell."""

    presence: torch.Tensor
    """Logits `(b,)` of 'this frame shows a motor'."""


class Detector(nn.Module):
    """Backbone, neck, heads."""

    def __init__(self, settings: ModelSettings, box_cells: float) -> None:
        super().__init__()
        self.in_slices, self.levels = settings.in_slices, settings.levels
        self.backbone = build_backbone(settings.backbone)
        self.neck = build_neck(self.backbone.channels, settings)
        light = settings.neck == "light"
        self.heads = Heads(
            self.neck.out_channels,
            settings.head_channels // 2 if light else settings.head_channels,
            box_cells,
            separable=light,
            attention=settings.attention,
        )
        self.presence = PresenceHead(self.backbone.channels[-1])

    def forward(self, images: torch.Tensor) -> Prediction:
        """Predict for `images`, `(b, in_slices, H, W)` z-scored floats. Raises ValueError for another shape.

        In training mode the levels of a pyramid stand side by side, else they are merged.
        """
        if images.ndim != 4 or images.shape[1] != self.in_slices:
            raise ValueError(f"images must be (b, {self.in_slices}, H, W), got shape {tuple(images.shape)}")
        # A grey image becomes the colour image that the backbones were made for.
        features = self.backbone(images.expand(-1, 3, -1, -1))
        levels = [self.heads(level) for level in self.neck(features)]
        maps = side_by_side(levels) if self.training else merge_levels(levels)
        return Prediction(*maps, self.presence(features.c5))


def build_model(
    settings: ModelSettings, *, box_cells: float = TargetSettings().box_pixels / HEATMAP_STRIDE
) -> Detector:
    """The network that `settings` describe, with `settings.pretrained` in its backbone.

    `box_cells` is the size, in cells, that an untrained network predicts for every box: as the targets' boxes are
    drawn with one size, or nearly so, training has only to learn how they differ from it.

    Raises CheckpointError if the pretrained weights cannot be had or do not fit.
    """
    model = Detector(settings, box_cells)
    load_pretrained(model.backbone, settings.backbone, settings.pretrained)
    return model


def standardise(images: torch.Tensor) -> torch.Tensor:
    """Every slice of `images`, `(..., H, W)` of any type, less its mean and over its deviation, as float32.

    A constant slice becomes zeros.
    """
    pixels = images.float()
    variance, mean = torch.var_mean(pixels, dim=(-2, -1), correction=0, keepdim=True)
    constant = pixels.amax(dim=(-2, -1), keepdim=True) == pixels.amin(dim=(-2, -1), keepdim=True)
    return torch.where(constant, 0.0, (pixels - mean) * variance.clamp(min=1e-12).rsqrt())
