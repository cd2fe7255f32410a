"""A YOLO in the accuracy benchmark: ultralytics' network and loss, in our loop.

Its own trainer has other augmentation, another schedule and warm-up, and so another budget; here only network and loss
are its own, as with every other row. Ultralytics is under the AGPL and comes with the extra `bench` only; nothing of
it is downloaded, and it tells nobody that it was used.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from motor_ray.config import RunSettings
from motor_ray.errors import ConfigError

if TYPE_CHECKING:
    from motor_ray.bench.accuracy_peers import Found

ARCHITECTURE = "yolov8s.yaml"
"""About as many parameters as a ResNet-18; random weights."""

QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
"""It would ask the internet whether it is there, and install what it misses."""

OVERLAP = 0.7
"""Of two boxes that overlap by more the worse one is left out: ultralytics' own default."""


class YoloPeer(nn.Module):
    """See Peer of accuracy_peers."""

    narrow_is_exact = False  # it makes boxes within the network

    def __init__(self, settings: RunSettings) -> None:  # noqa: ARG002
        super().__init__()
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            from ultralytics.nn.tasks import DetectionModel
        except ImportError as error:
            raise ConfigError(f"--parts yolo needs ultralytics ({error}); pip install 'motor-ray[bench]'") from None
        self.network = DetectionModel(ARCHITECTURE, ch=3, nc=1, verbose=False)
        self.network.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)  # ultralytics' own weights of the parts
        self.criterion = self.network.init_criterion()

    def loss(self, images: torch.Tensor, corners: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Peer."""
        maps = self.network(images.expand(-1, 3, -1, -1))
        exact = {name: value if name == "feats" else value.float() for name, value in maps.items()}
        boxes, size = torch.cat([*corners]), images.shape[-1]
        batch = {
            "batch_idx": torch.repeat_interleave(torch.arange(len(corners)), torch.tensor([*map(len, corners)])),
            "cls": torch.zeros(len(boxes), 1),
            "bboxes": torch.cat([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], dim=1) / (2 * size),
        }
        with torch.autocast("cpu", enabled=False):
            parts, _ = self.criterion(exact, batch)
        total: torch.Tensor = parts.sum()
        return total

    def find(self, images: torch.Tensor, threshold: float, most: int) -> "list[Found]":
        """See Peer."""
        from ultralytics.utils.nms import non_max_suppression

        from motor_ray.bench.accuracy_peers import Found

        maps, _ = self.network(images.expand(-1, 3, -1, -1))
        found = non_max_suppression(maps.float(), threshold, OVERLAP, max_det=most)
        return [Found(one[:, :4], one[:, 4]) for one in found]
