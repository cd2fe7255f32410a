"""What a checkpoint says of itself. Needs no torch, so that whoever only asks for it need not wait for that."""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import motor_ray
from motor_ray import storage
from motor_ray.config import RunSettings, settings_from
from motor_ray.errors import CheckpointError, OutageError, StorageError

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
TENSORS = f"model{SUFFIX}"
DESCRIPTION = "model.json"


class Description(NamedTuple):
    """How a detector came to be."""

    settings: RunSettings
    """Of the run that trained it."""

    metrics: dict[str, Any]
    """What that run measured of it."""

    sha256: str
    """Of the file of its tensors: the model's name in every result."""


def describe_checkpoint(uri: str | Path) -> Description:
    """Of the checkpoint in the directory `uri`, whose tensors are there and whole.

    Raises CheckpointError if a file is missing, damaged or of another format version, ConfigError if its settings
    are not ours.
    """
    return read_checkpoint(uri)[0]


def read_checkpoint(uri: str | Path) -> tuple[Description, bytes]:
    """The description in the directory `uri`, and the file of tensors; raises as `describe_checkpoint`."""
    uri = str(uri)
    try:
        description = storage.read_json(storage.join(uri, DESCRIPTION))
        _check_description(uri, description)
        data = storage.read_bytes(storage.join(uri, description["tensors"]))
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
    settings = settings_from(description["settings"], f"{uri}/{DESCRIPTION}")
    return Description(settings, description["metrics"], description["sha256"]), data


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
    expected = {"sha256": str, "settings": dict, "metrics": dict, "tensors": str}
    wrong = [name for name, kind in expected.items() if not isinstance(description.get(name), kind)]
    if not wrong and not re.fullmatch(r"[\w-]+\.safetensors", description["tensors"]):
        wrong = ["tensors"]  # which is the name of a file beside it, and nothing else
    if wrong:
        raise CheckpointError(f"{where}: {', '.join(wrong)} missing or malformed; copy the checkpoint again")
