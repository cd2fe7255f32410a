"""Runs a contestant in a fresh process and gathers what it and its scorer say."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from motor_ray.bench.contestants import Job
from motor_ray.bench.memory import Peaks, memory_watched
from motor_ray.bench.notes import Note, Steady, read_notes, steady_state
from motor_ray.errors import UnfinishedError
from motor_ray.storage import read_json, write_json, write_table

TIMEOUT_SECONDS = 1200

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What came of a contestant."""

    steady: Steady
    first_result_seconds: float
    """From the start of its process to the end of the first slab that was scored."""

    scoring_seconds: float
    """From then to the end of the last slab that was scored."""

    seconds: float
    """From the start of its process to its end."""

    row_bytes: int
    """The heaviest row on its way to the scorer."""

    memory: Peaks
    said: dict[str, Any]
    """What it says of itself."""

    def summary(self) -> dict[str, Any]:
        """As the bench reports it."""
        return {
            "slices_per_second": round(self.steady.slices_per_second, 2),
            "scorer_busy": round(self.steady.busy, 4),
            "first_result_seconds": round(self.first_result_seconds, 2),
            "seconds": round(self.seconds, 1),
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in self.said.items()},
        }


def run_contestant(job: Job, manifest: pa.Table, environment: Mapping[str, str], *, memory: bool = False) -> Run:
    """Run `job` in a process of its own; `manifest` is written to its folder before.

    `environment` is added to this process's, where the child finds the storage. With `memory` its processes are
    watched. Raises UnfinishedError if it fails.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    write_table(manifest, job.place("manifest.parquet"))
    write_json(job.place("job.json"), job._asdict())
    # A cluster that runs elsewhere is not what is measured, and Daft would report to its makers.
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    inherited |= {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    command = [sys.executable, "-m", "motor_ray.bench.contestants", job.place("job.json")]
    with (folder / "log.txt").open("wb") as out:
        started = time.monotonic()
        child = subprocess.Popen(command, env=inherited | dict(environment), stdout=out, stderr=out)
        peaks = _wait(child, memory=memory)
        ended = time.monotonic()
    if child.returncode:
        raise UnfinishedError(f"{job.contestant}: {last_words(folder / 'log.txt')}")
    run = _gather(job, read_notes(folder / "scored.txt"), started, ended, peaks)
    log.info(
        "%s: %.1f slices/s, first result after %.1f s",
        job.contestant,
        run.steady.slices_per_second,
        run.first_result_seconds,
    )
    return run


def _wait(child: subprocess.Popen[bytes], *, memory: bool) -> Peaks:
    watch: AbstractContextManager[Peaks] = memory_watched(child.pid) if memory else nullcontext({})
    try:
        with watch as peaks:
            child.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UnfinishedError(f"a contestant did not end within {TIMEOUT_SECONDS} s; run the bench again") from None
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return peaks


def _gather(job: Job, notes: list[Note], started: float, ended: float, memory: Peaks) -> Run:
    scored = sum(note.slices for note in notes)
    if scored != job.slices:
        raise UnfinishedError(f"{job.contestant}: scored {scored} slices of {job.slices}; run the bench again")
    return Run(
        steady_state(notes),
        notes[0].ended - started,
        notes[-1].ended - notes[0].ended,
        ended - started,
        max(note.row_bytes for note in notes),
        memory,
        read_json(job.place("result.json")),
    )


def last_words(log_file: Path) -> str:
    """The last line of what a process wrote."""
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
