"""A backbone and what it takes to say from its features what a slice looks like; for pre-training, without labels."""

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from motor_ray import storage
from motor_ray.config import HEATMAP_STRIDE, ModelSettings
from motor_ray.detector.backbone import build_backbone
from motor_ray.detector.model import standardise
from motor_ray.detector.pretrained import load_pretrained, load_tensors, read_tensors

CHANNELS = 64
"""Of the decoder: so few that what is known about slices has to lie in the backbone."""

TENSORS = "reconstructor.safetensors"
BACKBONE = "backbone.safetensors"
"""What ``model.pretrained`` takes."""


class Reconstructor(nn.Module):
    """The backbone that `settings` describe, and a small decoder.

    All four feature maps, so that no stage is left untaught, are brought to stride 4 and summed; a pixel shuffle (Shi
    et al. 2016, arXiv 1609.05158) makes pixels of that.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.in_slices = settings.in_slices
        self.backbone = build_backbone(settings.backbone)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, CHANNELS, 1) for channels in self.backbone.channels)
        self.merge = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.pixels = nn.Conv2d(CHANNELS, HEATMAP_STRIDE**2, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """What z-scored `images`, `(b, in_slices, H, W)`, of edges that 4 divides, should show, `(b, 1, H, W)`."""
        features = self.backbone(images.expand(-1, 3, -1, -1))
        sizes = [one.shape[-2:] for one in features]
        merged = self.laterals[-1](features[-1])
        for place in reversed(range(len(features) - 1)):
            merged = F.interpolate(merged, size=sizes[place], mode="bilinear", align_corners=False)
            merged = merged + self.laterals[place](features[place])
        return F.pixel_shuffle(self.pixels(F.relu(self.merge(F.relu(merged)))), HEATMAP_STRIDE)


def build_reconstructor(settings: ModelSettings) -> Reconstructor:
    """The network, with ``settings.pretrained`` in its backbone; raises CheckpointError if that cannot be had."""
    model = Reconstructor(settings)
    load_pretrained(model.backbone, settings.backbone, settings.pretrained)
    return model


def hide(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`images`, `(b, c, H, W)` of any type, z-scored, and 0, the mean, where `mask`, `(b, 1, H, W)`, is true."""
    return standardise(images).masked_fill(mask, 0.0)


def reconstruction_losses(
    said: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The mean squared distance of `said` from the z-scored `target`, where it counts: ``total``, and ``masked``.

    All are `(b, 1, H, W)`. A frame of mean grey has a ``total`` of 1. Squares, not magnitudes: what they are least for
    is the mean, and so the structure that noisy targets have in common. ``masked`` is the same under the mask alone; it
    is 0 if nothing is hidden.
    """
    apart = (said.float() - standardise(target)) ** 2
    return {"masked": _mean(apart, mask), "total": _mean(apart, counted)}


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def save_reconstructor(uri: str, model: Reconstructor) -> None:
    """Write the whole network, and its backbone alone, to the folder `uri`. Raises StorageError."""
    for name, part in ((TENSORS, model), (BACKBONE, model.backbone)):
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
        storage.write_bytes(storage.join(uri, name), safetensors.torch.save(tensors))


def load_reconstructor(uri: str, model: Reconstructor) -> Reconstructor:
    """Copy what `save_reconstructor` wrote to `uri` into `model`. Raises CheckpointError if it does not fit."""
    source = storage.join(uri, TENSORS)
    load_tensors(model, read_tensors(source), source)
    return model
