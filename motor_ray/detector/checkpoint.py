"""Trained detectors on disk and in buckets: a directory of ``model.safetensors`` and ``model.json``.

No pickle: nothing in a checkpoint can run. ``model.json`` names the hash of the tensors it belongs to, so that a
half-replaced checkpoint is noticed.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

import motor_ray
from motor_ray import storage
from motor_ray.config import RunSettings, settings_from
from motor_ray.detector.model import Detector, build_model
from motor_ray.detector.pretrained import load_tensors, parse_tensors
from motor_ray.errors import CheckpointError, OutageError, StorageError

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DESCRIPTION = "model.json"
OURS = {TENSORS, DESCRIPTION, "training_state.pt"}
"""What a checkpoint may hold; a directory with anything else is not replaced."""


class Checkpoint(NamedTuple):
    """A detector, and how it came to be."""

    model: Detector
    """On the CPU, in evaluation mode."""

    settings: RunSettings
    """Of the run that trained it."""

    metrics: dict[str, Any]
    """What that run measured of it."""

    sha256: str
    """Of the file of its tensors: the model's name in every result."""


def save_checkpoint(uri: str | Path, model: Detector, settings: RunSettings, metrics: Mapping[str, Any]) -> str:
    """Write `model` to the directory `uri`, replacing what is there; returns the hash of its tensors.

    A crash on the way leaves a local directory as it was. In an object store the description goes last, so that
    a checkpoint is complete when it can be read. Raises StorageError.
    """
    uri = str(uri)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors)
    description = {
        "format_version": FORMAT_VERSION,
        "motor_ray": motor_ray.__version__,
        "git_commit": _git_commit(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "settings": settings.model_dump(mode="json"),
        "metrics": dict(metrics),
    }
    files, path = storage.filesystem(uri)
    if isinstance(files, LocalFileSystem):
        _replace_directory(Path(path), data, description)
    else:
        _write(uri, data, description)
    return str(description["sha256"])


def load_checkpoint(uri: str | Path) -> Checkpoint:
    """The detector in the directory `uri`.

    Raises CheckpointError if a file is missing, damaged or of another format version, ConfigError if its settings
    are not ours.
    """
    description, tensors = _read(str(uri))
    settings = settings_from(description["settings"], f"{uri}/{DESCRIPTION}")
    with torch.device("meta"):  # the tensors are about to come: no memory, time or random numbers for others
        model = build_model(settings.model.model_copy(update={"pretrained": "none"}))
    load_tensors(model, tensors, f"{uri}/{TENSORS}", assign=True)
    return Checkpoint(model.eval(), settings, description["metrics"], description["sha256"])


def load_weights(uri: str | Path, model: Detector) -> None:
    """Copy the tensors of the checkpoint `uri` into `model`. Raises CheckpointError, also if they do not fit it."""
    _, tensors = _read(str(uri))
    load_tensors(model, tensors, f"{uri}/{TENSORS}")


def _read(uri: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        description = storage.read_json(storage.join(uri, DESCRIPTION))
        _check_description(uri, description)
        data = storage.read_bytes(storage.join(uri, TENSORS))
    except OutageError:
        raise
    except StorageError as error:
        raise CheckpointError(
            f"{error}; a checkpoint is a directory of {DESCRIPTION} and {TENSORS}, such as RUN/best"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != description["sha256"]:
        raise CheckpointError(
            f"{uri}: the tensors have sha256 {found[:12]}, {DESCRIPTION} expects {description['sha256'][:12]}; "
            "a file is damaged, or the checkpoint was being replaced: copy it again or use another one"
        )
    return description, parse_tensors(data, storage.join(uri, TENSORS))


def _check_description(uri: str, description: Any) -> None:
    where = storage.join(uri, DESCRIPTION)
    version = description.get("format_version") if isinstance(description, dict) else None
    if version is None:
        raise CheckpointError(
            f"{where}: has no format_version, so it is not ours; give a checkpoint of motor-ray train"
        )
    if version != FORMAT_VERSION:
        wrote = description.get("motor_ray", "unknown")
        raise CheckpointError(
            f"{where}: has format version {version!r} (written by motor_ray {wrote}), this motor_ray "
            f"{motor_ray.__version__} reads version {FORMAT_VERSION}; use the motor_ray that wrote it, or train anew"
        )
    expected = {"sha256": str, "settings": dict, "metrics": dict}
    if wrong := [name for name, kind in expected.items() if not isinstance(description.get(name), kind)]:
        raise CheckpointError(f"{where}: {', '.join(wrong)} missing or malformed; copy the checkpoint again")


def _write(uri: str, data: bytes, description: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(uri, TENSORS), data)
    storage.write_json(storage.join(uri, DESCRIPTION), description)


def _replace_directory(target: Path, data: bytes, description: dict[str, Any]) -> None:
    """Write beside `target`, then swap by renaming; a kill between the two renames leaves the old one as ``old``."""
    try:
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            fresh, old = Path(work, "fresh"), Path(work, "old")
            fresh.mkdir()
            _write(str(fresh), data, description)
            if target.exists():
                os.rename(target, old)
            os.rename(fresh, target)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({storage.reason(error)})") from None


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: is a file, expected a directory to write a checkpoint to; give another name")
    if target.exists() and (foreign := sorted({file.name for file in target.iterdir()} - OURS)):
        raise StorageError(
            f"{target}: holds {foreign[0]}, which is not of a checkpoint and would be lost; give a new directory"
        )


def _git_commit() -> str | None:
    """The commit of the source tree that is running, None if it was installed from elsewhere."""
    tree = Path(motor_ray.__file__).parents[1]
    if not (tree / ".git").exists() or not shutil.which("git"):
        return None
    asked = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None if asked.returncode == 0 else None
