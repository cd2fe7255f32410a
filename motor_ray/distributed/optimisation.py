"""A network under training: its optimizer, its learning rate, and a step, whatever it is taught.

Knows nothing of Ray, of files or of where samples come from.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from motor_ray.config import RunSettings, TrainSettings
from motor_ray.detector.device import autocast_dtype, pins_memory
from motor_ray.errors import RunError

REFERENCE_FRAMES = 4
"""Frames of a step for which the learning rate is set: the recipe's batch."""

Network = TypeVar("Network", bound=nn.Module)


class Shown(Protocol):
    """A batch: what a training step takes."""

    @property
    def slice_ids(self) -> list[str]:
        """The slices that its frames are of."""


B = TypeVar("B", bound=Shown)


class NotFiniteError(RunError):
    """The loss of a step, or its gradient, is not finite; nothing was learned from the step."""

    def __init__(self, slice_ids: list[str]) -> None:
        super().__init__(f"the loss is not finite on slices {', '.join(slice_ids)}")
        self.slice_ids = slice_ids
        """Of this worker's batches, those whose own loss is not finite."""


def learning_rate(train: TrainSettings, progress: float, frames: int) -> float:
    """The learning rate after a share `progress` of all training, for steps of so many `frames`.

    A function of the samples seen, not of steps: it is the same curve when the number of workers changes on the way.
    """
    cycles = train.cycles if train.schedule == "cyclic" else 1
    within = progress * cycles % 1.0
    growth = frames / REFERENCE_FRAMES
    scale = {"no": 1.0, "sqrt": math.sqrt(growth), "linear": growth}[train.scale_learning_rate]
    return train.learning_rate * scale * (1 + math.cos(math.pi * within)) / 2


class Optimisation(ABC, Generic[B]):
    """AdamW, gradients clipped, mixed precision: the recipe's optimisation of one model."""

    def __init__(self, model: nn.Module, settings: RunSettings, device: torch.device, workers: int = 1) -> None:
        """`model` may be wrapped for distributed training on so many `workers`."""
        train = settings.train
        self.model, self.settings, self.device = model, settings, device
        self.frames_per_step = train.batch_size * train.accumulate * workers
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
        self.average = averaged(unwrapped(model), train.ema_decay) if train.ema_decay else None

    def step(self, coming: Sequence[B], progress: float) -> dict[str, float]:
        """One step of the optimizer, from one batch or several; returns the mean parts of the loss.

        `progress` is the share of all training that is done. Raises NotFiniteError on all workers, before weights
        change, if a loss is not finite on any.
        """
        train_mode(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.train, progress, self.frames_per_step)
        self.optimizer.zero_grad(set_to_none=True)
        frames = sum(len(batch.slice_ids) for batch in coming)
        losses = []
        for number, batch in enumerate(coming, start=1):
            with self._together(number == len(coming)):
                losses.append(self._backward(batch, len(batch.slice_ids) / frames))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.clip_norm)
        # All at once, so that a GPU is waited for once.
        rows = torch.stack([torch.stack([*parts.values()]) for parts in losses]).tolist()
        if not math.isfinite(norm):
            raise NotFiniteError(
                [
                    name
                    for batch, row in zip(coming, rows, strict=True)
                    if not all(map(math.isfinite, row))
                    for name in batch.slice_ids
                ]
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(unwrapped(self.model))
        shares = [len(batch.slice_ids) / frames for batch in coming]
        return dict(zip(losses[0], np.average(rows, axis=0, weights=shares).tolist(), strict=True))

    @abstractmethod
    def losses(self, batch: B) -> dict[str, torch.Tensor]:
        """The parts of the loss of a batch, and their ``total``, all scalars."""

    def _together(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are summed over workers once, with the last batch of a step."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _backward(self, batch: B, share: float) -> dict[str, torch.Tensor]:
        """Add the gradient of a batch, which has such a share of a step's frames; returns the parts of its loss."""
        parts = self.losses(batch)
        # A loss that is not finite may have a gradient that is; then the other workers would not know of it.
        sound = torch.where(parts["total"].detach().isfinite(), 1.0, math.nan)
        (parts["total"] * sound * share).backward()  # type: ignore[no-untyped-call]
        return {name: part.detach() for name, part in parts.items()}

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the model's device, images in the layout that convolutions are fastest in."""
        fast = tensor.ndim == 4 and self.settings.train.channels_last
        layout = torch.channels_last if fast else torch.preserve_format
        tensor = tensor.contiguous(memory_format=layout)
        tensor = tensor.pin_memory() if pins_memory(self.device) else tensor
        return tensor.to(self.device, non_blocking=True)

    def precision(self) -> torch.autocast:
        """Where the network computes in bfloat16; float16, all that older GPUs have, would need scaled gradients."""
        narrow = self.settings.train.mixed_precision and autocast_dtype(self.device) is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)

    def state(self) -> dict[str, Any]:
        """What must be restored, beside the weights, to go on after a step."""
        average = None if self.average is None else self.average.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "average": average}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def prepared(model: Network, train: TrainSettings) -> Network:
    """`model` as it is trained, before it is wrapped for several workers."""
    if train.batch_norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if train.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if train.compile:
        model.compile()
    return model


def train_mode(model: nn.Module) -> None:
    """Training mode, but for batch normalisations that are frozen: those use, and keep, the statistics they have."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights of `model`; running statistics are copied, not averaged."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a wrapper, such as that for several workers."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, nn.Module)
    return inner
