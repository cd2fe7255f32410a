"""A detector under training: its loss, and what it says on held-out slices.

Knows nothing of Ray, of files or of where samples come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from motor_ray.detector.decode import decode
from motor_ray.detector.losses import detection_loss
from motor_ray.detector.model import Detector, standardise
from motor_ray.distributed.optimisation import Optimisation, unwrapped
from motor_ray.distributed.samples import Batch, Samples, batches, readable
from motor_ray.slices.targets import Targets


class Judged(NamedTuple):
    """What the model says of a slice, beside the truth; boxes are ``(n, 4)`` y, x, height, width in frame pixels."""

    slice_id: str
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    truth: NDArray[np.float64]


class Learner(Optimisation[Batch]):
    """The recipe's optimisation of a detector."""

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The parts of the loss of a batch, and their ``total``, all scalars."""
        images = standardise(self.here(batch.images))
        targets = Targets(*map(self.here, batch.targets))
        with self.precision():
            prediction = self.model(images)
        return detection_loss(prediction, targets, self.settings.loss)

    @property
    def kept(self) -> Detector:
        """The detector that is validated and kept: the average, if there is one."""
        return unwrap(self.model if self.average is None else self.average)

    @torch.no_grad()
    def judge(self, samples: Samples, places: Sequence[int]) -> list[Judged]:
        """What the kept detector says of the samples at `places` that can be read."""
        model = self.kept.eval()
        seen = [place for place in places if samples[place] is not None]
        size = self.settings.train.batch_size
        groups = [seen[start : start + size] for start in range(0, len(seen), size)]
        judged: list[Judged] = []
        for group, batch in zip(groups, batches(samples, groups, self.settings, epoch=None), strict=True):
            with self.precision():
                prediction = model(standardise(self.here(batch.images)))
            # Every peak counts in a mean average precision, however low; so no threshold.
            found = decode(prediction, self.settings.detect.max_detections, threshold=0.0)
            for place, (boxes, scores) in zip(group, found, strict=True):
                sample = readable(samples, place)
                found_here = (boxes.double().cpu().numpy(), scores.double().cpu().numpy())
                judged.append(Judged(sample.slice_id, *found_here, sample.boxes[:, :4]))
        return judged


def unwrap(model: nn.Module) -> Detector:
    """The detector inside a wrapper, such as that for several workers."""
    inner = unwrapped(model)
    assert isinstance(inner, Detector)
    return inner
