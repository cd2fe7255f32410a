"""A `motor-ray train` that tests start, watch and disturb."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from motor_ray.storage import exists, filesystem, join, read_bytes, read_json
from tests.distributed.killers import left_of, workers_below

SLOT: dict[str, Any] = {
    "num_cpus": 1,
    "resources": {"slot": 1},
    "memory": 2 * 10**9,
    "object_store_memory": 100 * 10**6,
}

SECONDS_TO_END = 30
"""What processes get to notice that the one they work for is gone."""


class Training:
    """A `motor-ray train` in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: str, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log

    def over(self) -> bool:
        """Whether it has ended; AssertionError with what it said if it failed."""
        assert not self.process.poll(), self.log.read_text()[-4000:]
        return self.process.poll() is not None

    def lines(self) -> list[dict[str, Any]]:
        """The validations so far."""
        uri = join(self.folder, "metrics.jsonl")
        return [json.loads(line) for line in read_bytes(uri).splitlines()] if exists(uri) else []

    def checkpoints(self) -> set[str]:
        """Ray Train's, that are written or being written."""
        if not exists(join(self.folder, "checkpoint_manager_snapshot.json")):
            return set()
        files, path = filesystem(self.folder)
        files.invalidate_cache(path)
        return {name for name in map(name_of, files.ls(path, detail=False)) if name.startswith("checkpoint_2")}

    def has_validated(self, times: int) -> Callable[[], bool]:
        return lambda: len(self.lines()) >= times

    def ends_well(self) -> dict[str, Any]:
        """What it says at the end."""
        said, _ = self.process.communicate()
        assert self.process.returncode == 0, self.log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(said)
        return result


class Labelled(NamedTuple):
    """What is trained on, how, and where runs go: URIs, of which settings and logs are of this machine."""

    archive: str
    labels: str
    storage: str
    config: Path

    @contextmanager
    def started(self, name: str, *flags: str, **variables: str) -> Iterator[Training]:
        """A training of that name, which does not outlive the block."""
        command = [sys.executable, "-m", "motor_ray.cli", "train", "--archive", self.archive]
        command += ["--labels", self.labels, "--config", str(self.config)]
        command += ["--storage", self.storage, "--name", name, *flags]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
        log = self.config.parent / f"{name}.log"
        with (
            log.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
        ):
            try:
                yield Training(process, join(self.storage, name), log)
            finally:
                left = workers_below(process.pid)
                process.kill()
        assert not left_of(left, SECONDS_TO_END)


def name_of(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def goes_through_all_samples(training: Training, epochs: int, workers: int = 2) -> None:
    """Assert that a run of changing numbers of workers, so many at most, did all its epochs, and no step in vain."""
    lines = training.lines()
    assert [line["epoch"] for line in lines] == list(range(epochs))
    run = read_json(join(training.folder, "run.json"))
    samples, batch = run["slices"]["train"], run["settings"]["train"]["batch_size"]
    fewest, most = (epochs * math.ceil(samples / (number * batch)) for number in (workers, 1))
    assert fewest <= lines[-1]["step"] <= most + 1
