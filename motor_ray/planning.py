"""`motor-ray plan`: what a detection would take of a cluster, from given rates or a measured sample.

What is given wins over what is measured; what is neither is assumed, or refused where no assumption would hold.
"""

import logging
import math
from typing import Any, NamedTuple

import pyarrow as pa

from motor_ray.capacity.forecast import Cluster, Prices, Rates, forecast
from motor_ray.capacity.workload import Workload, alike, jpeg_bytes, shapes_of, workload_of
from motor_ray.config import RunSettings
from motor_ray.detector.description import Models, describe_models
from motor_ray.distributed.detect import settings_of_model
from motor_ray.distributed.estimate import Measured, measure
from motor_ray.distributed.loading import READ_THREADS
from motor_ray.distributed.pipeline import LOADER_CPUS, SLABS_PER_FILE
from motor_ray.distributed.preflight import LOADER_BYTES, TASKS, Room, plan_pools, scorer_bytes
from motor_ray.errors import ConfigError
from motor_ray.slab_plan import SLAB_BYTES

PIPELINE_COSTS = 4 / 3
"""Core seconds in the pipeline for each of LoadSlab's own: on two cores Ray cost a quarter of the slices that they
could prepare. A given --cpu-rate is meant with these."""

OBJECT_STORE = 0.3
"""Share of a node's memory that Ray takes for its object store if it is not told otherwise."""

CPU_GIGABYTES = 4.0
"""Memory that comes with a CPU, if it is not given."""

SECOND_LOOK = 1.1
"""Slices of the second look for each of the first, if not given: `motor-ray bench looks` looked at 4.3 times fewer
slices than there are, 4.5 times with another training, every 9th of them first."""

VARIATION = 0.3
"""Of the time that slabs take, if neither given nor measured."""

START_SECONDS = 60.0
"""Of a look's actors, if neither given nor measured. They took 10 s on two cores; to compile a network and to wake a
GPU takes longer."""

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """The cluster and the rates that are given, by their flags; None is for the sample to say, or what is usual."""

    cpus: int | None = None
    gpus: int | None = None
    memory_gigabytes: float | None = None
    jobs: int = 1
    gpu_rate: float | None = None
    cpu_rate: float | None = None
    second_look: float | None = None
    slice_bytes: float | None = None
    gets_per_slice: float | None = None
    get_seconds: float = 0.05
    variation: float | None = None
    start_seconds: float | None = None
    gets_per_second: float | None = None
    network_gigabit: float | None = None
    driver_rate: float = 120.0
    driver_tomogram_seconds: float = 0.0035
    gpu_price: float = 0.0
    cpu_price: float = 0.0
    price_per_1000_gets: float = 0.0


class Alike(NamedTuple):
    """An archive of tomograms of one kind, of which only numbers are known, by their flags."""

    tomograms: int
    slices: int
    """Of a tomogram."""

    shape: tuple[int, int]
    """Voxels of a slice along y and x."""

    spacing: float | None
    """Angstrom between voxels; None if unknown."""


MAY_BE_ZERO = {
    *("gpus", "second_look", "get_seconds", "variation", "start_seconds", "driver_tomogram_seconds"),
    *("gpu_price", "cpu_price", "price_per_1000_gets"),
}
"""Numbers that may be nothing."""


def plan_alike(archive: Alike, asked: Asked, settings: RunSettings) -> dict[str, Any]:
    """The forecast for an archive that need not be there; all rates are given.

    Raises ConfigError if something is missing or cannot be, RunError if the cluster can never run it.
    """
    refuse_impossible({**archive._asdict(), **asked._asdict()})
    again = first_given(asked.second_look, SECOND_LOOK)
    work = alike(archive.tomograms, (archive.slices, *archive.shape), archive.spacing, settings, again)
    return _plan(work, asked, settings, jpeg_bytes([archive.shape]), None)


def plan_archive(manifest: pa.Table, model: Models, asked: Asked, settings: RunSettings) -> dict[str, Any]:
    """The forecast for the tomograms of a MANIFEST; with a `model`, half a minute of them is measured.

    Raises as `plan_alike`, and as `estimate` does.
    """
    refuse_impossible(asked._asdict())
    measured, networks = None, 1
    if model:
        models = describe_models(model)
        networks = len(models.uris)
        settings = settings_of_model(models.settings, settings)
        measured = measure(manifest, models.uris, settings)
    again = first_given(asked.second_look, measured and measured.again, SECOND_LOOK)
    work = workload_of(manifest, settings, again)
    result = _plan(work, asked, settings, jpeg_bytes(shapes_of(manifest)), measured, networks)
    return result | {"sampled_slabs": len(measured.sample.takes) if measured else 0}


def _plan(
    work: Workload,
    asked: Asked,
    settings: RunSettings,
    slice_bytes: float,
    measured: Measured | None,
    networks: int = 1,
) -> dict[str, Any]:
    cluster = cluster_of(room_of(asked, measured), asked, settings, networks)
    rates = rates_of(asked, settings, slice_bytes, measured, gpus=cluster.gpus)
    prices = Prices(asked.gpu_price, asked.cpu_price, asked.price_per_1000_gets)
    result = forecast(work, rates, cluster, prices) | {"memory_gigabytes": memory_of(cluster, networks)}
    for line in told(result):
        log.info("%s", line)
    return result


def room_of(asked: Asked, measured: Measured | None) -> Room:
    """The cluster that is asked for, or else the one that the sample was taken on. Raises ConfigError without CPUs."""
    there = measured.room if measured else None
    cpus, gpus = first_given(asked.cpus, there and there.cpus), first_given(asked.gpus, there and there.gpus, 0)
    if cpus is None:
        raise ConfigError("--cpus: not given, and no cluster was measured; say how many CPUs there are")
    memory = int(first_given(asked.memory_gigabytes, CPU_GIGABYTES * cpus) * 1e9)
    return Room(int(cpus), int(gpus), int(memory * (1 - OBJECT_STORE)), int(memory * OBJECT_STORE))


def cluster_of(room: Room, asked: Asked, settings: RunSettings, networks: int = 1) -> Cluster:
    """The actors that `motor-ray detect` would plan in that room, with so many networks for each scorer.

    Raises RunError if it has no room for them.
    """
    pools = plan_pools(room, settings.detect, networks)
    # Ray has a CPU for a task that writes wherever no actor asks for it; more than one for each scorer are not needed.
    left = int(room.cpus - pools.scorers - LOADER_CPUS * pools.loaders)
    return Cluster(
        cpus=room.cpus,
        gpus=room.gpus,
        scorers=pools.scorers,
        loaders=pools.loaders,
        calls=settings.detect.slabs_per_loader,
        slabs_ahead=max(pools.bytes_ahead // SLAB_BYTES, 1),
        tasks=TASKS,
        writers=max(TASKS - 1, min(left, pools.scorers)),
        slabs_per_file=SLABS_PER_FILE,
        requests_per_second=asked.gets_per_second,
        network_gigabit=asked.network_gigabit,
        jobs=asked.jobs,
        driver_slab_seconds=1 / asked.driver_rate,
        driver_tomogram_seconds=asked.driver_tomogram_seconds,
    )


def rates_of(asked: Asked, settings: RunSettings, slice_bytes: float, measured: Measured | None, *, gpus: int) -> Rates:
    """What a slice costs: as given, else as measured, else as is usual for slices of so many bytes.

    Raises ConfigError for rates of which nothing is usual.
    """
    sample, reads = measured.sample if measured else None, settings.model.in_slices
    prepared = sample and PIPELINE_COSTS * sample.a_slice("load_core_seconds")
    waited = sample and max(sample.a_slice("load_seconds") - sample.a_slice("load_core_seconds"), 0.0)
    core_seconds = first_given(asked.cpu_rate and 1 / asked.cpu_rate, prepared)
    if core_seconds is None:
        raise ConfigError("--cpu-rate: slices that a core prepares in a second; give it, or a --model to measure with")
    load, score = (sample and sample.variation(name) for name in ("load_seconds", "score_seconds"))
    return Rates(
        core_seconds=core_seconds,
        wait_seconds=first_given(waited, asked.get_seconds * reads / READ_THREADS),
        score_seconds=score_seconds(asked, measured, gpus),
        requests=first_given(asked.gets_per_slice, sample and sample.a_slice("requests"), float(reads)),
        bytes=first_given(asked.slice_bytes, sample and sample.a_slice("bytes"), slice_bytes * reads),
        load_variation=first_given(asked.variation, load, VARIATION),
        score_variation=first_given(asked.variation, score, VARIATION),
        start_seconds=first_given(asked.start_seconds, sample and sample.start_seconds, START_SECONDS),
    )


def score_seconds(asked: Asked, measured: Measured | None, gpus: int) -> float:
    """Of a GPU for a slice, or of a core if there is none. Raises ConfigError if nobody knows."""
    if asked.gpu_rate and not gpus:
        raise ConfigError("--gpu-rate: the cluster has no GPU; give --gpus")
    if asked.gpu_rate:
        return 1 / asked.gpu_rate
    if measured is None and gpus:
        raise ConfigError("--gpu-rate: slices that a GPU looks at in a second; give it, or a --model to measure with")
    if measured is None:
        raise ConfigError("no GPUs and no model: give --gpus and --gpu-rate, or a --model with an archive to measure")
    if bool(gpus) != bool(measured.room.gpus):
        there, wanted = ("GPUs", "CPUs") if measured.room.gpus else ("CPUs", "GPUs")
        raise ConfigError(f"the sample was scored on {there}, which says nothing of {wanted}; give --gpus, --gpu-rate")
    return measured.sample.a_slice("score_seconds" if gpus else "score_core_seconds")


def memory_of(cluster: Cluster, networks: int) -> dict[str, float]:
    """Gigabytes: of the actors, as preflight counts them, and of slabs on their way in the object store, at most."""
    parts = {
        "loaders": cluster.loaders * LOADER_BYTES / 1e9,
        "scorers": cluster.scorers * scorer_bytes(networks) / 1e9,
        "object_store": cluster.slabs_ahead * SLAB_BYTES / 1e9,
    }
    return {name: round(part, 1) for name, part in (parts | {"total": sum(parts.values())}).items()}


def told(result: dict[str, Any]) -> list[str]:
    """The forecast in two or three lines for people."""
    cluster, first, balance = result["cluster"], result["first_look"], result["balance"]
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in first["busy"].items() if share >= 0.005)
    looked_at = first["slices"] + result["second_look"]["slices"]
    lines = [
        f"{result['tomograms']:,} tomograms, {looked_at:,} of {result['slices']:,} slices: {result['hours']:,.2f} "
        f"hours on {cluster['gpus']} GPUs and {cluster['cpus']} CPUs, {first['slices_per_second']:,.0f} slices/s",
        f"the bottleneck is {result['bottleneck']}: {REMEDIES[result['bottleneck']]}; busy: {busy}",
    ]
    if balance:
        lines.append(
            f"loading keeps up with scoring from {balance['cpus']} CPUs on, {balance['cpus_per_gpu']:g} to a GPU; "
            f"these CPUs feed {balance['gpus']:g} GPUs"
        )
    return lines


REMEDIES = {
    "driver": "split the manifest and run several jobs beside one another (--jobs)",
    "storage": "spread the archive over prefixes, or move it nearer",
    "loaders": "more loaders, or more slabs in the hands of each (--detect.slabs-per-loader)",
    "cpus": "more CPUs",
    "network": "a faster network, or loaders on the nodes of the GPUs",
    "scoring": "more GPUs",
    "files": "more CPUs, for tasks that write files",
}
"""What would help, by stage."""


def refuse_impossible(given: dict[str, Any]) -> None:
    """Raises ConfigError, naming the flag, for numbers that cannot be."""
    for name, values in given.items():
        for value in values if isinstance(values, tuple) else (values,):
            if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and name in MAY_BE_ZERO))):
                continue
            expected = "0 or more" if name in MAY_BE_ZERO else "more than 0"
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected {expected}")


def first_given(*values: Any) -> Any:
    """The first of `values` that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)
