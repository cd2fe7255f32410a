"""Finding and ending the processes of a Ray that a test has started, and of no other: several may run on a machine.

A process counts as a test's if it descends from one that the test started. Works where there is a /proc.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCORER = "ray::MapWorker(MapBatches(ScoreFrames))"
LOADER = "ray::MapWorker(MapBatches(LoadSlab))"
WRITER = "ray::Write"
"""How the titles of Ray's processes begin while they do what a test wants to disturb."""

POLL_SECONDS = 0.02
WRITING_SECONDS = 0.001
"""How often to look for something that is over in a blink."""


def below(root: int) -> list[int]:
    """All descendants of the process `root`."""
    found, ahead = [], [root]
    while ahead:
        parent = ahead.pop()
        lists = (_read(thread / "children") for thread in Path(f"/proc/{parent}/task").glob("*"))
        children = [int(pid) for pids in lists for pid in pids.split()]
        found += children
        ahead += children
    return found


def alive(pids: Iterable[int]) -> list[int]:
    """Those of `pids` that have not ended."""
    return [pid for pid in pids if _is_alive(pid)]


def titled(pids: Iterable[int], *titles: str) -> list[int]:
    """Those of `pids` whose titles begin with one of `titles`."""
    return [pid for pid in pids if _read(Path(f"/proc/{pid}/cmdline")).startswith(titles)]


def raylet_of(node: Any) -> int:
    """The process id of the raylet of a node of a `ray.cluster_utils.Cluster`; its workers are below it."""
    [raylet] = node.all_processes["raylet"]
    return int(raylet.process.pid)


def kill(pid: int) -> None:
    """End the process `pid` as a crash or the kernel's out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)


def until(what: str, happens: Callable[[], T], over: Callable[[], bool], poll: float = POLL_SECONDS) -> T:
    """Wait for `happens()` to be true; returns what it says. AssertionError if it is `over` before that."""
    while True:
        ends = over()
        if answer := happens():
            return answer
        assert not ends, f"it was over before {what}"
        time.sleep(poll)


def gone(pids: Iterable[int], seconds: float) -> bool:
    """Wait for `pids` to end, for so long at most; whether they did."""
    deadline = time.monotonic() + seconds
    while left := alive(pids):
        if time.monotonic() > deadline:
            return False
        pids = left
        time.sleep(POLL_SECONDS)
    return True


def _is_alive(pid: int) -> bool:
    """Whether the process `pid` has not ended; its parent need not have taken note."""
    state = _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1]
    return state not in ("", "Z", "X")


def _read(path: Path) -> str:
    """What a file below /proc says, nothing if its process has ended."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
