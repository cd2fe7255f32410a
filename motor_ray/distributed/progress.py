"""How far a job is, shown on stderr to whoever started it; knows nothing of what is counted.

Workers anywhere in the cluster write to a board; the driver reads it and draws.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
from rich.console import Console

from motor_ray.progress import Show, progress_bar

POLL_SECONDS = 0.3
LOG_SECONDS = 15.0
"""Where stderr is a file, such as a job's log, a line this often takes the place of the moving bar."""


class Board:
    """A small shared notice board: a count of what is done, and a text. Any process of the cluster may hold it."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_Board).remote()

    def add(self, done: int) -> None:
        """Count `done` more; does not wait."""
        self._actor.add.remote(done)

    def show(self, done: int, text: str) -> None:
        """Set the count and the text; does not wait."""
        self._actor.show.remote(done, text)

    def read(self) -> tuple[int, str]:
        """The count and the text."""
        done, text = ray.get(self._actor.read.remote())
        return done, text


class _Board:
    def __init__(self) -> None:
        self.done, self.text = 0, ""

    def add(self, done: int) -> None:
        self.done += done

    def show(self, done: int, text: str) -> None:
        self.done, self.text = done, text

    def read(self) -> tuple[int, str]:
        return self.done, self.text


@contextlib.contextmanager
def watched(title: str, total: int, unit: str) -> Iterator[Board]:
    """A board whose count is drawn as a bar while the block runs."""
    board = Board()
    stop = threading.Event()
    console = Console(stderr=True)

    def draw(show: Show) -> None:
        waited = 0.0
        while not stop.wait(POLL_SECONDS):
            done, text = board.read()
            show(done, text)
            waited += POLL_SECONDS
            if waited >= LOG_SECONDS and not console.is_terminal:
                console.print(f"{title}: {done} of {total} {unit} {text}", highlight=False)
                waited = 0.0
        show(*board.read())

    with progress_bar(title, total, unit) as show:
        drawer = threading.Thread(target=draw, args=(show,), daemon=True)
        drawer.start()
        try:
            yield board
        finally:
            stop.set()
            drawer.join(timeout=10)
