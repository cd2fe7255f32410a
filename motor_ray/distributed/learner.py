"""A model under training: its optimizer, its schedule, a step, and what it says on held-out slices.

Knows nothing of Ray, of files or of where samples come from.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from motor_ray.config import RunSettings
from motor_ray.detector.decode import decode
from motor_ray.detector.device import autocast_dtype, pins_memory
from motor_ray.detector.losses import detection_loss
from motor_ray.detector.model import standardise
from motor_ray.distributed.samples import Batch, FrameStore, batches
from motor_ray.errors import RunError
from motor_ray.slices.targets import Targets


class Judged(NamedTuple):
    """What the model says of a slice, beside the truth; boxes are ``(n, 4)`` y, x, height, width in frame pixels."""

    slice_id: str
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    truth: NDArray[np.float64]


class Learner:
    """AdamW under a cosine, gradients clipped, mixed precision: the recipe's optimisation of one model."""

    def __init__(self, model: nn.Module, settings: RunSettings, steps: int, device: torch.device) -> None:
        """`model` may be wrapped for distributed training; `steps` is how many there will be in all."""
        train = settings.train
        self.model, self.settings, self.device = model, settings, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=max(steps, 1))

    def run_epoch(self, coming: Iterable[Batch]) -> Iterator[dict[str, float]]:
        """Learn from each batch in turn; yields its loss parts, and how long it had to be waited for and took."""
        self.model.train()
        ready = time.perf_counter()
        for batch in coming:
            got = time.perf_counter()
            parts = self.step(batch)
            done = time.perf_counter()
            yield parts | {"wait_seconds": got - ready, "step_seconds": done - got}
            ready = time.perf_counter()

    def step(self, batch: Batch) -> dict[str, float]:
        """One step; returns the parts of the loss. Raises RunError, before weights change, if it is not finite."""
        images = standardise(self.here(batch.images))
        targets = Targets(*map(self.here, batch.targets))
        with self.precision():
            prediction = self.model(images)
        parts = detection_loss(prediction, targets, self.settings.loss)
        # Together, so that a GPU is waited for once.
        values = dict(zip(parts, torch.stack(list(parts.values())).detach().tolist(), strict=True))
        if not math.isfinite(values["total"]):
            raise RunError(f"the loss is {values['total']} on slices {', '.join(batch.slice_ids)}; look at them")
        self.optimizer.zero_grad(set_to_none=True)
        parts["total"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return values

    @torch.no_grad()
    def judge(self, model: nn.Module, store: FrameStore) -> list[Judged]:
        """What `model`, not wrapped, says of every sample of `store`, in order; workers may have different numbers."""
        model.eval()
        judged: list[Judged] = []
        for batch in batches(store, range(len(store)), self.settings, epoch=None):
            with self.precision():
                prediction = model(standardise(self.here(batch.images)))
            # Every peak counts in a mean average precision, however low; so no threshold.
            found = decode(prediction, self.settings.detect.max_detections, threshold=0.0)
            for boxes, scores in found:
                sample = store[len(judged)]
                found_here = (boxes.double().cpu().numpy(), scores.double().cpu().numpy())
                judged.append(Judged(sample.slice_id, *found_here, sample.boxes))
        return judged

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the model's device, images in the layout that convolutions are fastest in."""
        layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        tensor = tensor.contiguous(memory_format=layout)
        tensor = tensor.pin_memory() if pins_memory(self.device) else tensor
        return tensor.to(self.device, non_blocking=True)

    def precision(self) -> torch.autocast:
        """Where the network computes in bfloat16; float16, all that older GPUs have, would need scaled gradients."""
        narrow = self.settings.train.mixed_precision and autocast_dtype(self.device) is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)

    def state(self) -> dict[str, Any]:
        """What must be restored, beside the weights, to go on after an epoch."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
