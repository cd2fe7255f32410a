"""An endpoint in a process of its own, as `motor-ray serve` starts it, and what can be seen of it from outside."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from motor_ray.bench.children import last_words
from motor_ray.bench.memory import name_of
from motor_ray.distributed.serve_environment import free_port, set_here
from motor_ray.errors import UnfinishedError
from motor_ray.service.settings import ServiceSettings
from motor_ray.storage import read_json, write_json

SAMPLE_SECONDS = 0.5
START_SECONDS = 180.0
STOP_SECONDS = 60.0

REPLICA = re.compile(r"ray::.*ServeReplica:motor_ray:(\w+)")
"""The title of one of the endpoint's own processes."""

Shares = dict[str, float]
"""What the processes of each name take together."""


class Served(NamedTuple):
    """An endpoint that runs."""

    url: str
    pid: int

    def memory(self) -> Shares:
        """Megabytes that its processes take now (RSS), by name."""
        import psutil

        taken: Shares = {}
        for name, one in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
                taken[name] = taken.get(name, 0.0) + one.memory_info().rss / 1e6
        return taken

    def cpu(self) -> dict[tuple[int, str], float]:
        """Seconds of CPU that its processes have taken so far, by number and name."""
        import psutil

        taken = {}
        for name, one in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                taken[one.pid, name] = sum(one.cpu_times()[:2])
        return taken

    def cpu_since(self, before: Mapping[tuple[int, str], float]) -> Shares:
        """Seconds of CPU that its processes have taken since `before`, by name."""
        earlier = {pid: seconds for (pid, _), seconds in before.items()}  # titles change with what a process does
        taken: Shares = {}
        for (pid, name), seconds in self.cpu().items():
            taken[name] = taken.get(name, 0.0) + seconds - earlier.get(pid, 0.0)
        return taken

    def processes(self, name: str) -> set[int]:
        """Those of a name."""
        return {one.pid for own, one in self._processes() if own == name}

    def _processes(self) -> Iterator[tuple[str, Any]]:
        import psutil

        process = psutil.Process(self.pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if one.status() != psutil.STATUS_ZOMBIE:
                    yield process_name(" ".join(one.cmdline())), one


@contextmanager
def memory_sampled(endpoint: Served) -> Iterator[list[tuple[float, Shares]]]:
    """What the endpoint's processes take meanwhile, and when."""
    samples: list[tuple[float, Shares]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append((time.monotonic(), endpoint.memory()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def process_name(title: str) -> str:
    """What a process is: the name of a replica's class, haproxy, or what it is to Ray."""
    if replica := REPLICA.match(title):
        return replica[1]
    return "haproxy" if "haproxy" in title.split(" ", 1)[0] else name_of(title)


@contextmanager
def served(settings: ServiceSettings, folder: Path, *, stand_in: bool) -> Iterator[Served]:
    """An endpoint with these `settings` on a port of its own, with a real device or a stand-in, ready, meanwhile.

    Raises UnfinishedError if it does not get ready.
    """
    port = free_port()
    own = settings.serve.model_copy(update={"port": port, "storage": str(folder / "tomograms")})
    job, log_file = folder / "serve.json", folder / "serve.txt"
    write_json(str(job), settings.model_copy(update={"serve": own}).model_dump(mode="json"))
    # A cluster that runs elsewhere is not what is measured.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "motor_ray.bench.served", str(job), "stand-in" if stand_in else "real"]
    with log_file.open("wb") as out:
        child = subprocess.Popen(
            command,
            env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is for us, who stop it in order
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: child.poll() is not None or is_ready(url), START_SECONDS, "the endpoint did not get ready")
            if child.poll() is not None:
                raise UnfinishedError(f"the endpoint ended: {last_words(log_file)}")
            yield Served(url, child.pid)
        finally:
            stop(child)


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End an endpoint and all that it started."""
    import psutil

    started = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for one in started:
        if one.is_running():
            one.kill()


def is_ready(url: str) -> bool:
    """Whether an endpoint would look at an image."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(happens: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait until `happens()`. Raises UnfinishedError, which says what is there `otherwise`, after so many seconds."""
    end = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > end:
            raise UnfinishedError(f"{otherwise} within {seconds:g} s; run the bench again")
        time.sleep(0.1)


def main(job: str, device: str) -> None:
    """Serve until SIGTERM."""
    settings = ServiceSettings.model_validate(read_json(job))
    set_here(settings.serve)  # before Ray Serve is imported
    from motor_ray.bench.serve_device import StandIn
    from motor_ray.distributed.endpoint import serve_until_stopped
    from motor_ray.distributed.replica import Detector

    threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
    serve_until_stopped(settings, StandIn if device == "stand-in" else Detector)


def stop_with(parent: int) -> None:
    """Stop serving when the `parent` is gone, which may have been killed before it could say so."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
