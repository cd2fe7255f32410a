"""The pipeline of a detection as stations that a slab passes, and what each of them can do at most.

    driver -> storage -> wait -> cpus -> (store) -> network -> scoring -> files

Actors of a kind are taken as one station with many servers: Ray gives a slab to whichever has the least in hand. Knows
neither Ray nor tomograms; all times are seconds.
"""

import math
from typing import Any, NamedTuple


class Station(NamedTuple):
    """So many servers that take one slab each at a time."""

    servers: int
    seconds: float
    """Of a server, for a slab; 0 for a station that is not there."""

    @property
    def rate(self) -> float:
        """Slabs a second, at most."""
        return self.servers / self.seconds if self.seconds else math.inf

    def shrunk(self, times: float) -> "Station":
        """A station with one so-manieth of the rate and, as far as they are whole, of the servers."""
        servers = max(round(self.servers / times), 1)
        return Station(servers, self.seconds * servers * times / self.servers)


class Line(NamedTuple):
    """A pipeline."""

    driver: Station
    """The process that hands each slab on, one after the other."""

    storage: Station
    """What the object storage answers; one server if it has a limit."""

    wait_seconds: float
    """For which a loader waits for the slices of a slab."""

    cpus: Station
    """Cores that make frames, and the core seconds of a slab."""

    network: Station
    """What carries frames to scorers."""

    scoring: Station
    """Devices."""

    files: Station
    """Writers, and the seconds of a file."""

    calls: int
    """Slabs that all loaders have in hand together."""

    ahead: int
    """Slabs that may lie between a loader's first byte and the end of scoring, all together."""

    slabs_per_file: int = 64
    load_variation: float = 0.0
    """Standard deviation of a slab's loading time, as a share of the mean."""

    score_variation: float = 0.0
    """The same, of the time on a device."""

    @property
    def hand(self) -> int:
        """Slabs that all scorers have in hand: one on the device, the next beside it."""
        return 2 * self.scoring.servers

    @property
    def unwritten(self) -> int:
        """Slabs whose results may wait for their files: those of files that are being written, and one that fills."""
        return (self.files.servers + 1) * self.slabs_per_file

    def stations(self) -> dict[str, Station]:
        """The stations by name, in a slab's order."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Station)}

    def limits(self) -> dict[str, float]:
        """Slabs a second that each stage could pass if it were the only one; the least is the pipeline's limit.

        It is reached if nothing varies; with variation stages wait for one another, which only `simulate` knows.
        """
        loading = self.driver.seconds + self.storage.seconds + self.wait_seconds + self.cpus.seconds
        return {
            "driver": self.driver.rate,
            "storage": self.storage.rate,
            "loaders": Station(self.calls, loading).rate,
            "cpus": self.cpus.rate,
            "network": self.network.rate,
            "scoring": min(self.scoring.rate, Station(self.hand, self.network.seconds + self.scoring.seconds).rate),
            "files": self.files.rate * self.slabs_per_file,
        }

    def bottleneck(self) -> str:
        """The stage with the least limit."""
        limits = self.limits()
        return min(limits, key=limits.__getitem__)

    def shrunk(self, times: float) -> "Line":
        """A pipeline of one so-manieth of everything, with stations as alike as whole servers allow."""
        smaller: dict[str, Any] = {name: station.shrunk(times) for name, station in self.stations().items()}
        calls, ahead = (max(round(many / times), 1) for many in (self.calls, self.ahead))
        return self._replace(**smaller, calls=calls, ahead=ahead)
