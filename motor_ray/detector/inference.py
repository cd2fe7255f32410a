"""The detector as fast as its device runs it: uint8 frames in, float32 predictions out.

The network computed here is the trained one, rearranged: batch normalisation is folded into the convolutions
before it, the three copies of a grey image into the first one, the heads' last convolutions into one, and all but
these last ones run in bfloat16 over channels-last memory.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from motor_ray.config import HEATMAP_STRIDE
from motor_ray.detector.device import autocast_dtype, can_compile, frames_per_pass
from motor_ray.detector.heads import OUTPUTS
from motor_ray.detector.levels import merge_levels
from motor_ray.detector.model import Detector, Prediction, standardise
from motor_ray.errors import RunError

Predict = Callable[[torch.Tensor], Prediction]

FEATURES = 24
"""Numbers that stand for what the network sees in a cell, where they are asked for."""


class Seen(NamedTuple):
    """What a network says of frames, before its levels are merged."""

    levels: list[Prediction]
    """Finest first, each on cells of its own; the presence is the same in all."""

    features: torch.Tensor
    """Of the finest cells, float32 ``(b, FEATURES, h, w)``, or ``(b, 0, h, w)`` if not prepared for."""


def prepare(
    model: Detector,
    device: torch.device,
    *,
    mixed_precision: bool = True,
    compiled: bool = False,
    features: bool = False,
) -> "Predictor":
    """A function from uint8 frames `(b, in_slices, H, W)`, on any device, to a float32 Prediction on `device`.

    `model` is not changed, and later changes to it have no effect. With `compiled` the first call takes half a
    minute or so. With `features` its method `seen` tells the cells' features, too. Raises RunError if there is nothing
    to compile with.
    """
    if compiled and not can_compile(device):
        raise RunError(
            f"detect.compile 'on': torch.compile has no compiler for the {device.type}, "
            "expected g++ or clang++ (for a GPU: Triton); install one or set --detect.compile off"
        )
    dtype = autocast_dtype(device) if mixed_precision else torch.float32
    network = FoldedDetector(model, features=features).to(device, dtype)
    network.to(memory_format=torch.channels_last)
    network.last.float()
    return Predictor(network, device, dtype, compiled=compiled)


class FoldedDetector(nn.Module):
    """`model` in evaluation mode with fewer, larger operations; equal to it up to rounding."""

    def __init__(self, model: Detector, *, features: bool = False) -> None:
        super().__init__()
        self.projection = random_projection(model.neck.out_channels) if features else None
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norms(model)
        if model.in_slices == 1:
            _sum_input_channels(model.backbone)
        self.backbone, self.neck, self.presence = model.backbone, model.neck, model.presence
        self.first = nn.Sequential(model.heads.attention, model.heads.shared)
        self.last = _block_diagonal([model.heads.heatmap, model.heads.size, model.heads.offset])

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Maps `(b, 5, h, w)` of heatmap, size and offset of each level, finest first, and presence logits.

        The third are the features of the finest cells `(b, FEATURES, h, w)`, or none, `(b, 0, h, w)`, if not asked for.
        """
        features = self.backbone(images)
        cells = self.neck(features)
        # The last, tiny step is in float32: rounded to bfloat16, neighbouring cells often tie for the peak.
        maps = [self.last(F.relu(self.first(level)).to(self.last.weight.dtype)) for level in cells]
        seen = cells[0][:, :0] if self.projection is None else self.projection(cells[0])
        return maps, self.presence(features.c5), seen


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, every batch normalisation in `module` into the convolution that stands right before it.

    That is also where its input comes from, in all of torchvision's networks used here and in ours.
    """
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
            transposed = isinstance(conv, nn.ConvTranspose2d)
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm, transpose=transposed))
            setattr(module, norm_name, nn.Identity())
    for _, child in children:
        fold_batch_norms(child)


class Predictor:
    """What `prepare` makes; see there."""

    def __init__(self, network: FoldedDetector, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> None:
        self.device, self.dtype, self.compiled = device, dtype, compiled
        self.network = torch.compile(network, dynamic=False) if compiled else network
        self.largest = 0

    def __call__(self, frames: torch.Tensor) -> Prediction:
        """The prediction for `frames`."""
        return merged(self.seen(frames).levels)

    def seen(self, frames: torch.Tensor) -> Seen:
        """What the network says of `frames`, level by level."""
        if not len(frames):
            return self._empty(frames)
        # Without gradients rather than in inference mode, in which torch.compile does not freeze weights.
        with torch.no_grad():
            count = frames_per_pass(self.device, len(frames))
            # A compiled network is compiled again for another batch size, so the last batch is filled up.
            self.largest = max(self.largest, count) if self.compiled else count
            parts = [self._pass(part) for part in torch.split(frames, self.largest)]
        levels = [joined(same) for same in zip(*(part.levels for part in parts), strict=True)]
        return Seen(levels, torch.cat([part.features for part in parts]))

    def _pass(self, frames: torch.Tensor) -> Seen:
        count = len(frames)
        images = standardise(frames.to(self.device, non_blocking=True)).to(self.dtype)
        if count < self.largest:
            images = torch.cat([images, images.new_zeros(self.largest - count, *images.shape[1:])])
        images = images.contiguous(memory_format=torch.channels_last)
        maps, presence, features = self._run(images)
        levels = [self._level(level[:count].float(), presence[:count].float()) for level in maps]
        return Seen(levels, features[:count].float())

    @staticmethod
    def _level(maps: torch.Tensor, presence: torch.Tensor) -> Prediction:
        heatmap, size, offset = torch.split_with_sizes(maps, OUTPUTS, dim=1)
        return Prediction(heatmap, size, offset, presence)

    def _run(self, images: torch.Tensor) -> Any:
        if not self.compiled:
            return self.network(images)
        # Freezing is read while compiling, which happens in the first call; as an option of torch.compile it
        # comes too late to fuse additions and ReLUs into convolutions (measured: 0.15 s a frame instead of 0.12).
        with torch._inductor.config.patch(freezing=True):
            return self.network(images)

    def _empty(self, frames: torch.Tensor) -> Seen:
        height, width = (-(-edge // HEATMAP_STRIDE) for edge in frames.shape[-2:])
        heatmap, size, offset = (torch.zeros(0, outputs, height, width, device=self.device) for outputs in OUTPUTS)
        prediction = Prediction(heatmap, size, offset, torch.zeros(0, device=self.device))
        return Seen([prediction], torch.zeros(0, 0, height, width, device=self.device))


def merged(levels: Sequence[Prediction]) -> Prediction:
    """One prediction, on cells of `HEATMAP_STRIDE` pixels, from those of a network's levels, finest first."""
    return Prediction(*merge_levels([level[:3] for level in levels]), levels[0].presence)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Predictions for some frames and for others as one for all."""
    return Prediction(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def random_projection(channels: int) -> nn.Conv2d:
    """FEATURES numbers that stand for a cell's `channels`: the same ones for ever, and distances between them nearly
    stay (Johnson and Lindenstrauss 1984).
    """
    # Not torch's generator: numpy promises that this one's numbers never change, and what is trained relies on them.
    weights = np.random.RandomState(0).standard_normal((FEATURES, channels, 1, 1)) / channels**0.5
    projection = nn.Conv2d(channels, FEATURES, 1, bias=False)
    projection.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float32), requires_grad=False)
    return projection


def _sum_input_channels(backbone: nn.Module) -> None:
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.sum(dim=1, keepdim=True), requires_grad=False)
    first.in_channels = 1


def _block_diagonal(heads: list[nn.Conv2d]) -> nn.Conv2d:
    last = nn.Conv2d(sum(head.in_channels for head in heads), sum(head.out_channels for head in heads), 1)
    weights = torch.block_diag(*(head.weight.flatten(1) for head in heads))  # type: ignore[no-untyped-call]
    last.weight = nn.Parameter(weights[:, :, None, None], requires_grad=False)
    last.bias = nn.Parameter(torch.cat([head.bias for head in heads if head.bias is not None]), requires_grad=False)
    return last
