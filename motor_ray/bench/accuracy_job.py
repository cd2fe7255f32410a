"""A row of the accuracy benchmark with one seed: where its things are, and its trained detector at work."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from motor_ray.bench.accuracy_archives import Sizes
from motor_ray.bench.accuracy_peers import PeerLooker, load_peer
from motor_ray.bench.accuracy_rows import (
    AFTER_LOOKING,
    LEARNED_BEFORE,
    PEERS,
    ROWS,
    Keys,
    Row,
    keys_of,
    settings_of_row,
)
from motor_ray.config import RunSettings
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.description import SNAPSHOTS, find_checkpoints
from motor_ray.detector.looks import Looker
from motor_ray.distributed.scoring import Looking
from motor_ray.errors import UnfinishedError
from motor_ray.storage import read_json


class Job(NamedTuple):
    """A row and a seed."""

    work: Path
    name: str
    seed: int
    sizes: Sizes

    @property
    def row(self) -> Row:
        """What it is."""
        return ROWS[self.name]

    @property
    def settings(self) -> RunSettings:
        """Of its training, and of how it looks."""
        return settings_of_row(self.name, self.seed, self.sizes)

    @property
    def needs(self) -> list["Job"]:
        """What must be done before."""
        return [self._replace(name=name) for name in self.row.of]

    @property
    def folder(self) -> Path:
        """Where everything of it is."""
        return self.work / "rows" / self.sizes.training / f"{self.name}-{self.seed}"

    @property
    def keys(self) -> Keys:
        """Of its steps."""
        return keys_of(self.name, self.seed, self.sizes)

    @property
    def seen_by(self) -> "Job":
        """The job that looks at the slices: the one that it needs, if only what comes afterwards is another."""
        if self.row.training != "none" or len(self.needs) != 1 or set(self.row.changes) - set(AFTER_LOOKING):
            return self
        return self.needs[0]

    @property
    def result(self) -> dict[str, Any] | None:
        """What came of it, None if it is not done or was done with other settings."""
        return said_with(self.folder / "result.json", self.keys.scored)

    @property
    def done(self) -> dict[str, Any]:
        """What came of it. Raises UnfinishedError if it is not done."""
        if (result := self.result) is None:
            raise UnfinishedError(f"{self.folder}: is not done, and another row needs it")
        return result


def said_with(file: Path, key: str) -> dict[str, Any] | None:
    """What is in a JSON file if it was written with this key."""
    there: dict[str, Any] = read_json(str(file)) if file.exists() else {}
    return there if there.get("key") == key else None


def models_of(job: Job) -> list[str]:
    """The checkpoints that answer for a row that is no peer's."""
    if job.row.training in LEARNED_BEFORE:
        return [model for need in job.needs for model in models_of(need)]
    cyclic = job.settings.train.schedule == "cyclic" and job.row.training != "soup"
    return find_checkpoints(str(job.folder / (SNAPSHOTS if cyclic else "best")))


def looking_of(job: Job) -> Looking:
    """The trained detector of a row at work, on one thread; a peer in float32 if its boxes suffer otherwise."""
    detect = job.settings.detect
    if job.row.training in PEERS:
        peer = load_peer(job.row.training, job.settings, job.folder)
        return PeerLooker(peer, job.settings, threshold=detect.score_threshold, precise=not peer.narrow_is_exact)
    return Looker(models_of(job), detect, threads=1, compiled="off")


def parameters_of(job: Job) -> int:
    """Numbers that the row's detector learned, of all networks that answer."""
    if job.row.training in PEERS:
        networks: list[torch.nn.Module] = [load_peer(job.row.training, job.settings, job.folder)]
    else:
        networks = [load_checkpoint(model) for model in models_of(job)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def as_json(jobs: Sequence[Job], what: str) -> dict[str, Any]:
    """What `main` is told."""
    return {
        "what": what,
        "work": str(jobs[0].work),
        "sizes": asdict(jobs[0].sizes),
        "jobs": [[job.name, job.seed] for job in jobs],
    }


def from_json(said: dict[str, Any]) -> list[Job]:
    """The inverse of `as_json`."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in said["sizes"].items()
    }
    return [Job(Path(said["work"]), name, seed, Sizes(**values)) for name, seed in said["jobs"]]
