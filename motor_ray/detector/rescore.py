"""The second look: a small head that judges what was linked in three dimensions, from what is known of it already.

It starts as the score that linking gave, and learns how far to move it. It knows numbers of candidates, not slices;
what they are is told in `motor_ray.motors.neighbourhood`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from motor_ray import storage
from motor_ray.detector.description import RESCORER
from motor_ray.detector.pretrained import load_tensors, parse_tensors
from motor_ray.errors import CheckpointError

HIDDEN = 16
STEPS = 100
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 3e-3, 10.0, 0.2
"""Candidates are few, some hundreds, so the head is small and held back: what is noise hardly moves a score (measured
on simulated noise, where less decay or more steps moved most of them)."""

SURE = 1e-4
"""A linked score is taken no nearer to 0 or 1 than this."""

Floats = NDArray[np.float32]


class Rescorer(nn.Module):
    """Convolutions along z, their mean and maximum, and the candidate's geometry: a change of its linked score."""

    def __init__(self, channels: int, geometry: int) -> None:
        super().__init__()
        for name, shape in (("channel", (channels, 1)), ("geometry", (geometry,))):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_deviation", torch.ones(shape))
        self.along_z = nn.Sequential(
            nn.Conv1d(channels, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1), nn.ReLU()
        )
        self.together = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * HIDDEN + geometry, HIDDEN), nn.ReLU())
        self.last = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, along_z: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
        """Logits `(n,)` of candidates with neighbourhoods `(n, channels, steps)` and `(n, geometry)`."""
        shown = self._standardised("channel", along_z)
        # Up and down mean the same: nobody knows which side of the tomogram is the upper one.
        seen = [self.along_z(one) for one in (shown, shown.flip(2))]
        parts = torch.cat([sum(one.mean(dim=2) for one in seen) / 2, torch.maximum(*seen).amax(dim=2)], dim=1)
        change = self.last(self.together(torch.cat([parts, self._standardised("geometry", geometry)], dim=1)))[:, 0]
        logits: torch.Tensor = geometry[:, 0].clamp(SURE, 1 - SURE).logit() + change
        return logits

    def _standardised(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return (values - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_deviation")

    def standardise_by(self, along_z: torch.Tensor, geometry: torch.Tensor) -> None:
        """Take the means and deviations of these candidates for those of all."""
        for name, values in (("channel", along_z.transpose(1, 2).flatten(0, 1)), ("geometry", geometry)):
            mean, deviation = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_deviation")
            mean.copy_(values.mean(dim=0).view_as(mean))
            deviation.copy_(values.std(dim=0, correction=0).clamp(min=1e-3).view_as(deviation))

    @torch.no_grad()
    def score(self, along_z: Floats, geometry: Floats) -> NDArray[np.float64]:
        """New scores ``(n,)`` in [0, 1]."""
        logits = self(torch.from_numpy(along_z), torch.from_numpy(geometry))
        return np.asarray(logits.double().sigmoid().numpy())


def train_rescorer(along_z: Floats, geometry: Floats, is_motor: NDArray[np.bool_], *, seed: int) -> Rescorer:
    """A head that tells the candidates that are motors ``(n,)`` from the others.

    Both kinds weigh the same while it learns; then its scores are brought back to how rare motors are among candidates,
    so that a threshold for probabilities means what it did before. The caller's random numbers stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Rescorer(along_z.shape[1], geometry.shape[1])
        inputs, target = (torch.from_numpy(along_z), torch.from_numpy(geometry)), torch.from_numpy(is_motor).float()
        model.standardise_by(*inputs)
        weight = torch.where(target == 1, 0.5 / target.mean(), 0.5 / (1 - target).mean())
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(*inputs), target, weight)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        model.last.bias.add_(target.mean().logit())
    return model.eval()


def rescorer_file(model: Rescorer, model_sha256: str, metrics: Mapping[str, Any], tomograms: Iterable[str]) -> bytes:
    """The file of a head, for a checkpoint with that hash, which also says what it learned from and measured."""
    about = {
        "model_sha256": model_sha256,
        "metrics": json.dumps(metrics),
        "tomograms": json.dumps(sorted(tomograms)),
    }
    return safetensors.torch.save(model.state_dict(), about)


def load_rescorer(checkpoint: str, model_sha256: str, numbers: tuple[int, int]) -> Rescorer:
    """The head in the directory of the `checkpoint` with that hash, for so many channels and numbers of geometry.

    Raises CheckpointError if it is damaged, learned from another model's runs, or takes other numbers.
    """
    source = storage.join(checkpoint, RESCORER)
    data = storage.read_bytes(source)
    tensors = parse_tensors(data, source)
    of = _about(data).get("model_sha256")
    if of != model_sha256:
        raise CheckpointError(
            f"{source}: was learned with the model {str(of)[:12]}, and the checkpoint is {model_sha256[:12]}; "
            "run motor-ray rescore again, or remove the file"
        )
    model = Rescorer(*numbers)
    load_tensors(model, tensors, source)
    return model.eval()


def learned_from(checkpoint: str) -> set[str]:
    """The tomograms that the head in the directory `checkpoint` learned from. Raises CheckpointError."""
    source = storage.join(checkpoint, RESCORER)
    data = storage.read_bytes(source)
    parse_tensors(data, source)
    return set(json.loads(_about(data).get("tomograms", "[]")))


def _about(data: bytes) -> dict[str, str]:
    """What is written beside the tensors: safetensors begin with the length of their JSON header, and that."""
    length = int.from_bytes(data[:8], "little")
    about: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return about
