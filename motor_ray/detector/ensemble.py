"""Several predictions for the same frames become one: those of several networks, of several views, or of both.

Pure functions of tensors. What is averaged must lie on the same cells; `tta` moves views back there.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from motor_ray.config import Averaging
from motor_ray.detector.model import Prediction


def average(predictions: Sequence[Prediction], how: Averaging) -> Prediction:
    """The mean of `predictions`, all of the same frames and on the same cells; one alone is returned as it is.

    Heatmap and presence are averaged as `how` says; the box at a cell, size and offset, is the mean of the
    predictions' boxes there, each weighted by its heatmap's probability at that cell: a network that sees no centre
    in a cell has learnt nothing of the box that would belong to it (after weighted boxes fusion, Solovyev et al. 2021,
    arXiv 1910.13302). Where one logit is not finite, neither is the mean.
    """
    if len(predictions) == 1:
        return predictions[0]
    heatmap, size, offset, presence = (torch.stack(tensors) for tensors in zip(*predictions, strict=True))
    # Through logarithms, since far from any motor all probabilities round to 0.
    weights = F.logsigmoid(heatmap).softmax(dim=0)
    size, offset = ((weights * maps).sum(dim=0) for maps in (size, offset))
    return Prediction(mean_logits(heatmap, how), size, offset, mean_logits(presence, how))


def mean_logits(logits: torch.Tensor, how: Averaging) -> torch.Tensor:
    """The logits `(...)` that stand for the mean of `logits` `(n, ...)`: of themselves, or of their probabilities."""
    if how == "logit":
        return logits.mean(dim=0)
    # The quotient of the mean of p and that of 1 - p, exact also where p itself would round to 0 or 1.
    mean = F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)
    return torch.where(logits.isfinite().all(dim=0), mean, torch.nan)
