"""What a detection takes of a cluster: hours, bottleneck, balance, memory and money, from rates and a workload.

Rates are seconds for a slice, measured or given; the two looks follow one another, each as `run_line` has it.
"""

import math
from typing import Any, NamedTuple

from motor_ray.capacity.line import Line, Station
from motor_ray.capacity.simulation import Course, run_line
from motor_ray.capacity.workload import Look, Workload

LOADER_CORES = 2
"""Cores that a loader with several slabs in hand keeps busy: the rest of its work holds Python's lock."""

FILE_SECONDS = 0.5
"""To write a file of slabs and its note to object storage."""

GIGABIT_BYTES = 1e9 / 8


class Rates(NamedTuple):
    """What a slice costs, and how much slabs differ."""

    core_seconds: float
    """Of a core, to decode a slice and make its frames."""

    wait_seconds: float
    """For which its loader waits for storage, beside that."""

    score_seconds: float
    """Of a device, or, where there is no GPU, of a core."""

    requests: float
    bytes: float
    load_variation: float
    score_variation: float
    start_seconds: float
    """From the start of a look to the first slab that is loaded: actors start, and the model is read."""


class Cluster(NamedTuple):
    """What there is, and the actors that are planned on it."""

    cpus: int
    gpus: int
    scorers: int
    loaders: int
    calls: int
    """Slabs that a loader has in hand at a time."""

    slabs_ahead: int
    """That may be between loading and scoring."""

    tasks: int
    """CPUs that are left for what comes and goes: reading plans and writing files."""

    writers: int
    """Files that are written at a time."""

    slabs_per_file: int
    requests_per_second: float | None
    """The most that the storage answers."""

    network_gigabit: float | None
    """Of the link over which a scorer gets its frames, each way; None if loaders are beside it."""

    jobs: int
    """Detections of parts of the archive that run beside one another, each with its own driver."""

    driver_slab_seconds: float
    """In which a driver hands a slab on; it is one process, however large the cluster."""

    driver_tomogram_seconds: float
    """In which it plans, checks and links a tomogram, while its actors wait."""

    @property
    def preparing_cores(self) -> int:
        """Cores that are left to make frames."""
        left = self.cpus - self.tasks - (self.scorers if self.gpus else 0)
        return max(min(left, LOADER_CORES * self.loaders), 1)


class Prices(NamedTuple):
    """In any currency."""

    gpu_hour: float = 0.0
    cpu_hour: float = 0.0
    thousand_requests: float = 0.0


class LookCourse(NamedTuple):
    """A look, and its course."""

    look: Look
    line: Line
    course: Course
    seconds: float


def line_of(slab_slices: float, rates: Rates, cluster: Cluster, frame_bytes: float) -> Line:
    """The pipeline of a look at slabs of so many slices.

    Without GPUs loaders and scorers share the cores; a slice then keeps a scorer's share of them for as long as loading
    and scoring take together, so that both are counted once.
    """
    cores = 1.0 if cluster.gpus else cluster.cpus / cluster.scorers
    score = rates.score_seconds if cluster.gpus else (rates.score_seconds + rates.core_seconds) / cores
    link = frame_bytes / (cluster.network_gigabit * GIGABIT_BYTES) if cluster.network_gigabit else 0.0
    answers = rates.requests / cluster.requests_per_second if cluster.requests_per_second else 0.0
    return Line(
        driver=Station(cluster.jobs, cluster.driver_slab_seconds),
        storage=Station(1, slab_slices * answers),
        wait_seconds=slab_slices * rates.wait_seconds,
        cpus=Station(cluster.preparing_cores, slab_slices * rates.core_seconds),
        network=Station(cluster.scorers, slab_slices * link),
        scoring=Station(cluster.scorers, slab_slices * score),
        files=Station(cluster.writers, FILE_SECONDS),
        calls=cluster.loaders * cluster.calls,
        ahead=cluster.slabs_ahead,
        slabs_per_file=cluster.slabs_per_file,
        load_variation=rates.load_variation,
        score_variation=rates.score_variation,
    )


def forecast(work: Workload, rates: Rates, cluster: Cluster, prices: Prices) -> dict[str, Any]:
    """What to expect, as one JSON object; times in hours, memory in gigabytes."""
    first, second = (_look(look, work, rates, cluster) for look in (work.first, work.second))
    driver = work.tomograms * cluster.driver_tomogram_seconds / cluster.jobs
    hours = (first.seconds + second.seconds + driver) / 3600
    requests = math.ceil(work.looked_at * rates.requests)
    return {
        "tomograms": work.tomograms,
        "slices": work.slices,
        "first_look": said(first),
        "second_look": said(second),
        "requests": requests,
        "bytes": math.ceil(work.looked_at * rates.bytes),
        "hours": round(hours, 3),
        "driver_hours": round(driver / 3600, 3),
        "bottleneck": first.line.bottleneck(),
        "cluster": cluster._asdict(),
        "rates": rates._asdict(),
        "balance": balance(first.line, cluster),
        "cost": cost(hours, requests, cluster, prices),
    }


def said(look: LookCourse) -> dict[str, Any]:
    """A look as the forecast has it."""
    slices = look.look.slab_slices
    limits = {name: round(slabs * slices, 1) for name, slabs in look.line.limits().items() if math.isfinite(slabs)}
    return {
        "slices": look.look.slices,
        "slabs": look.look.slabs,
        "hours": round(look.seconds / 3600, 3),
        "slices_per_second": round(look.course.rate * slices, 1),
        "most_slices_per_second": limits,
        "busy": {name: round(share, 3) for name, share in look.course.busy.items()},
        "simulated_slabs": look.course.simulated_slabs,
    }


def balance(line: Line, cluster: Cluster) -> dict[str, Any]:
    """CPUs with which loading just keeps up with scoring, those of scorers and tasks among them; for GPUs only.

    There is a loader for each of these CPUs, and with few slabs in hand it may wait more than it works. ``gpus`` is how
    many scorers the CPUs that there are could feed. What varies makes either wait a little; a few more CPUs help.
    """
    if not cluster.gpus:
        return {}
    in_hand = (line.wait_seconds + line.cpus.seconds) / cluster.calls
    loading = max(line.cpus.seconds, in_hand) / line.scoring.seconds
    cpus = math.ceil(cluster.scorers * (loading + 1) - 1e-9) + cluster.tasks
    return {
        "cpus_per_gpu": round(loading + 1, 2),
        "cpus": cpus,
        "gpus": round((cluster.cpus - cluster.tasks) / (loading + 1), 2),
    }


def cost(hours: float, requests: int, cluster: Cluster, prices: Prices) -> dict[str, float]:
    """The cluster for so many hours, all of it from start to end, and the requests."""
    parts = {
        "gpus": cluster.gpus * hours * prices.gpu_hour,
        "cpus": cluster.cpus * hours * prices.cpu_hour,
        "requests": requests / 1000 * prices.thousand_requests,
    }
    return {name: round(price, 2) for name, price in (parts | {"total": sum(parts.values())}).items()}


def _look(look: Look, work: Workload, rates: Rates, cluster: Cluster) -> LookCourse:
    line = line_of(look.slab_slices or work.first.slab_slices, rates, cluster, work.frame_bytes)
    if not look.slabs:
        return LookCourse(look, line, Course(0.0, 0.0, 0.0, {}, 0), 0.0)
    course = run_line(line, look.slabs)
    return LookCourse(look, line, course, rates.start_seconds + course.seconds)
