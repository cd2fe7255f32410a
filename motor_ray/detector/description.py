"""What checkpoints say of themselves, and whether several can answer together.

Needs no torch, so that whoever only asks for it need not wait for that.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import motor_ray
from motor_ray import storage
from motor_ray.config import RunSettings
from motor_ray.config_values import flat, settings_from
from motor_ray.errors import CheckpointError, OutageError, StorageError

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
TENSORS = f"model{SUFFIX}"
DESCRIPTION = "model.json"

CALIBRATION = "calibration.json"
"""From which score of the model there is a motor, beside it."""

RESCORER = f"rescorer{SUFFIX}"
"""What `motor-ray rescore` learned with it: a head that judges its candidates in three dimensions."""

RESCORED_CALIBRATION = "calibration_rescored.json"
"""From which score of that head there is a motor."""

SNAPSHOTS = "snapshots"
"""Folder of a training run that stands for all the checkpoints in it."""

Models = str | Sequence[str]
"""A checkpoint, or several that answer together."""

MUST_AGREE = ("frame.", "preprocess.", "model.in_slices", "model.slice_step", "targets.box", "targets.reach_angstrom")
"""Beginnings of the settings that checkpoints which answer together must share: what a frame shows, and what a box on
it means. How they were trained, and with which network, may differ."""

ARCHITECTURE = ("model.",)
"""The same for checkpoints whose weights are to be averaged."""

MAY_DIFFER = {"model.pretrained"}
"""Where the weights once came from makes no other network."""


class Description(NamedTuple):
    """How a detector came to be."""

    settings: RunSettings
    """Of the run that trained it."""

    metrics: dict[str, Any]
    """What that run measured of it."""

    sha256: str
    """Of the file of its tensors: the model's name in every result."""


class Ensemble(NamedTuple):
    """Checkpoints that answer together; mostly one alone."""

    uris: list[str]
    members: list[Description]

    @property
    def settings(self) -> RunSettings:
        """Of the run that trained the first; those that matter for all are the same."""
        return self.members[0].settings

    @property
    def metrics(self) -> dict[str, Any]:
        """What training measured, which of several together is nothing."""
        return self.members[0].metrics if len(self.members) == 1 else {}

    @property
    def sha256(self) -> str:
        """The one checkpoint's, or of those of all, in their order."""
        hashes = [member.sha256 for member in self.members]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def told(self) -> list[dict[str, Any]]:
        """Who they are, for people to read."""
        return [
            {"model": uri, "sha256": member.sha256, "backbone": member.settings.model.backbone}
            for uri, member in zip(self.uris, self.members, strict=True)
        ]


def describe_models(models: Models) -> Ensemble:
    """Of the checkpoints that `models` names; a folder called ``snapshots`` stands for all in it.

    Raises as `describe_checkpoint` and `check_compatible`, and CheckpointError if there are none.
    """
    uris = find_checkpoints(models)
    members = [describe_checkpoint(uri) for uri in uris]
    check_compatible(uris, members)
    return Ensemble(uris, members)


def find_checkpoints(models: Models) -> list[str]:
    """URIs, that hold for every process, of the checkpoints that `models` names. Raises CheckpointError if none are."""
    found = []
    for uri in [models] if isinstance(models, str) else models:
        uri = storage.absolute(uri).rstrip("/")
        found += snapshots_in(uri) if uri.rsplit("/", 1)[-1] == SNAPSHOTS else [uri]
    if not found:
        raise CheckpointError("no checkpoint is named; give --model one or several, such as STORAGE/NAME/best")
    return found


def snapshots_in(uri: str) -> list[str]:
    """The checkpoints in the folder `uri`, by name; itself if it is one. Raises CheckpointError if there are none."""
    if storage.exists(storage.join(uri, DESCRIPTION)):
        return [uri]
    names = [name for name in storage.list_folders(uri) if storage.exists(storage.join(uri, name, DESCRIPTION))]
    if not names:
        raise CheckpointError(
            f"{uri}: holds no checkpoints; a run keeps snapshots with --train.schedule cyclic, one after each cycle"
        )
    return [storage.join(uri, name) for name in names]


def check_compatible(uris: Sequence[str], members: Sequence[Description], *, weights: bool = False) -> None:
    """Raises CheckpointError if the checkpoints at `uris` cannot answer together.

    With `weights`, if theirs cannot be averaged.
    """
    which = (*MUST_AGREE, *ARCHITECTURE) if weights else MUST_AGREE
    first = _relevant(members[0], which)
    for uri, member in zip(uris[1:], members[1:], strict=True):
        other = _relevant(member, which)
        differing = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{uri}: was trained with {name} {other.get(name)}, but {uris[0]} with {first.get(name)}; "
                f"{'weights are averaged of one network' if weights else 'models that answer together see one frame'}: "
                f"leave one out, or train it with {as_flag(name, first.get(name))}"
            )


def as_flag(name: str, value: Any) -> str:
    """How a setting, such as ``frame.size``, is given this value on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--{'.no-'.join(name.rsplit('.', 1))}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *map(str, values)])


def _relevant(member: Description, beginnings: tuple[str, ...]) -> Mapping[str, Any]:
    every = flat(member.settings.model_dump(mode="json"))
    if every["model.in_slices"] == 1:  # then there is no step between slices
        every = {name: value for name, value in every.items() if not name.startswith("model.slice_step")}
    return {name: value for name, value in every.items() if name.startswith(beginnings) and name not in MAY_DIFFER}


def describe_checkpoint(uri: str | Path) -> Description:
    """Of the checkpoint in the directory `uri`, whose tensors are there and whole.

    Raises CheckpointError if a file is missing, damaged or of another format version, ConfigError if its settings
    are not ours.
    """
    return read_checkpoint(uri)[0]


def rescorer_hash(uri: str) -> str | None:
    """The sha256 of the RESCORER in the checkpoint directory `uri`, None if there is none. Raises StorageError."""
    where = storage.join(uri, RESCORER)
    return hashlib.sha256(storage.read_bytes(where)).hexdigest() if storage.exists(where) else None


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
