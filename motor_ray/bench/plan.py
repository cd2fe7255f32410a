"""Whether `motor-ray plan` foretells how long the pipeline takes, with rates that are measured in the same run.

The real pipeline reads slices from a real S3 server and hands them to stand-in devices, as in `motor-ray bench detect`.
What is measured to plan with are runs without a device: how fast one loader fills the cores, everything else on the
machine included, and how long a run takes to start and to end. What is foretold are runs with other devices, other
actors and other lengths, each from such a run before and one after it, so that a slow spell strikes all alike.
"""

import logging
import statistics
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from motor_ray.bench.children import Run
from motor_ray.bench.detect import SETTINGS, Sizes, Stand
from motor_ray.bench.object_store import object_server
from motor_ray.bench.slices import jpeg_slices, store_slices
from motor_ray.bench.timing import machine
from motor_ray.bench.verdict import Wanted, judge
from motor_ray.capacity.forecast import LOADER_CORES
from motor_ray.capacity.line import Line, Station
from motor_ray.capacity.simulation import run_line
from motor_ray.capacity.workload import alike
from motor_ray.config import RunSettings
from motor_ray.detector.device import pick_device
from motor_ray.distributed.pipeline import FILES, SLABS_PER_FILE
from motor_ray.distributed.preflight import SLABS_AHEAD
from motor_ray.machine import cores

WANTED: Wanted = {
    "worst_run_error": ("<=", 0.10, "of the seconds foretold for a whole run, over those it took"),
    "worst_scoring_error": ("<=", 0.10, "the same, from the first slab that is scored to the last: without any start"),
}

LOAD_VARIATION = 0.1
"""Of the time that slabs of one archive take to load; a stand-in takes the same for each."""

SIZES = Sizes(shape=(100, 960, 928), tomograms=12)

log = logging.getLogger(__name__)


class Case(NamedTuple):
    """A run of the pipeline."""

    device_seconds: float
    """Of a stand-in for a slice."""

    scorers: int
    loaders: int
    times: int
    """How many times the tomograms of SIZES it looks at."""


CALIBRATION = Case(0.0, 1, 1, 2)

CASES_BETWEEN = 2
"""Runs that are foretold between two of CALIBRATION; their number is a multiple of it."""

CASES = {
    "a device of 10 ms": Case(0.01, 1, 1, 1),
    "a device of 10 ms, for longer": Case(0.01, 1, 1, 2),
    "a device of 5 ms": Case(0.005, 1, 1, 2),
    "no device, for longer": Case(0.0, 1, 1, 4),
    "no device, two loaders": Case(0.0, 1, 2, 3),
    "two devices of 10 ms": Case(0.01, 2, 1, 3),
}
"""What is foretold, then measured."""


class Calibration(NamedTuple):
    """What a run is foretold from."""

    core_seconds: float
    """Of a core, for a slice, with all that the machine does for it."""

    other_seconds: float
    """That a run takes beside its pipeline's: Python and Ray start and end."""


class Foretold(NamedTuple):
    """What a run is expected to take."""

    seconds: float
    scoring_seconds: float
    """From the first slab that is scored to the last."""


def bench_plan(sizes: Sizes = SIZES, settings: RunSettings = SETTINGS) -> dict[str, Any]:
    """Measure CASES and compare; returns what is asked and found, and beside it all that was measured.

    Raises UnfinishedError if a run fails.
    """
    started = machine(pick_device())
    with tempfile.TemporaryDirectory(prefix="motor-ray-bench-") as folder:
        slices, _ = jpeg_slices(sizes.shape[0], sizes.shape[1:], sizes.jpeg_bytes)
        with object_server(Path(folder) / "s3") as server:
            stand = Stand(Path(folder), server, store_slices(server, slices), settings, sizes, count())
            calibrating, runs = measure_all(stand)
    compared = {}
    for number, (name, case) in enumerate(CASES.items()):
        around = calibrating[number // CASES_BETWEEN :][:2]
        compared[name] = compare(foretell(case, calibrate(around, sizes, settings), sizes, settings), runs[number])
    worst = {name: max(abs(one[name]) for one in compared.values()) for name in ("run_error", "scoring_error")}
    return {
        "requirements": judge({f"worst_{name}": error for name, error in worst.items()}, WANTED),
        "runs": compared,
        "calibration": {
            "slices_per_second": [round(run.steady.slices_per_second, 1) for run in calibrating],
            "seconds": [round(run.seconds, 1) for run in calibrating],
        },
        "machine": started | {"load_average_at_the_end": machine(pick_device())["load_average"]},
        "sizes": sizes._asdict(),
    }


def measure_all(stand: Stand) -> tuple[list[Run], list[Run]]:
    """Runs of CALIBRATION, before and after every CASES_BETWEEN of CASES, and the runs of these."""
    calibrating, runs = [measure(stand, CALIBRATION)], []
    for number, case in enumerate(CASES.values(), start=1):
        runs.append(measure(stand, case))
        if number % CASES_BETWEEN == 0:
            calibrating.append(measure(stand, CALIBRATION))
    return calibrating, runs


def measure(stand: Stand, case: Case) -> Run:
    """Run the pipeline of a case in a process of its own."""
    detect = stand.settings.detect.model_copy(update={"loaders": case.loaders, "scorers": case.scorers})
    here = stand._replace(settings=stand.settings.model_copy(update={"detect": detect}))
    tomograms = stand.sizes.tomograms * case.times
    return here.run("motor_ray", tomograms, stand.sizes.shape[0], seconds=case.device_seconds)


def calibrate(runs: list[Run], sizes: Sizes, settings: RunSettings) -> Calibration:
    """What runs of CALIBRATION say, on average: nothing but the cores kept them from being faster."""
    busy = min(cores(), LOADER_CORES * CALIBRATION.loaders)
    core_seconds = statistics.mean(busy / run.steady.slices_per_second for run in runs)
    pipeline = foretell(CALIBRATION, Calibration(core_seconds, 0.0), sizes, settings)
    return Calibration(core_seconds, statistics.mean(run.seconds for run in runs) - pipeline.seconds)


def foretell(case: Case, calibration: Calibration, sizes: Sizes, settings: RunSettings) -> Foretold:
    """What a run will take."""
    line, total = line_of(case, calibration.core_seconds, sizes, settings)
    course = run_line(line, total)
    return Foretold(calibration.other_seconds + course.seconds, course.seconds - course.first_result_seconds)


def line_of(case: Case, core_seconds: float, sizes: Sizes, settings: RunSettings) -> tuple[Line, int]:
    """The pipeline of a case, and how many slabs it has; what storage and driver take is in the core seconds."""
    first = alike(sizes.tomograms * case.times, sizes.shape, None, settings, 0.0).first
    total, slab_slices = first.slabs, first.slab_slices
    nothing = Station(1, 0.0)
    line = Line(
        driver=nothing,
        storage=nothing,
        wait_seconds=0.0,
        cpus=Station(min(cores(), LOADER_CORES * case.loaders), slab_slices * core_seconds),
        network=nothing,
        scoring=Station(case.scorers, slab_slices * case.device_seconds),
        files=nothing,
        calls=case.loaders * settings.detect.slabs_per_loader,
        ahead=SLABS_AHEAD * (case.scorers + case.loaders),
        slabs_per_file=min(max(total // FILES, 1), SLABS_PER_FILE),
        load_variation=LOAD_VARIATION,
    )
    return line, total


def compare(foretold: Foretold, run: Run) -> dict[str, Any]:
    """Seconds foretold and taken, and by which share the former are too many."""
    log.info("foretold %.1f s, took %.1f s", foretold.seconds, run.seconds)
    return {
        "foretold": {name: round(value, 1) for name, value in foretold._asdict().items()},
        "measured": {"seconds": round(run.seconds, 1), "scoring_seconds": round(run.scoring_seconds, 1)},
        "run_error": round(foretold.seconds / run.seconds - 1, 4),
        "scoring_error": round(foretold.scoring_seconds / run.scoring_seconds - 1, 4),
        "slices_per_second": round(run.steady.slices_per_second, 1),
        "scorers_busy": round(run.steady.busy / run.said["scorers"], 3),
        "first_result_seconds": round(run.first_result_seconds, 1),
    }
