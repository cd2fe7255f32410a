"""What training minimises: the distance between a prediction and its targets.

All of it is computed in float32 at least. With no centre in a batch the parts about boxes are zero, with zero
gradients; how targets are drawn is not known here.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss

from motor_ray.config import LossSettings
from motor_ray.detector.model import Prediction


class Targets(Protocol):
    """What `b` frames should be predicted as; float tensors on `(h, w)` cells."""

    @property
    def heatmap(self) -> torch.Tensor:
        """Gaussians `(b, 1, h, w)` in [0, 1], highest in the cell of a centre: 1, or less for one that has faded."""

    @property
    def size(self) -> torch.Tensor:
        """Height and width in cells, `(b, 2, h, w)`, where `mask` is 1."""

    @property
    def offset(self) -> torch.Tensor:
        """Place of the centre in its cell, y and x, `(b, 2, h, w)`, where `mask` is 1."""

    @property
    def mask(self) -> torch.Tensor:
        """1 in the cell of a centre, `(b, 1, h, w)`, else 0."""

    @property
    def presence(self) -> torch.Tensor:
        """How plainly a frame shows a motor, `(b,)` from 0 to 1."""


def detection_loss(prediction: Prediction, targets: Targets, settings: LossSettings) -> dict[str, torch.Tensor]:
    """Scalars ``heatmap``, ``offset``, ``size``, ``giou`` and ``presence``, unweighted, and ``total``, weighted."""
    logits, sizes, offsets, presence = (_exact(tensor) for tensor in prediction)
    with torch.autocast(logits.device.type, enabled=False):
        heatmap_loss = centre_focal_loss if settings.heatmap == "focal" else centre_cross_entropy
        at_centre = targets.mask[:, 0] > 0
        size, true_size = _at(sizes, at_centre), _at(targets.size.to(sizes), at_centre)
        offset, true_offset = _at(offsets, at_centre), _at(targets.offset.to(offsets), at_centre)
        parts = {
            "heatmap": heatmap_loss(logits, targets.heatmap.to(logits), targets.mask.to(logits)),
            "offset": _mean_or_zero((offset - true_offset).abs()),
            "size": _mean_or_zero((size - true_size).abs()),
            "giou": box_loss(size, offset, true_size, true_offset),
            "presence": F.binary_cross_entropy_with_logits(presence, targets.presence.to(presence)),
        }
    weights = {name: getattr(settings, f"{name}_weight") for name in parts}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return {**parts, "total": total}


def centre_focal_loss(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, *, alpha: float = 2.0, beta: float = 4.0
) -> torch.Tensor:
    """Penalty-reduced focal loss for centre heatmaps (Zhou et al. 2019, "Objects as Points").

    `logits`, `target` and `mask` have one shape; `target` is in [0, 1] and `mask` 1 at centres, else 0. A centre
    whose target is below 1 counts as that share of a hit, and as no centre for the rest.
    Returns the sum over cells per centre, centres counted by their targets, or the sum where those come to less than 1.
    """
    if not logits.shape == target.shape == mask.shape:
        shapes = [tuple(tensor.shape) for tensor in (logits, target, mask)]
        raise ValueError("logits {}, target {} and mask {} differ in shape".format(*shapes))
    probability, share = logits.sigmoid(), mask * target
    # logsigmoid rather than log(sigmoid): finite at any logit, so nothing has to be clamped
    hit = -F.logsigmoid(logits) * (1 - probability) ** alpha
    miss = -F.logsigmoid(-logits) * probability**alpha * (1 - target) ** beta
    # A full centre can't be a miss, even where `beta` is 0 and would make it one.
    missed = torch.where(share == 1, 0, miss)
    return (share * hit + missed).sum() / share.sum().clamp(min=1)


def centre_cross_entropy(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plain binary cross-entropy with the soft `target`; summed and divided like the focal loss."""
    total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return total / (mask * target).sum().clamp(min=1)


def box_loss(
    size: torch.Tensor, offset: torch.Tensor, true_size: torch.Tensor, true_offset: torch.Tensor
) -> torch.Tensor:
    """Mean 1 - GIoU of boxes in the same cells, from sizes and offsets `(n, 2)` in cells; zero for none."""
    # A box of negative size has no area; its size is pulled up by the L1 part.
    losses = generalized_box_iou_loss(_corners(size.clamp(min=0), offset), _corners(true_size, true_offset))
    return _mean_or_zero(losses)


def _corners(size: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def _at(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    # Picked rather than multiplied by the mask: what is predicted elsewhere, even NaN, has no gradient.
    return maps.permute(0, 2, 3, 1)[cells]


def _mean_or_zero(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / max(values.numel(), 1)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
