"""How well detection keeps a device busy: the real pipeline on slices from a real S3 server, in one run of this bench.

    device   a stand-in that takes 10 ms a slice: is it ever kept waiting, and how soon does it start?
    peers    a stand-in that takes none: slices a second, in turn with Daft, a torch DataLoader and a plain loop
    growth   ten tomograms and a hundred: do memory and time per slice stay the same?
    model    the real model, against the same model on frames in memory

Every contestant runs in a fresh process; what counts are ratios. What is asked of each figure stands beside it.
"""

import importlib.util
import logging
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from motor_ray.bench.children import Run, run_contestant
from motor_ray.bench.contestants import Job
from motor_ray.bench.object_store import ObjectServer, object_server
from motor_ray.bench.slices import jpeg_slices, manifest_of, store_slices
from motor_ray.bench.timing import machine
from motor_ray.bench.verdict import highest, judge, memory_growth, rounded
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.device import pick_device
from motor_ray.detector.model import build_model
from motor_ray.errors import RunError
from motor_ray.machine import cores

Part = Literal["device", "peers", "growth", "model"]
PARTS: tuple[Part, ...] = get_args(Part)

PEERS = ("motor_ray", "daft", "torch_data_loader", "plain_loop")

NEEDED: dict[Part, str] = {"peers": "daft", "growth": "psutil"}
"""What only the bench imports."""

SETTINGS = settings_from(
    {"detect": {"exhaustive": True, "loaders": max(cores() // 2, 1)}, "model": {"pretrained": "none"}}
)
"""Every slice is looked at. A loader, with several slabs in hand, keeps two cores busy; stand-ins leave it all of them.
Random weights take as long as trained ones."""

log = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """How much is measured."""

    shape: tuple[int, int, int] = (300, 960, 928)
    """Of a tomogram, z, y, x: the commonest of the public data."""

    jpeg_bytes: int = 200_000
    tomograms: int = 10
    """For the parts device and peers."""

    rounds: int = 3
    """How often contestants take turns."""

    device_seconds: float = 0.01
    few: int = 10
    many: int = 100
    """Tomograms for the part growth."""

    depth: int = 200
    """Slices of each of these."""

    model_slices: int = 300
    resident_slices: int = 96


USUAL = Sizes()


class Stand(NamedTuple):
    """Where a bench takes place."""

    folder: Path
    server: ObjectServer
    uri: str
    settings: RunSettings
    sizes: Sizes
    numbers: "count[int]"

    def run(
        self,
        contestant: str,
        tomograms: int,
        depth: int,
        *,
        memory: bool = False,
        seconds: float = 0.0,
        model: str | None = None,
    ) -> Run:
        """Run a contestant on `tomograms` of `depth` slices."""
        folder = str(self.folder / f"{next(self.numbers)}-{contestant}")
        settings = self.settings.model_dump(mode="json")
        job = Job(contestant, folder, settings, tomograms * depth, seconds, model)
        manifest = manifest_of(self.uri, (depth, *self.sizes.shape[1:]), tomograms)
        return run_contestant(job, manifest, self.server.environment(), memory=memory)


def bench_detect(
    parts: Sequence[Part] = PARTS, settings: RunSettings = SETTINGS, sizes: Sizes = USUAL
) -> dict[str, Any]:
    """Measure the `parts`; returns what is asked and found, and beside it all that was measured.

    Raises RunError if something that it needs is not installed, UnfinishedError if a contestant fails.
    """
    require_libraries(parts)
    started = machine(pick_device())
    with tempfile.TemporaryDirectory(prefix="motor-ray-bench-") as folder:
        slices, quality = jpeg_slices(sizes.shape[0], sizes.shape[1:], sizes.jpeg_bytes)
        with object_server(Path(folder) / "s3") as server:
            log.info("storing %d slices", len(slices))
            stand = Stand(Path(folder), server, store_slices(server, slices), settings, sizes, count())
            measured: dict[str, dict[str, Any]] = {part: MEASURES[part](stand) for part in PARTS if part in parts}
    figures = {name: figure for part in measured.values() for name, figure in part.pop("figures").items()}
    return {
        "requirements": judge(figures),
        "machine": started | {"load_average_at_the_end": machine(pick_device())["load_average"]},
        "slices": {
            "shape": list(sizes.shape[1:]),
            "different": len(slices),
            "bytes": round(statistics.mean(map(len, slices))),
            "jpeg_quality": quality,
            "server": "SeaweedFS on the same machine, with all slices in the page cache",
        },
        "sizes": sizes._asdict(),
        **measured,
    }


def measure_device(stand: Stand) -> dict[str, Any]:
    """Part device. A run's start is that of its process, before Python and Ray start."""
    run = stand.run("motor_ray", stand.sizes.tomograms, stand.sizes.shape[0], seconds=stand.sizes.device_seconds)
    share = run.steady.slices_per_second * stand.sizes.device_seconds / run.said["scorers"]
    return {
        "figures": {"device_share": share, "first_result_seconds": run.first_result_seconds},
        "motor_ray": run.summary(),
    }


def measure_peers(stand: Stand) -> dict[str, Any]:
    """Part peers."""
    runs: dict[str, list[Run]] = {name: [] for name in PEERS}
    for _ in range(stand.sizes.rounds):
        for name in PEERS:
            runs[name].append(stand.run(name, stand.sizes.tomograms, stand.sizes.shape[0]))
    rates = {name: median_rate(of) for name, of in runs.items()}
    return {
        "figures": {
            "slices_per_second": rates["motor_ray"],
            "times_as_fast_as_daft": rates["motor_ray"] / rates["daft"],
            "row_megabytes": max(run.row_bytes for run in runs["motor_ray"]) / 1e6,
        },
        "slices_per_second": rates,
        "runs": {name: [run.summary() for run in of] for name, of in runs.items()},
    }


def measure_growth(stand: Stand) -> dict[str, Any]:
    """Part growth: `few` tomograms in several runs, since one is short, and `many` in one."""
    sizes = stand.sizes
    few = [stand.run("motor_ray", sizes.few, sizes.depth, memory=True) for _ in range(sizes.rounds)]
    many = stand.run("motor_ray", sizes.many, sizes.depth, memory=True)
    peaks = highest(run.memory for run in few)
    seconds = {"few": 1 / median_rate(few), "many": 1 / many.steady.slices_per_second}
    return {
        "figures": {
            "memory_growth": memory_growth(peaks, many.memory),
            "time_per_slice_growth": seconds["many"] / seconds["few"] - 1,
            "row_megabytes": many.row_bytes / 1e6,
        },
        "peak_megabytes": {"few": rounded(peaks), "many": rounded(many.memory)},
        "seconds_per_slice": seconds,
        "runs": {"few": [run.summary() for run in few], "many": many.summary()},
    }


def measure_model(stand: Stand) -> dict[str, Any]:
    """Part model: resident frames before and after the pipeline; torch.compile is off, as it is for short runs."""
    model, sizes = str(stand.folder / "model"), stand.sizes
    save_checkpoint(model, build_model(stand.settings.model), stand.settings, {})
    before = stand.run("resident", 1, sizes.resident_slices, model=model)
    pipeline = stand.run("motor_ray", 1, sizes.model_slices, model=model)
    after = stand.run("resident", 1, sizes.resident_slices, model=model)
    share = pipeline.steady.slices_per_second / median_rate([before, after]) / pipeline.said["scorers"]
    return {
        "figures": {"model_share": share},
        "backbone": stand.settings.model.backbone,
        "compiled": False,
        "motor_ray": pipeline.summary(),
        "resident": [before.summary(), after.summary()],
    }


MEASURES = {"device": measure_device, "peers": measure_peers, "growth": measure_growth, "model": measure_model}


def median_rate(runs: Sequence[Run]) -> float:
    """The median of the runs' slices a second."""
    return statistics.median(run.steady.slices_per_second for run in runs)


def require_libraries(parts: Iterable[Part]) -> None:
    """Raises RunError unless everything that only the `parts` of the bench need is installed."""
    missing = [NEEDED[part] for part in parts if part in NEEDED and importlib.util.find_spec(NEEDED[part]) is None]
    if missing:
        raise RunError(f"bench detect needs {' and '.join(missing)}; pip install 'motor-ray[bench]'")
