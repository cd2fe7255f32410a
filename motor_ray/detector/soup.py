"""Weights of several training runs, or of several moments of one, become one network: as good as an ensemble at best,
and never slower than one of them.

Uniform averages, after Izmailov et al. 2018 (arXiv 1803.05407) and Wortsman et al. 2022 (arXiv 2203.05482). They make
sense for networks that began alike: snapshots of one run, or runs that were started from the same checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from motor_ray.detector.model import Detector, standardise

Weights = dict[str, torch.Tensor]


def average_weights(states: Iterable[Mapping[str, torch.Tensor]]) -> Weights:
    """The mean, summed in float64, of each tensor of the state dicts, which all have the same.

    Running statistics of batch normalisation are averaged like weights; integers, which count, are the first one's.
    """
    first: Mapping[str, torch.Tensor] = {}
    sums: Weights = {}
    count = 0
    for state in states:
        first = first or state
        count += 1
        for name, tensor in state.items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
    return {name: (sums[name] / count).to(tensor.dtype) if name in sums else tensor for name, tensor in first.items()}


@torch.no_grad()
def take_statistics(model: Detector, frames: torch.Tensor, batch: int) -> None:
    """Replace the running statistics of `model`'s batch normalisation by those of uint8 `frames` `(n, c, H, W)`.

    Statistics of averaged weights are not the average of statistics (Izmailov et al. 2018). `n` is 2 or more; a last
    batch that is not full is left out, for each counts as much.
    """
    norms = list(_norms(model))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts the same
        norm.train()
    for part in torch.split(frames, batch):
        if len(part) == min(batch, len(frames)):
            model(standardise(part))
    model.eval()


def _norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
