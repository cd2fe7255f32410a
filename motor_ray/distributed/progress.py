"""How far a job is, shown on stderr to whoever started it; knows nothing of what is counted.

Workers anywhere in the cluster write to a board; the driver reads it and draws.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from motor_ray.progress import Show, progress_bar

POLL_SECONDS = 0.3
LOG_SECONDS = 15.0
"""Where stderr is a file, such as a job's log, a line this often takes the place of the moving bar."""


class News(NamedTuple):
    """What stands on a board."""

    done: int
    text: str
    reason: str | None
    """Why those who work gave up, if they did."""

    counts: dict[str, int]
    """What has been counted, by name."""

    ticks: dict[str, int]
    """How much was done of what, since the board was read before."""

    seconds: float
    """How long all of it took, one beside the other."""

    steady: "Steady | None"
    """Of all but the first tick, which waited for things to start; None before there are two."""


class Steady(NamedTuple):
    """What was done after the first tick."""

    done: int
    seconds: float

    span: float
    """Seconds of the driver's clock from the first tick to the latest."""


class Board:
    """A small shared notice board: how much is done, counts by name, and a text. Any process may hold it.

    It lives on the driver's node, for no other is sure to last as long as the job.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()

    def count(self, name: str, number: int) -> None:
        """Add `number` to the count of `name`, of which there are few; does not wait."""
        self._actor.count.remote(name, number)

    def tick(self, what: str, number: int, seconds: float) -> None:
        """`number` more is done, namely of `what`, in so many seconds; does not wait."""
        self._actor.tick.remote(what, number, seconds)

    def show(self, done: int, text: str) -> None:
        """Set how much is done, and the text; does not wait."""
        self._actor.show.remote(done, text)

    def give_up(self, reason: str) -> None:
        """Note why the work cannot go on; waits until it is noted."""
        ray.get(self._actor.give_up.remote(reason))

    def read(self) -> News:
        """What stands there."""
        news: News = ray.get(self._actor.read.remote())
        return news


class _Board:
    def __init__(self) -> None:
        self.done, self.text, self.seconds = 0, "", 0.0
        self.reason: str | None = None
        self.counts: Counter[str] = Counter()
        self.ticks: Counter[str] = Counter()
        self.first: tuple[int, float, float] | None = None
        self.last = 0.0

    def count(self, name: str, number: int) -> None:
        self.counts[name] += number

    def tick(self, what: str, number: int, seconds: float) -> None:
        self.done += number
        self.seconds += seconds
        self.ticks[what] += number
        self.last = time.monotonic()
        self.first = self.first or (self.done, self.seconds, self.last)

    def show(self, done: int, text: str) -> None:
        self.done, self.text = done, text

    def give_up(self, reason: str) -> None:
        self.reason = self.reason or reason

    def read(self) -> News:
        ticks, self.ticks = self.ticks, Counter()
        return News(self.done, self.text, self.reason, dict(self.counts), dict(ticks), self.seconds, self._steady())

    def _steady(self) -> Steady | None:
        if self.first is None or self.last <= self.first[2]:
            return None
        done, seconds, at = self.first
        return Steady(self.done - done, self.seconds - seconds, self.last - at)


def as_shown(news: News) -> tuple[int, str]:
    """How much is done, and the text, as workers set them."""
    return news.done, news.text


@contextlib.contextmanager
def watched(
    title: str, total: int, unit: str, describe: Callable[[News], tuple[int, str]] = as_shown
) -> Iterator[Board]:
    """A board that is drawn as a bar while the block runs; `describe` says how much is done, and a text beside it."""
    board = Board()
    stop = threading.Event()
    console = Console(stderr=True)

    def draw(show: Show) -> None:
        waited = 0.0
        while not stop.wait(POLL_SECONDS):
            done, text = describe(board.read())
            show(done, text)
            waited += POLL_SECONDS
            if waited >= LOG_SECONDS and not console.is_terminal:
                console.print(f"{title}: {done} of {total} {unit} {text}", highlight=False, soft_wrap=True)
                waited = 0.0
        with contextlib.suppress(ray.exceptions.RayError):  # the job's own failure is told elsewhere
            show(*describe(board.read()))

    with progress_bar(title, total, unit) as show:
        drawer = threading.Thread(target=draw, args=(show,), daemon=True)
        drawer.start()
        try:
            yield board
        finally:
            stop.set()
            drawer.join(timeout=10)
