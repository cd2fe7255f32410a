"""How much memory a process and all that it started take, seen from outside."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAMPLE_SECONDS = 0.25

ACTOR = re.compile(r"ray::MapWorker\(MapBatches\((\w+)\)\)")
"""The title of a process that runs an operator of Ray Data."""

Peaks = dict[str, float]
"""The most megabytes that any process of a name had to itself."""


@contextmanager
def memory_watched(pid: int) -> Iterator[Peaks]:
    """Peaks of the process `pid`, as "driver", and of those that it started, by name; complete when the block ends.

    What counts is what a process does not share with others (USS): pages of Ray's object store, which all have in
    common, would count for each.
    """
    peaks: Peaks = {}
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(pid, peaks, stop), daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        stop.set()
        watcher.join()


def name_of(title: str) -> str:
    """What a process is, from its command line: the class of an operator, a kind of Ray's, or "other"."""
    if actor := ACTOR.match(title):
        return actor[1]
    return "ray task" if title.startswith("ray::") else "ray server" if "/ray/core/" in title else "other"


def _watch(pid: int, peaks: Peaks, stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        for name, megabytes in _sample(pid):
            peaks[name] = max(peaks.get(name, 0.0), megabytes)


def _sample(pid: int) -> Iterator[tuple[str, float]]:
    import psutil

    try:
        driver = psutil.Process(pid)
        others = driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in (driver, *others):
        try:
            name = "driver" if process.pid == pid else name_of(" ".join(process.cmdline()))
            yield name, process.memory_full_info().uss / 1e6
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            continue
