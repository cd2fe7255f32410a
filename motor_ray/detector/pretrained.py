"""The weights that a backbone starts from: torchvision's, a file's, or none."""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from motor_ray import storage
from motor_ray.errors import CheckpointError, OutageError, StorageError

SHOWN = 3
"""Tensors that a message names before it only counts them."""


def load_pretrained(backbone: nn.Module, name: str, pretrained: str) -> None:
    """Fill `backbone`, the network `name`, as the setting `pretrained` says: 'imagenet', 'none', or a path or URI.

    A file holds the state dict of torchvision's whole network, of the backbone alone, or of a whole detector.
    Raises CheckpointError if the weights cannot be had or do not fit.
    """
    if pretrained == "none":
        return
    tensors = imagenet_tensors(name) if pretrained == "imagenet" else read_tensors(pretrained)
    ours = {key.removeprefix("backbone."): tensor for key, tensor in tensors.items() if key.startswith("backbone.")}
    ignored = ("fc.", "classifier.", "features.8.")  # what torchvision's networks have behind the last stage
    kept = ours or {key: tensor for key, tensor in tensors.items() if not key.startswith(ignored)}
    load_tensors(backbone, kept, f"model.pretrained {pretrained}, as weights of {name}")


def imagenet_tensors(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights of torchvision's network `name`, from torch's cache or, once, from the internet."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        tensors: dict[str, torch.Tensor] = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
        problem = error.reason if isinstance(error, URLError) else error
        raise CheckpointError(
            f"model.pretrained 'imagenet': the weights of {name} are not at {cached} and cannot be fetched from "
            f"{weights.url} ({problem}); put that file there, or give any state dict with --model.pretrained FILE, or "
            "start from random weights with --model.pretrained none"
        ) from None
    return tensors


def read_tensors(uri: str) -> dict[str, torch.Tensor]:
    """The state dict in the .safetensors, .pt or .pth file `uri`; runs no code in it. Raises CheckpointError."""
    if not uri.endswith((".safetensors", ".pt", ".pth")):
        raise CheckpointError(f"{uri}: weights come from a .safetensors, .pt or .pth file, or 'imagenet', or 'none'")
    try:
        data = storage.read_bytes(uri)
    except OutageError:
        raise
    except StorageError as error:
        raise CheckpointError(f"{error}; give the path or URI of a state dict") from None
    return parse_tensors(data, uri)


def parse_tensors(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """The state dict in `data`, in the format that the name `source` ends in. Raises CheckpointError."""
    try:
        if source.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: a damaged file raises whatever it trips over
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{source}: is damaged or not a file of tensors alone ({problem})") from None
    if not isinstance(values, Mapping) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise CheckpointError(f"{source}: holds something else than tensors by name; save model.state_dict() alone")
    return dict(values)


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, *, assign: bool = False) -> None:
    """Load `tensors` into `module`, or with `assign` make them its own. Raises CheckpointError naming the misfits."""
    wanted = module.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in tensors and tensors[key].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{_some(names)} {what}" for what, names in problems.items() if names)
        raise CheckpointError(f"{source}: the tensors do not fit the network: {told}")
    module.load_state_dict(dict(tensors), assign=assign)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
