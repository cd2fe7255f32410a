"""Settings as plain values: checked, read from files, compared and named in short; what they are is in `config`."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from motor_ray.config import RunSettings, Settings
from motor_ray.errors import ConfigError

Tree = TypeVar("Tree", bound=Settings)


def settings_from(values: Mapping[str, Any], source: str = "settings") -> RunSettings:
    """Check `values`, a nested mapping such as a YAML file holds, against the tree of a run; raises ConfigError."""
    return checked(RunSettings, values, source)


def checked(tree: type[Tree], values: Mapping[str, Any], source: str) -> Tree:
    """`values`, a nested mapping, as settings of the kind `tree`.

    Raises ConfigError naming every setting that is wrong, with the nearest known name for an unknown one.
    """
    try:
        return tree.model_validate(values)
    except ValidationError as error:
        sentences = [_sentence(one, tree) for one in error.errors()]
        raise ConfigError(f"{source}: {'; '.join(sentences)}") from None


def read_settings(path: str | Path) -> RunSettings:
    """Read a YAML file of a run's settings; raises as `read_tree`."""
    return read_tree(path, RunSettings)


def read_tree(path: str | Path, tree: type[Tree]) -> Tree:
    """Read a YAML file of settings. Raises ConfigError if it is missing, not YAML, or names a wrong setting."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file of settings") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return tree()
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}, expected groups of settings such as 'train: {{epochs: 20}}'"
        )
    return checked(tree, values, str(path))


HOW_NOT_WHAT = {
    "archive": {"anonymous", "timeout_seconds", "attempts"},
    "detect": {"loaders", "slabs_per_loader", "scorers"},
}
"""Settings that change how a detection runs, not what it finds: a run may go on with others."""

APART = {"pretrain", "pseudo", "care"}
"""Groups that neither the training of a detector nor detection asks."""

TRAIN_HOW_NOT_WHAT = {
    *(f"archive.{name}" for name in HOW_NOT_WHAT["archive"]),
    *(f"detect.{name}" for name in HOW_NOT_WHAT["detect"]),
    *(f"train.{name}" for name in ("checkpoint_steps", "max_failures", "cache", "tensorboard", "mlflow")),
    *(f"train.{name}" for name in ("worker_resources", "tomograms", "tomograms_epochs")),
}
"""Settings with which, changed, a training run may go on all the same."""


def results_hash(settings: RunSettings) -> str:
    """A short name for what these settings find: equal for settings that differ only in HOW_NOT_WHAT."""
    usual = RunSettings()
    groups = {}
    for group, names in HOW_NOT_WHAT.items():
        same = {name: getattr(getattr(usual, group), name) for name in names}
        groups[group] = getattr(settings, group).model_copy(update=same)
    return _hash(settings.model_copy(update=groups).model_dump(mode="json", exclude=APART))


def settings_differences(there: Mapping[str, Any], here: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """What differs between two dumps of settings, such as "train.epochs was 10, is 20", but for TRAIN_HOW_NOT_WHAT.

    Nor do groups count that stand APART, unless `whole`.
    """
    left_out = set() if whole else APART
    was, now = (
        flat({group: own for group, own in values.items() if group not in left_out}) for values in (there, here)
    )
    return [
        f"{name} was {was.get(name)}, is {now.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and name not in TRAIN_HOW_NOT_WHAT
    ]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their whole names."""
    return {f"{group}.{name}": value for group, settings in values.items() for name, value in settings.items()}


def settings_hash(settings: Settings) -> str:
    """A short name for these settings: equal trees have equal hashes, on any machine."""
    return _hash(settings.model_dump(mode="json"))


def _hash(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _sentence(error: Mapping[str, Any], tree: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # our own words about several settings, which name them and what they are
        return f"{place}: {error['ctx']['error']}" if place else str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}, got {error['input']!r}"
    known = _known_names(error["loc"][:-1], tree)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{place}: unknown setting; {hint}"


def _known_names(groups: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    for group in groups:
        annotation = model.model_fields[str(group)].annotation
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
