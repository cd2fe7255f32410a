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
from typing import Any

import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

import motor_ray
from motor_ray import storage
from motor_ray.config import RunSettings
from motor_ray.detector.description import (
    CALIBRATION,
    DESCRIPTION,
    FORMAT_VERSION,
    RESCORED_CALIBRATION,
    RESCORER,
    SUFFIX,
    TENSORS,
    read_checkpoint,
)
from motor_ray.detector.model import Detector, build_model
from motor_ray.detector.pretrained import load_tensors, parse_tensors
from motor_ray.errors import StorageError

LEARNED_LATER = {CALIBRATION, RESCORED_CALIBRATION, RESCORER}
"""Of a model, by other verbs: with other weights it is worth nothing."""

OURS = {TENSORS, DESCRIPTION, "training_state.pt", *LEARNED_LATER}
"""What a checkpoint may hold; a directory with anything else is not replaced."""


def save_checkpoint(uri: str | Path, model: Detector, settings: RunSettings, metrics: Mapping[str, Any]) -> str:
    """Write `model` to the directory `uri`, replacing what is there; returns the hash of its tensors.

    A crash on the way leaves what was there before: a local directory is swapped; in an object store, which cannot,
    tensors go under a name of their own, then the description that names them, and the old tensors last. What was
    learned of the old model goes with it. Raises StorageError.
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
        _replace_objects(uri, data, description)
    return str(description["sha256"])


def load_checkpoint(uri: str | Path) -> Detector:
    """The detector in the directory `uri`, on the CPU and in evaluation mode.

    Raises as `describe_checkpoint`, and if the tensors are not its network's.
    """
    description, data = read_checkpoint(str(uri))
    source = storage.join(str(uri), TENSORS)
    with torch.device("meta"):  # the tensors are about to come: no memory, time or random numbers for others
        model = build_model(description.settings.model.model_copy(update={"pretrained": "none"}))
    load_tensors(model, parse_tensors(data, source), source, assign=True)
    return model.eval()


def load_weights(uri: str | Path, model: Detector) -> None:
    """Copy the tensors of the checkpoint `uri` into `model`; raises as `load_checkpoint`."""
    source = storage.join(str(uri), TENSORS)
    load_tensors(model, parse_tensors(read_checkpoint(str(uri))[1], source), source)


def _write(uri: str, data: bytes, description: dict[str, Any], tensors: str = TENSORS) -> None:
    storage.write_bytes(storage.join(uri, tensors), data)
    storage.write_json(storage.join(uri, DESCRIPTION), description | {"tensors": tensors})


def _replace_objects(uri: str, data: bytes, description: dict[str, Any]) -> None:
    old = {name for name in storage.list_names(uri) if name.endswith(SUFFIX) or name in LEARNED_LATER}
    tensors = f"model-{description['sha256'][:12]}{SUFFIX}"
    _write(uri, data, description, tensors)
    for name in old - {tensors}:
        storage.remove(storage.join(uri, name))


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
            try:
                os.rename(fresh, target)
            except BaseException:
                if old.exists():  # it would go with the folder that both were in
                    os.rename(old, target)
                raise
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({storage.reason(error)})") from None


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: is a file, expected a directory to write a checkpoint to; give another name")
    there = {file.name for file in target.iterdir()} if target.exists() else set()
    # A checkpoint that was copied from an object store names its tensors after their hash.
    if foreign := sorted(name for name in there - OURS if not (name.startswith("model-") and name.endswith(SUFFIX))):
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
