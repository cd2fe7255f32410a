"""What workers tell one another, through torch.distributed; a worker alone has nobody to tell."""

from typing import TypeVar

import torch
import torch.distributed

from motor_ray.errors import RunError

T = TypeVar("T")


class AgreedError(RunError):
    """Why training cannot go on; all workers raise it, so that none waits for the others."""


def gathered(own: list[T]) -> list[T]:
    """The lists of all workers as one, in order; every worker gets it."""
    if not torch.distributed.is_initialized():
        return own
    parts: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    return [one for part in parts for one in part]


def share_buffers(model: torch.nn.Module) -> None:
    """Give every worker the first one's batch statistics, which are the ones that are saved."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
