"""Finding and ending the processes of a Ray that a test has started, and of no other: several may run on a machine.

A process counts as a test's if it descends from one that the test started. Works where there is a /proc.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SCORER = "ray::MapWorker(MapBatches(ScoreFrames))"
TRAINER = "ray::RayTrainWorker"
LOADER = "ray::MapWorker(MapBatches(LoadSlab))"
WRITER = "ray::Write"
"""How the titles of Ray's processes begin while they do what a test wants to disturb."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")

POLL_SECONDS = 0.02
WRITING_SECONDS = 0.001
"""How often to look for something that is over in a blink."""


class Process(NamedTuple):
    """A process, and no other that is given its number once it has ended."""

    pid: int
    started: str

    @property
    def title(self) -> str:
        """How it calls itself, its arguments if it says nothing else; empty if it has ended."""
        return _read(Path(f"/proc/{self.pid}/cmdline")).replace("\0", " ").strip()

    def is_alive(self) -> bool:
        """Whether it has not ended; its parent need not have taken note."""
        return _process(self.pid) == self


def below(root: int) -> list[Process]:
    """All descendants of the process `root`."""
    found, ahead = [], [root]
    while ahead:
        parent = ahead.pop()
        lists = (_read(thread / "children") for thread in Path(f"/proc/{parent}/task").glob("*"))
        children = [int(pid) for pids in lists for pid in pids.split()]
        found += [child for pid in children if (child := _process(pid))]
        ahead += children
    return found


def workers_below(root: int) -> list[Process]:
    """All descendants of the process `root` but Ray's two agents, which do no work and may outlive it by a minute."""
    return [process for process in below(root) if not process.title.startswith(AGENTS)]


def titled(processes: Iterable[Process], *titles: str) -> list[Process]:
    """Those of `processes` whose titles begin with one of `titles`."""
    return [process for process in processes if process.title.startswith(titles)]


def raylet_of(node: Any) -> int:
    """The process id of the raylet of a node of a `ray.cluster_utils.Cluster`; its workers are below it."""
    [raylet] = node.all_processes["raylet"]
    return int(raylet.process.pid)


def kill(process: Process) -> None:
    """End `process` as a crash or the kernel's out-of-memory killer does."""
    os.kill(process.pid, signal.SIGKILL)


def until(what: str, happens: Callable[[], T], over: Callable[[], bool], poll: float = POLL_SECONDS) -> T:
    """Wait for `happens()` to be true; returns what it says. AssertionError if it is `over` before that."""
    while True:
        ends = over()
        if answer := happens():
            return answer
        assert not ends, f"it was over before {what}"
        time.sleep(poll)


def left_of(processes: Iterable[Process], seconds: float) -> list[str]:
    """The titles of those of `processes` that have not ended after so many seconds; none as soon as all have."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if process.is_alive()]:
        if time.monotonic() > deadline:
            return [process.title for process in left]
        processes = left
        time.sleep(POLL_SECONDS)
    return []


def _process(pid: int) -> Process | None:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2].split()
    return Process(pid, fields[19]) if fields and fields[0] not in "ZX" else None


def _read(path: Path) -> str:
    """What a file below /proc says, nothing if its process has ended."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
