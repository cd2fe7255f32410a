"""A `motor-ray detect` that tests start, watch and disturb, and what it must end with."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
import torch

from motor_ray.archive.simulate import simulate_archive
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.storage import arrow_filesystem, exists, filesystem, join, list_names, read_bytes, read_json, read_table
from tests.distributed.conftest import SMALL
from tests.distributed.killers import left_of, until, workers_below

TOMOGRAMS = 16
SETTINGS = settings_from(
    SMALL.model_dump()
    | {
        # A slab a slice, so that there are many; half of them in a second look, so that there is one.
        "detect": {"score_threshold": 0.01, "slab_slices": 1, "z_stride": 2, "candidate_score": 0.235},
    }
)
SECONDS_TO_END = 30
"""What processes get to notice that the one they work for is gone."""


@dataclass(frozen=True)
class Task:
    """A detection that can be run as often as is wanted, each time with results elsewhere."""

    archive: str
    model: str
    config: str
    environment: dict[str, str] = field(default_factory=dict)
    where: tuple[str, ...] = ()
    """What comes before the command, to run it elsewhere."""

    @contextmanager
    def started(self, out: str, *flags: str, **variables: str) -> Iterator["Driver"]:
        """`motor-ray detect`, in a process of its own, which does not outlive the block."""
        command = [*self.where, sys.executable, "-m", "motor_ray.cli", "detect", "--archive", self.archive]
        command += ["--model", self.model]
        command += ["--config", self.config, "--out", out, *flags]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=log,
                env=environment | self.environment | variables,
                start_new_session=True,  # Ctrl-C in a terminal goes to a whole group of processes
            )
            try:
                yield Driver(process, out, said, log)
            finally:
                left = workers_below(process.pid)
                process.kill()
                process.wait()
                assert not left_of(left, SECONDS_TO_END)


@dataclass(frozen=True)
class Driver:
    """A detection that is under way."""

    process: "subprocess.Popen[bytes]"
    out: str
    said: IO[bytes]
    log: IO[bytes]

    def over(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> tuple[int, Any]:
        """Exit code and what it said, or complained of, once it has ended."""
        code = self.process.wait()
        for file in (self.said, self.log):
            file.seek(0)
        said, log = self.said.read(), self.log.read()
        return code, json.loads(said) if said else log.decode()

    def notes(self) -> list[str]:
        """Ray Data's notes of slabs that are written and committed, each of one file of slabs."""
        files, path = filesystem(join(self.out, "checkpoints"))
        files.invalidate_cache()
        return [note for note in map(str, files.find(path)) if note.endswith(".parquet") and ".pending." not in note]

    def files(self) -> dict[str, bytes]:
        """The files of slabs that are committed, by name."""
        names = [Path(note).stem for note in self.notes()]
        slabs = join(self.out, "slabs")
        return {name: read_bytes(join(slabs, name)) for name in list_names(slabs) if name.startswith(tuple(names))}

    def committed(self) -> int:
        """How many slabs will not be looked at again."""
        files, _ = arrow_filesystem(self.out)
        return sum(len(pq.read_table(note, filesystem=files)) for note in self.notes())

    def state(self) -> dict[str, Any]:
        """What run.json says."""
        uri = join(self.out, "run.json")
        said: dict[str, Any] = read_json(uri) if exists(uri) else {"status": "not begun", "looks": {}}
        return said


@dataclass(frozen=True)
class Undisturbed:
    """A detection, and how it went when nobody disturbed it."""

    task: Task
    code: int
    said: dict[str, Any]
    tables: dict[str, Any]
    files: int
    seconds_to_first_file: float

    @property
    def slabs(self) -> int:
        return len(self.tables["slabs"])

    def equals(self, driver: Driver) -> None:
        """Assert that the run of `driver`, or what is left of it, ends like this one, row for row."""
        code, said = driver.result()
        assert code == self.code, said
        assert said["counts"] == self.said["counts"]
        assert driver.state()["status"] == "done"
        tables = tables_of(driver.out)
        assert [row["slab_id"] for row in tables["slabs"]] == [row["slab_id"] for row in self.tables["slabs"]]
        assert tables == self.tables


def tables_of(out: str) -> dict[str, Any]:
    """Rows of what a run has written; slabs in the order of their ids, for in which file one lands is chance."""
    slabs = read_table(join(out, "slabs")).sort_by("slab_id")
    others = {name: read_table(join(out, f"{name}.parquet")) for name in ("motors", "failures")}
    return {"slabs": slabs.to_pylist(), **{name: table.to_pylist() for name, table in others.items()}}


def undisturbed_run(task: Task, out: str, **variables: str) -> Undisturbed:
    start = time.monotonic()
    with task.started(out, **variables) as driver:
        until("a file was written", driver.notes, driver.over)
        seconds = time.monotonic() - start
        code, said = driver.result()
    assert isinstance(said, dict), said
    return Undisturbed(task, code, said, tables_of(out), len(driver.notes()), seconds)


def simulated_task(folder: Path) -> Task:
    """An archive with two bad slices and a file that is no tomogram, and a detector that finds more here than there."""
    simulate_archive(str(folder), TOMOGRAMS, 3, (20, 96, 96), voxel_spacing_angstrom=24.0, processes=1)
    first = min((folder / "train").iterdir())
    (first / "slice_0003.jpg").unlink()
    (first / "slice_0009.jpg").write_bytes((first / "slice_0009.jpg").read_bytes()[:500])
    (folder / "train" / "torn.mrc").write_bytes(b"\0" * 100)
    torch.manual_seed(0)
    model = build_model(SETTINGS.model)
    with torch.no_grad():
        model.heads.heatmap.weight *= 300  # untrained, all its scores would be alike
    save_checkpoint(str(folder / "model"), model, SETTINGS, {})
    (folder / "settings.yaml").write_text(SETTINGS.model_dump_json())
    return Task(str(folder / "train"), str(folder / "model"), str(folder / "settings.yaml"))


def in_bucket(task: Task, folder: str, config: Path) -> Task:
    """The same detection of the same data and model, copied to `folder` in a bucket; its settings go to `config`."""
    for name in ("archive", "model"):
        files, path = filesystem(join(folder, name))
        files.put(f"{getattr(task, name)}/", f"{path}/", recursive=True)
    quick = {"archive": {"timeout_seconds": 2.0}}  # what stalls is asked for again soon
    config.write_text(settings_from(SETTINGS.model_dump() | quick).model_dump_json())
    return Task(join(folder, "archive"), join(folder, "model"), str(config))


def far_enough(driver: Driver, files: int) -> None:
    until(f"{files} files were written", lambda: len(driver.notes()) >= files, driver.over)


def struck(what: str, driver: Driver, run: Undisturbed) -> int:
    """How many slabs were committed when something was killed; AssertionError if the run was over by then."""
    state, slabs = driver.state(), driver.committed()
    print(f"{what} killed: {state['status']}, {slabs} of {run.slabs} slabs committed, looks done: {[*state['looks']]}")
    assert state["status"] != "done"
    return slabs
