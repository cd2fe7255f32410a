"""Other people's detectors under the accuracy benchmark's conditions: torchvision's RetinaNet and FCOS.

They see the same augmented frames in the same order as ours and learn from them with the same optimizer, learning rate
and schedule; network, loss and the suppression of doubles are their own. Boxes that reach beyond a frame stay as they
are, as ours.

The learning rate is the better one of 3e-4 and 1e-3, with one seed on validation slices, for FCOS (when its
edges could still be dead), RetinaNet (its first version) and YOLO, at twice the frames and larger ones: 1e-3 for all
three, mAP@0.5 0.69, 0.36 and 0.42 against 0.06, 0.34 and 0.33.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from motor_ray.bench.accuracy_training import Data, Line, progress, require_finite, steps_of
from motor_ray.config import RunSettings
from motor_ray.detector.device import autocast_dtype
from motor_ray.detector.looks import Look
from motor_ray.detector.model import standardise
from motor_ray.distributed.learner import Judged
from motor_ray.distributed.optimisation import learning_rate
from motor_ray.distributed.samples import prepare_sample, readable

CPU = torch.device("cpu")

WEIGHTS = "peer.safetensors"

MARGIN = 1000.0
"""Pixels by which boxes are moved away from a frame's edges before torchvision cuts them off there."""

ANCHORS = 9
"""Of torchvision's RetinaNet, at each place."""

FINEST_STRIDE = 8
"""Pixels per cell of the pyramid's finest level."""

Boxes = NDArray[np.float64]


class Found(NamedTuple):
    """What a peer sees on a frame, best first; pixels, whose first one reaches from 0 to 1."""

    corners: torch.Tensor
    """``(n, 4)`` x, y of the first corner, x, y of the last."""

    scores: torch.Tensor
    """``(n,)`` in [0, 1]."""


class Peer(Protocol):
    """A network with its own loss and its own way from maps to boxes."""

    narrow_is_exact: bool
    """Whether boxes are as exact if only the network computes in bfloat16."""

    def loss(self, images: torch.Tensor, corners: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss on ``(b, 1, size, size)`` z-scored images with true boxes, in pixels as in Found."""

    def find(self, images: torch.Tensor, threshold: float, most: int) -> list[Found]:
        """Boxes from a score of `threshold` on, at most so many on each image."""


class _Unclipped:
    """Torchvision's detectors, in float32 after the network, and without cutting boxes at the frame's edges."""

    def compute_loss(self, targets: Any, head_outputs: Any, *rest: Any) -> Any:
        return super().compute_loss(targets, _exact(head_outputs), *rest)  # type: ignore[misc]

    def postprocess_detections(self, head_outputs: Any, anchors: Any, image_shapes: Any) -> Any:
        away = [[level + MARGIN for level in one] for one in anchors]
        wide = [(height + 2 * MARGIN, width + 2 * MARGIN) for height, width in image_shapes]
        found = super().postprocess_detections(_exact(head_outputs), away, wide)  # type: ignore[misc]
        return [one | {"boxes": one["boxes"] - MARGIN} for one in found]


class _RetinaNet(_Unclipped, RetinaNet):  # type: ignore[misc]  # torchvision has no types
    """See RetinaNet of torchvision."""


class _FCOS(_Unclipped, FCOS):  # type: ignore[misc]
    """See FCOS of torchvision."""


def _exact(outputs: Any) -> Any:
    """Maps, or lists of them, in float32."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: _exact(value) for name, value in outputs.items()}
    return [_exact(value) for value in outputs]


class TorchvisionPeer(nn.Module):
    """RetinaNet or FCOS as torchvision builds them, on the benchmark's backbone, with one class."""

    narrow_is_exact = True

    def __init__(self, network: RetinaNet | FCOS) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: torch.Tensor, corners: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Peer."""
        targets = [{"boxes": one.float(), "labels": torch.zeros(len(one), dtype=torch.int64)} for one in corners]
        losses: dict[str, torch.Tensor] = self.network([*images.expand(-1, 3, -1, -1)], targets)
        return torch.stack([*losses.values()]).sum()

    def find(self, images: torch.Tensor, threshold: float, most: int) -> list[Found]:
        """See Peer."""
        self.network.score_thresh, self.network.detections_per_img = threshold, most
        found = self.network([*images.expand(-1, 3, -1, -1)])
        return [Found(one["boxes"], one["scores"]) for one in found]


class _CoarseLevels(LastLevelP6P7):  # type: ignore[misc]
    """Torchvision's levels of stride 64 and 128, in float32.

    In bfloat16 the gradient of a convolution from a few cells to one is not finite on some CPUs (seen with torch 2.14
    and AMX).
    """

    def forward(self, p: list[torch.Tensor], c: list[torch.Tensor], names: list[str]) -> Any:
        """See ExtraFPNBlock of torchvision."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(_exact(p), _exact(c), names)


def retinanet(settings: RunSettings) -> RetinaNet:
    """Torchvision's second version, normalised heads and GIoU: the first hardly learns in so few steps."""
    head = RetinaNetHead(settings.model.neck_channels, ANCHORS, 1, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return _RetinaNet(pyramid(settings), num_classes=1, head=head, **images_as_they_are(settings))


def fcos(settings: RunSettings) -> FCOS:
    """Torchvision's, from boxes of the usual size on, as our heads start.

    Distances to a box's edges end in a ReLU, and start at zero in torchvision: depending on the seed one of the four
    is dead from the first step on.
    """
    network = _FCOS(pyramid(settings), num_classes=1, **images_as_they_are(settings))
    edge = settings.targets.box_pixels / 2 / FINEST_STRIDE
    nn.init.constant_(network.head.regression_head.bbox_reg.bias, edge)
    return network


def images_as_they_are(settings: RunSettings) -> dict[str, Any]:
    """Arguments with which torchvision neither resizes images nor standardises them, which they are already."""
    size = settings.frame.size
    return {"min_size": size, "max_size": size, "image_mean": [0.0], "image_std": [1.0], "_skip_resize": True}


def pyramid(settings: RunSettings) -> BackboneWithFPN:
    """Torchvision's feature pyramid, strides 8 to 128, as wide as ours, on a ResNet that starts as ours does."""
    width = settings.model.neck_channels
    body = get_model(settings.model.backbone, weights=None, zero_init_residual=True)
    stages = {f"layer{stage}": str(level) for level, stage in enumerate((2, 3, 4))}
    channels = [body.inplanes // share for share in (4, 2, 1)]
    return BackboneWithFPN(body, stages, channels, width, extra_blocks=_CoarseLevels(width, width))


def build_peer(name: str, settings: RunSettings) -> nn.Module:
    """The peer of that name, with random weights from the settings' seed."""
    torch.manual_seed(settings.train.seed)
    if name == "yolo":
        from motor_ray.bench.accuracy_yolo import YoloPeer

        return YoloPeer(settings)
    return TorchvisionPeer({"retinanet": retinanet, "fcos": fcos}[name](settings))


class PeerTrainee:
    """A peer under training; the best epoch's weights go to a file in `folder`."""

    def __init__(self, name: str, settings: RunSettings, data: Data, folder: Path) -> None:
        self.name, self.settings, self.data, self.folder = name, settings, data, folder
        self.peer = build_peer(name, settings).to(memory_format=torch.channels_last)
        train = settings.train
        self.optimizer = torch.optim.AdamW(
            self.peer.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )

    def run_epoch(self, number: int) -> None:
        """See Trainee."""
        self.peer.train()
        groups = list(steps_of(self.data.train, self.settings, number))
        for done, group in enumerate(groups):
            self._step(group, number, progress(number, done, len(groups), self.settings))

    def _step(self, group: Sequence[int], epoch: int, share: float) -> None:
        train = self.settings.train
        shown = [prepare_sample(readable(self.data.train, place), self.settings, epoch) for place in group]
        images = as_images(np.stack([sample.frame for sample in shown]))
        for one in self.optimizer.param_groups:
            one["lr"] = learning_rate(train, share, len(group))
        self.optimizer.zero_grad(set_to_none=True)
        with narrow():
            loss = self.peer.loss(images, [to_corners(sample.boxes[:, :4]) for sample in shown])  # type: ignore[operator]
        require_finite(loss, self.name)
        loss.backward()
        nn.utils.clip_grad_norm_(self.peer.parameters(), train.clip_norm)
        self.optimizer.step()

    def judge(self) -> list[Judged]:
        """See Trainee."""
        look = PeerLooker(self.peer, self.settings, threshold=0.0, precise=False)
        samples = [readable(self.data.held_out, place) for place in range(len(self.data.held_out))]
        looks = [look(sample.frame[None])[0] for sample in samples]
        return [
            Judged(sample.slice_id, seen.boxes, seen.scores, sample.boxes[:, :4])
            for sample, seen in zip(samples, looks, strict=True)
        ]

    def keep(self, line: Line) -> None:  # noqa: ARG002
        """See Trainee."""
        self.folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.peer, str(self.folder / WEIGHTS))

    def end_epoch(self, line: Line) -> None:
        """See Trainee."""


class PeerLooker:
    """A trained peer at work, image by image as is fastest on a CPU."""

    def __init__(self, peer: nn.Module, settings: RunSettings, *, threshold: float, precise: bool) -> None:
        """`precise` computes in float32 throughout, else the network in bfloat16 where that is no emulation."""
        self.peer, self.threshold, self.most = peer.eval(), threshold, settings.detect.max_detections
        self.precise = precise

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> list[Look]:
        """A look at each of ``(n, 1, size, size)`` images."""
        with contextlib.nullcontext() if self.precise else narrow():
            found = [self.peer.find(as_images(image[None]), self.threshold, self.most)[0] for image in images]  # type: ignore[operator]
        return [self._look(one) for one in found]

    def _look(self, found: Found) -> Look:
        boxes, scores = from_corners(found.corners.double()), found.scores.double().numpy()
        best = float(scores[0]) if len(scores) else 0.0
        return Look(boxes, scores, best, bool(np.isfinite(boxes).all() and np.isfinite(scores).all()))


def load_peer(name: str, settings: RunSettings, folder: Path) -> nn.Module:
    """A peer with the weights in `folder`."""
    peer = build_peer(name, settings)
    safetensors.torch.load_model(peer, str(folder / WEIGHTS))
    peer.eval()
    if name == "yolo":
        peer.network.fuse(verbose=False)  # type: ignore[operator, union-attr]  # as ultralytics' own predictor does
    return peer.to(memory_format=torch.channels_last)


def narrow() -> torch.autocast:
    """Where a network computes in bfloat16, if this CPU can."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_dtype(CPU) is torch.bfloat16)


def as_images(frames: NDArray[np.uint8]) -> torch.Tensor:
    """``(b, 1, size, size)`` grey levels as a network takes them."""
    return standardise(torch.tensor(frames)).contiguous(memory_format=torch.channels_last)


def to_corners(boxes: Boxes) -> torch.Tensor:
    """``(n, 4)`` centre y, x, height, width, a pixel's index being its centre, as corners of pixels' edges."""
    centre, half = boxes[:, [1, 0]] + 0.5, boxes[:, [3, 2]] / 2
    return torch.from_numpy(np.hstack([centre - half, centre + half])).float()


def from_corners(corners: torch.Tensor) -> Boxes:
    """The inverse of `to_corners`."""
    first, last = corners.numpy().reshape(-1, 2, 2).swapaxes(0, 1)
    return np.hstack([((first + last) / 2 - 0.5)[:, ::-1], (last - first)[:, ::-1]])
