"""How good the detectors are, ours and others', on simulated tomograms: `motor-ray bench accuracy`.

    archives (simulated, once) -> for each row and seed a process: train, look, score -> result.json
    all results -> accuracy.json, accuracy.md, accuracy.png

Every step of a row and seed is written down when it is done, so the benchmark goes on where it was stopped, and can be
run in parts; each process computes on one thread.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motor_ray.bench.accuracy_archives import SEEDS, Sizes, archive, short_hash
from motor_ray.bench.accuracy_figure import accuracy_figure
from motor_ray.bench.accuracy_job import Job
from motor_ray.bench.accuracy_job import as_json as job_json
from motor_ray.bench.accuracy_rows import ROWS, as_json, chosen
from motor_ray.bench.accuracy_table import as_json as line_json
from motor_ray.bench.accuracy_table import lines_of, markdown, requirements
from motor_ray.bench.children import last_words
from motor_ray.distributed.ledger import alone
from motor_ray.errors import ConfigError, UnfinishedError
from motor_ray.storage import read_json, write_bytes, write_json

FIRST_SEED = 420

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

SIMULATED = "Simulated tomograms; nothing here says how good a detector is on real ones."

log = logging.getLogger(__name__)


def bench_accuracy(
    parts: tuple[str, ...], work: str, *, seeds: int = 3, processes: int = 1, sizes: Sizes | None = None
) -> dict[str, Any]:
    """Train and score what is not done yet of the rows `parts`, all without any; returns the whole table.

    Everything is kept in the folder `work`, where accuracy.json, accuracy.md and accuracy.png of all that is done
    appear as well. Raises ConfigError for an unknown row or one whose package is missing, RunError if another one is at
    work in the folder, UnfinishedError at the end if a row could not be done.
    """
    names = chosen(parts)
    if seeds < 1 or processes < 1:
        raise ConfigError(f"--seeds {seeds} and --processes {processes}: expected 1 or more of each")
    sizes, folder = sizes or Sizes(), Path(work).absolute()
    if "yolo" in names and importlib.util.find_spec("ultralytics") is None:
        raise ConfigError("the row yolo needs ultralytics: pip install 'motor-ray[bench]', or choose other --parts")
    # Seed by seed, so that the table is whole early; those that need others last, so that nobody waits for them.
    ordered = sorted(names, key=lambda name: len(ROWS[name].of))
    jobs = [Job(folder, name, FIRST_SEED + seed, sizes) for seed in range(seeds) for name in ordered]
    with alone(str(folder)) as lock:
        for part in SEEDS:
            archive(folder, part, sizes)
        failed = run_all([job for job in jobs if job.result is None], processes, lock)
        said = report(folder, sizes)
    if failed:
        raise UnfinishedError(
            f"{folder}: {len(failed)} of {len(jobs)} could not be done: {'; '.join(failed)}. What could is in "
            f"{said['table']}; the same command tries the others again"
        )
    return said


class Crew:
    """The processes that are at work; once they are sent home no other starts."""

    def __init__(self, keep: tuple[int, ...] = ()) -> None:
        """They keep the file descriptors `keep`: the lock of the folder, until the last one has ended."""
        self._keep = keep
        self._lock, self._at_work, self._is_home = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, said: dict[str, Any], folder: Path, title: str) -> None:
        """Run accuracy_run on one thread; its words go to log.txt in `folder`. Raises UnfinishedError if it fails."""
        write_json(str(folder / "job.json"), said)
        command = [sys.executable, "-m", "motor_ray.bench.accuracy_run", str(folder / "job.json")]
        with (folder / "log.txt").open("wb") as out:
            with self._lock:
                if self._is_home:
                    raise UnfinishedError(f"{title}: was not begun")
                child = subprocess.Popen(
                    command, env=os.environ | ONE_THREAD, stdout=out, stderr=out, pass_fds=self._keep
                )
                self._at_work.add(child)
            code = child.wait()
            with self._lock:
                self._at_work.discard(child)
        if code:
            raise UnfinishedError(f"{title}: {last_words(folder / 'log.txt')}")

    def send_home(self) -> None:
        """End what is at work."""
        with self._lock:
            self._is_home = True
            for child in self._at_work:
                child.terminate()


def run_all(jobs: Sequence[Job], processes: int, lock: tuple[int, ...] = ()) -> list[str]:
    """Run each job in a process of its own, so many at a time; why some failed, or could not begin without others.

    The processes keep the file descriptors `lock`. What was not done when Ctrl-C was pressed is begun anew the next
    time.
    """
    crew = Crew(lock)
    with ThreadPoolExecutor(processes) as pool:
        futures: dict[Job, Future[None]] = {}
        for job in jobs:  # what a job needs comes before it, so that none waits for one that has not begun
            before = [futures[need] for need in job.needs if need in futures]
            futures[job] = pool.submit(run_job, job, crew, before)
        try:
            wait(futures.values())
        except BaseException:
            crew.send_home()
            pool.shutdown(cancel_futures=True)
            raise
    problems = [future.exception() for future in futures.values()]
    if unexpected := [one for one in problems if one and not isinstance(one, UnfinishedError)]:
        raise unexpected[0]
    return [str(one) for one in problems if one]


def run_job(job: Job, crew: Crew, before: Sequence["Future[None]"] = ()) -> None:
    """Run a row with one seed once what it needs is done. Raises UnfinishedError if that, or it itself, fails."""
    title = f"{job.row.title}, seed {job.seed}"
    if any(one.exception() for one in before):
        raise UnfinishedError(f"{title}: needs what failed")
    started = time.monotonic()
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        crew.run(job_json([job], "row"), job.folder, title)
    except UnfinishedError as error:
        log.warning("%s", error)
        raise
    scores, seconds = job.done["scores"], time.monotonic() - started
    log.info("%s: mAP@0.5 %.3f, F2 %.3f (simulated), %.0f s", title, scores["mAP@0.5"], scores["f2"], seconds)


def done_jobs(work: Path, sizes: Sizes) -> list[Job]:
    """All rows and seeds that are done with these sizes."""
    there = sorted((work / "rows" / sizes.training).glob("*/result.json"))
    jobs = [Job(work, *_name_and_seed(file.parent.name), sizes) for file in there]
    return [job for job in jobs if job.name in ROWS and job.result is not None]


def _name_and_seed(folder: str) -> tuple[str, int]:
    name, _, seed = folder.rpartition("-")
    return name, int(seed)


def report(work: Path, sizes: Sizes) -> dict[str, Any]:
    """Write the table, the picture and the JSON of all that is done; returns the last."""
    jobs = done_jobs(work, sizes)
    speed = speed_of(work, jobs) if jobs else {"milliseconds": {}, "machine": None}
    lines = lines_of([job.result for job in jobs if job.result], speed["milliseconds"])
    said = {
        "simulated": SIMULATED,
        "requirements": requirements(lines),
        "rows": [line_json(line) for line in lines],
        "contestants": as_json(ROWS),
        "sizes": asdict(sizes),
        "machine": speed["machine"],
        "table": str(work / "accuracy.md"),
        "picture": str(work / "accuracy.png"),
    }
    write_bytes(said["table"], markdown(lines).encode())
    accuracy_figure(said["picture"], lines)
    write_json(str(work / "accuracy.json"), said)
    return said


def speed_of(work: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """How fast the first seed of each row is, all in one process, measured unless it was of these very rows."""
    first = list({job.name: job for job in sorted(jobs, key=lambda job: -job.seed)}.values())
    first.sort(key=lambda job: list(ROWS).index(job.name))
    key = short_hash([job.keys.looked for job in first])
    file = work / "speed" / f"{key}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory(prefix="motor-ray-speed-") as folder:
            Crew().run(job_json(first, "speed") | {"out": str(file)}, Path(folder), "timing")
    said: dict[str, Any] = read_json(str(file))
    return said
