"""Slabs that pass a pipeline, event by event.

What a formula leaves out is here: stages that wait for one another because slabs differ, room between them that is
bounded, the filling of an empty pipeline and its running dry, and files that are written when they are full.
"""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import simpy
from numpy.typing import NDArray
from scipy.stats import norm
from simpy.resources.resource import Request

from motor_ray.capacity.line import Line

MOST_SCORERS = 8
"""A larger cluster is simulated as one with so many scorers and as large a share of all else: it would take longer, and
its larger pools wait a little less for one another."""

FEWEST_SLABS, TURNS = 1000, 6
"""Slabs of which a rate is taken: so many, and so many times what a pipeline holds at a time."""

WARM_UP = 1 / 3
"""Share of the slabs that is not steady state yet, as in the benchmark."""

BLOCK = 64
"""Slabs whose times have exactly the mean that is asked for, so that a sample's luck does not show."""

Events = Generator[simpy.Event, Any, None]


class Course(NamedTuple):
    """What became of a pipeline."""

    seconds: float
    """From the first slab's start to the last file's end."""

    first_result_seconds: float
    rate: float
    """Slabs a second in steady state."""

    busy: dict[str, float]
    """Share of its time that each station was at work, in steady state."""

    simulated_slabs: int


def run_line(line: Line, slabs: int) -> Course:
    """How long a pipeline takes for so many `slabs`, of which only a bounded number is simulated.

    A large cluster is shrunk to MOST_SCORERS, and what is simulated of a long run is its beginning, its end, and
    enough between them for a steady state; the rest takes as long as its rate says. So a million tomograms take no
    longer than a thousand. Shrunk or not, rates are those of the whole pipeline.
    """
    times = max(line.scoring.servers / MOST_SCORERS, 1.0)
    small, share = line.shrunk(times), math.ceil(slabs / times)
    enough = max(FEWEST_SLABS, TURNS * (small.ahead + small.hand + small.unwritten))
    course = simulate(small, min(share, enough))
    beyond = max(share - enough, 0) / course.rate if course.rate else 0.0
    return course._replace(seconds=course.seconds + beyond, rate=course.rate * times)


def simulate(line: Line, slabs: int) -> Course:
    """Every one of `slabs` through `line`; the same arguments give the same course. Takes about 0.1 ms a slab."""
    pipeline = _Pipeline(line, slabs)
    pipeline.environment.run()
    return pipeline.course()


def service_factors(slabs: int, variation: float, seed: int) -> NDArray[np.float64]:
    """``(slabs,)`` factors of service times, log-normal with mean 1 and standard deviation `variation`.

    Each BLOCK holds the quantiles of the distribution, shuffled, and so has the mean 1 exactly.
    """
    sigma = math.sqrt(math.log1p(variation**2))
    quantiles = np.exp(sigma * norm.ppf((np.arange(BLOCK) + 0.5) / BLOCK))
    random = np.random.default_rng(seed)
    blocks = [random.permutation(quantiles / quantiles.mean()) for _ in range(-(-slabs // BLOCK))]
    return np.concatenate([*blocks, np.empty(0)])[:slabs]


class _Pipeline:
    def __init__(self, line: Line, slabs: int) -> None:
        self.line, self.slabs, self.environment = line, slabs, simpy.Environment()
        self.stations = line.stations()
        self.servers = {name: simpy.Resource(self.environment, one.servers) for name, one in self.stations.items()}
        self.calls = simpy.Resource(self.environment, line.calls)
        self.hand = simpy.Resource(self.environment, line.hand)
        self.ahead = simpy.Container(self.environment, line.ahead, init=line.ahead)
        self.unwritten = simpy.Container(self.environment, init=line.unwritten)
        self.load_factors = service_factors(slabs, line.load_variation, seed=0).tolist()
        self.score_factors = service_factors(slabs, line.score_variation, seed=1).tolist()
        self.work: dict[str, list[tuple[float, float]]] = {name: [] for name in self.stations}
        self.ends: list[float] = []
        self.all_begun = 0.0
        self.environment.process(self._begin())

    def _begin(self) -> Events:
        for slab in range(self.slabs):
            call = self.calls.request()
            yield call
            yield self.ahead.get(1)
            self.environment.process(self._slab(slab, call))
        self.all_begun = self.environment.now

    def _slab(self, slab: int, call: Request) -> Events:
        factor = self.load_factors[slab]
        yield from self._serve("driver")
        yield from self._serve("storage")
        yield self.environment.timeout(self.line.wait_seconds * factor)
        yield from self._serve("cpus", factor)
        self.calls.release(call)
        with self.hand.request() as turn:
            yield turn
            yield from self._serve("network")
            yield from self._serve("scoring", self.score_factors[slab])
            yield self.unwritten.get(1)
        yield self.ahead.put(1)
        self.ends.append(self.environment.now)
        if len(self.ends) % self.line.slabs_per_file == 0 or len(self.ends) == self.slabs:
            yield from self._serve("files")
            yield self.unwritten.put(self.line.slabs_per_file)

    def _serve(self, name: str, factor: float = 1.0) -> Events:
        seconds = self.stations[name].seconds * factor
        if not seconds:
            return
        with self.servers[name].request() as turn:
            yield turn
            self.work[name].append((self.environment.now, self.environment.now + seconds))
            yield self.environment.timeout(seconds)

    def course(self) -> Course:
        start, end = self._steady_window()
        done = sum(start < one <= end for one in self.ends)
        span = end - start
        return Course(
            self.environment.now,
            self.ends[0],
            done / span if span else 0.0,
            {name: self._busy(name, start, end) for name in self.stations},
            self.slabs,
        )

    def _steady_window(self) -> tuple[float, float]:
        """From the slab with which the first part is done to the last before there is nothing left to begin with."""
        start = self.ends[math.ceil(WARM_UP * self.slabs) - 1]
        before = [one for one in self.ends if one <= self.all_begun]
        return (start, before[-1]) if before and before[-1] > start else (0.0, self.ends[-1])

    def _busy(self, name: str, start: float, end: float) -> float:
        if end <= start:
            return 0.0
        overlaps = (min(until, end) - max(since, start) for since, until in self.work[name])
        return sum(max(one, 0.0) for one in overlaps) / (self.stations[name].servers * (end - start))
