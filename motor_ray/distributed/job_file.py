"""A job as a file: which verb runs on the cluster, with what, and what it takes.

command: train --archive s3://bucket/tomograms --labels s3://bucket/labels.csv --storage s3://bucket/runs --name r101
settings: {train: {epochs: 100}}      or the name of a YAML file of settings, beside this one
environment: [AWS_ENDPOINT_URL]       variables that are taken along
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from motor_ray.config import Settings
from motor_ray.config_values import read_tree
from motor_ray.errors import ConfigError

STARTED_AGAIN = {
    **dict.fromkeys(("train", "ablate", "tune", "pretrain"), "--or-resume"),
    **dict.fromkeys(("detect", "pseudo-label"), None),
}
"""Verbs that go on where they stopped when they are started again, and the option that it takes."""

SETTINGS = "settings.yaml"
"""What the settings are called on the cluster."""


class Job(Settings):
    """What is to be done on a cluster."""

    command: str
    """The verb and its options, as on the command line but for --config."""

    settings: dict[str, Any] | str = Field(default={})
    """Settings of the run, or a YAML file of them, by its name as seen from this file."""

    environment: tuple[str, ...] = ()
    """Environment variables whose values go along. Whoever may look at the cluster's jobs can read them there, so
    credentials are better given to its nodes."""

    cpus: float = Field(1.0, ge=0)
    """CPUs set aside for the process that steers the job."""

    where: dict[str, str] = Field(default={})
    """Labels of the nodes that it may run on, such as {ray.io/node-group: cpu}; not one that may be taken away."""

    attempts: int = Field(4, ge=1)
    """How often a job that died is started again. A wrong command or wrong input is not tried twice."""

    code: bool = False
    """Take this motor_ray along, instead of what the cluster has installed."""


def read_job(path: str | Path) -> Job:
    """The job in a file, its settings read. Raises ConfigError if anything in it is wrong."""
    job = read_tree(path, Job)
    if isinstance(job.settings, str):
        beside = Path(path).parent / job.settings
        job = job.model_copy(update={"settings": _values(beside)})
    check_command(job, str(path))
    return job


def check_command(job: Job, source: str) -> None:
    """Raises ConfigError unless the command can be given as it stands, with the settings."""
    words = words_of(job, source)
    if not words or words[0] not in STARTED_AGAIN:
        raise ConfigError(
            f"{source}: command begins with {words[0] if words else 'nothing'!r}, expected one of "
            f"{', '.join(STARTED_AGAIN)}"
        )
    if "--config" in words:
        raise ConfigError(f"{source}: command has --config; put the settings, or the file's name, under settings")


def words_of(job: Job, source: str = "command") -> list[str]:
    """The command's words. Raises ConfigError for an open quote."""
    try:
        return shlex.split(job.command)
    except ValueError as error:
        raise ConfigError(f"{source}: command {job.command!r}: {error}") from None


def entrypoint(job: Job) -> str:
    """What the cluster runs; the same every time, for what was begun is gone on with."""
    verb, *options = words_of(job)
    again = STARTED_AGAIN[verb]
    extra = [again] if again and again not in options and "--resume" not in options else []
    return shlex.join(["python", "-m", "motor_ray.cli", verb, "--config", SETTINGS, *options, *extra])


def submission_id(job: Job) -> str:
    """A name for the job: the same job has the same name, so that it is not started twice."""
    said = json.dumps([words_of(job), job.settings], sort_keys=True)
    name = re.sub(r"[^a-z0-9]+", "-", _option(job, "--name") or _option(job, "--out") or "").strip("-")[-40:]
    verb = words_of(job)[0]
    return "-".join(filter(None, ["motor-ray", verb, name, hashlib.sha256(said.encode()).hexdigest()[:8]]))


def _option(job: Job, option: str) -> str | None:
    words = words_of(job)
    return words[words.index(option) + 1].lower() if option in words[:-1] else None


def _values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the YAML file of the job's settings") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings")
    return values
