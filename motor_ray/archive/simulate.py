"""Tomograms whose motors are known: one in memory, or an archive on disk in Kaggle's layout.

The specimen is physical (see specimen, clutter, density) and seen through a microscope (see imaging). Everything
follows from a seed: the same seed gives the same bytes, with the same versions of numpy and scipy, on any number of
processes. A full-size tomogram, 300 x 960 x 928, needs some 8 GB of memory; 64 x 320 x 320 needs 300 MB.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import NDArray

from motor_ray.archive.clutter import place_everything
from motor_ray.archive.density import Canvas, draw_specimen
from motor_ray.archive.imaging import SimulationSettings, image_specimen, to_grey
from motor_ray.archive.labels import MOTOR_COLUMNS, TOMOGRAM_COLUMNS, Labels, write_labels
from motor_ray.archive.volumes import Format, write_volume
from motor_ray.errors import StorageError, TomogramError
from motor_ray.machine import cores
from motor_ray.storage import filesystem, reason

Shape = tuple[int, int, int]

MOTOR_COUNTS = {0: 286, 1: 313, 2: 30, 3: 6, 4: 9, 6: 3, 10: 1}
"""Public tomograms by their number of motors."""

SPACINGS_ANGSTROM = {
    6.5: 3, 13.1: 263, 13.2: 2, 13.3: 18, 15.6: 171, 16.1: 40, 16.8: 85, 19.2: 7, 19.3: 10, 19.7: 49,
}  # fmt: skip
"""Public tomograms by their voxel spacing."""

SMALLEST_EXTENT_ANGSTROM = (800.0, 4000.0, 4000.0)
"""A volume along z, y, x that shows enough of a cell; spacings that make a shape smaller than this are not drawn."""

SMALLEST_WIDTH_ANGSTROM = 600.0
"""A narrower volume along y and x holds no cell: with 0.4 of it for a radius nothing is left within the envelope."""

PAD_ANGSTROM = 200.0
"""The specimen goes on this far beyond the tomogram, for the reconstruction is periodic at its faces."""


USUAL = SimulationSettings()


@dataclass(frozen=True, eq=False)
class SimulatedTomogram:
    """A tomogram and the truth about it."""

    volume: NDArray[np.uint8]
    """`(z, y, x)` grey levels; dense things are dark."""

    motors: NDArray[np.float64]
    """`(n, 3)` z, y, x in voxels: on the axis, 60 angstrom below the inner membrane, where MS-ring meets C-ring."""

    voxel_spacing_angstrom: float


def simulate_tomogram(
    seed: int,
    shape: Shape = (64, 320, 320),
    *,
    voxel_spacing_angstrom: float | None = None,
    n_motors: int | None = None,
    settings: SimulationSettings = USUAL,
) -> SimulatedTomogram:
    """One tomogram of `shape` voxels z, y, x.

    Spacing and number of motors are drawn from the public labels' statistics where they are not given. Raises
    TomogramError if the motors find no room in the shape.
    """
    _check(shape, voxel_spacing_angstrom, n_motors)
    streams = np.random.SeedSequence(seed).spawn(6)
    basics, places, clutter, texture, microscope, greys = (np.random.default_rng(stream) for stream in streams)
    spacing = voxel_spacing_angstrom or _draw_spacing(shape, basics)
    count = int(_counts(1, basics)[0]) if n_motors is None else n_motors
    extent = (np.array(shape) - 1) * spacing
    layout = place_everything(extent, count, places, clutter, settings.clutter)
    canvas = _canvas(shape, spacing)
    draw_specimen(canvas, layout, texture)
    image = image_specimen(canvas.values, spacing, settings, microscope)
    inner = tuple(slice(pad, pad + size) for pad, size in zip(canvas.pad, shape, strict=True))
    motors = np.array([site.motor() for site in layout.motors]).reshape(-1, 3) / spacing
    return SimulatedTomogram(to_grey(image[inner], settings.ice_gradient, greys), motors, spacing)


def simulate_archive(
    out: str,
    tomograms: int,
    seed: int,
    shape: Shape = (64, 320, 320),
    format: Format = "jpeg",
    *,
    voxel_spacing_angstrom: float | None = None,
    motor_counts: Sequence[int] | None = None,
    settings: SimulationSettings = USUAL,
    progress: Callable[[int], None] | None = None,
    processes: int | None = None,
) -> Labels:
    """Write `tomograms` tomograms below the local folder `out`/train, and `out`/train_labels.csv.

    "jpeg" gives train/<tomo_id>/slice_NNNN.jpg, "mrc" train/<tomo_id>.mrc (mode 1, 16-bit integers, which every
    reader takes for 0-255), "zarr" train/<tomo_id>.zarr (OME-Zarr 0.4). The numbers of motors follow the public labels
    but for a handful of tomograms, where at least one has no motor and one has several; `motor_counts`, one number a
    tomogram, overrides them. `progress` is called with the number of tomograms written so far. `processes` defaults
    to the number of CPUs and does not change the result.

    Raises StorageError if `out` is not local or already holds an archive.
    """
    _check(shape, voxel_spacing_angstrom, min(motor_counts, default=0) if motor_counts is not None else None)
    if seed < 0:
        raise TomogramError(f"seed {seed}: cannot be drawn from; give 0 or more")
    if tomograms < 1:
        raise StorageError(f"{out}: {tomograms} tomograms cannot be simulated; ask for 1 or more")
    if motor_counts is not None and len(motor_counts) != tomograms:
        raise TomogramError(
            f"{out}: {len(motor_counts)} motor_counts for {tomograms} tomograms; give one number for each"
        )
    train = _fresh_folder(out)
    counts = motor_counts_like_public(tomograms, seed) if motor_counts is None else motor_counts
    names = tomogram_names(tomograms, seed)
    jobs = [(name, int(name.removeprefix("tomo_"), 16), count) for name, count in zip(names, counts, strict=True)]
    simulate = partial(
        _simulate_one,
        train=train,
        shape=shape,
        format=format,
        voxel_spacing_angstrom=voxel_spacing_angstrom,
        settings=settings,
    )
    truths = _map(simulate, jobs, processes or cores(), progress or _quietly)
    labels = _labels(names, shape, truths)
    write_labels(labels, str(train.parent / "train_labels.csv"))
    return labels


def motor_counts_like_public(tomograms: int, seed: int) -> list[int]:
    """A number of motors for each of so many tomograms: the public labels' mix, as evenly as the number allows.

    With two tomograms or more at least one has none; with three or more one has two or more.
    """
    rng = np.random.default_rng([seed, 1])
    counts = _counts(tomograms, rng)
    if tomograms >= 2 and counts.min() > 0:
        counts[0] = 0
    if tomograms >= 3 and counts.max() < 2:
        counts[-1] = 2
    rng.shuffle(counts)
    return [int(count) for count in counts]


def tomogram_names(tomograms: int, seed: int) -> list[str]:
    """Different names such as tomo_003acc, from the seed; with more tomograms the first names stay as they are."""
    names: dict[str, None] = {}
    draw = 0
    while len(names) < tomograms:
        names["tomo_" + hashlib.sha256(f"{seed}/{draw}".encode()).hexdigest()[:6]] = None
        draw += 1
    return list(names)


def _check(shape: Shape, voxel_spacing_angstrom: float | None, n_motors: int | None) -> None:
    if len(shape) != 3 or min(shape) < 8:
        raise TomogramError(f"a tomogram of {shape} voxels cannot be simulated; give z, y, x of 8 or more each")
    if voxel_spacing_angstrom is not None and not 0 < voxel_spacing_angstrom < np.inf:
        raise TomogramError(f"a spacing of {voxel_spacing_angstrom:g} angstrom cannot be simulated; give one above 0")
    width = (min(shape[1:]) - 1) * (voxel_spacing_angstrom or max(SPACINGS_ANGSTROM))
    if width < SMALLEST_WIDTH_ANGSTROM:
        raise TomogramError(
            f"a tomogram of {shape} voxels is {width:.0f} angstrom wide, which holds no cell; give at least "
            f"{SMALLEST_WIDTH_ANGSTROM:g}: more voxels, or larger ones"
        )
    if n_motors is not None and n_motors < 0:
        raise TomogramError(f"{n_motors} motors cannot be simulated; ask for 0 or more")


def _draw_spacing(shape: Shape, rng: np.random.Generator) -> float:
    values = np.array(list(SPACINGS_ANGSTROM))
    room = np.all(np.outer(values, shape) >= SMALLEST_EXTENT_ANGSTROM, axis=1)
    room[-1] |= not room.any()
    weights = np.array(list(SPACINGS_ANGSTROM.values())) * room
    return float(rng.choice(values, p=weights / weights.sum()))


def _counts(number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of motors at evenly spaced quantiles of the public mix, ascending; one number is a plain draw."""
    quantiles = (np.arange(number) + rng.uniform()) / number
    cumulative = np.cumsum(list(MOTOR_COUNTS.values()))
    chosen = np.searchsorted(cumulative, quantiles * cumulative[-1], side="right")
    counts: NDArray[np.int64] = np.array(list(MOTOR_COUNTS), np.int64)[chosen]
    return counts


def _canvas(shape: Shape, spacing: float) -> Canvas:
    pad = round(PAD_ANGSTROM / spacing)
    padded = [scipy.fft.next_fast_len(size + 2 * pad, real=True) for size in shape]
    return Canvas(np.zeros(padded, np.float32), spacing, (pad, pad, pad))


def _fresh_folder(out: str) -> Path:
    files, path = filesystem(out)
    if "file" not in files.protocol:
        raise StorageError(f"{out}: simulated archives are written to local folders only; copy it there afterwards")
    train, labels = Path(path) / "train", Path(path) / "train_labels.csv"
    if labels.exists() or (train.is_dir() and any(train.iterdir())):
        raise StorageError(
            f"{out}: already holds an archive; give another folder, or delete {train} and {labels} first"
        )
    try:
        train.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made a folder ({reason(error)})") from None
    return train


def _quietly(_: int) -> None:
    """Report to nobody."""


Job = tuple[str, int, int]
"""A tomogram's name, seed and number of motors."""

Truth = tuple[NDArray[np.float64], float]
"""A tomogram's motors and voxel spacing, without its voxels."""


def _simulate_one(
    job: Job,
    train: Path,
    shape: Shape,
    format: Format,
    voxel_spacing_angstrom: float | None,
    settings: SimulationSettings,
) -> Truth:
    name, seed, n_motors = job
    tomogram = simulate_tomogram(
        seed, shape, voxel_spacing_angstrom=voxel_spacing_angstrom, n_motors=n_motors, settings=settings
    )
    try:
        write_volume(train, name, tomogram.volume, tomogram.voxel_spacing_angstrom, format)
    except OSError as error:
        raise StorageError(f"{train}: {name} cannot be written ({reason(error)})") from None
    return tomogram.motors, tomogram.voxel_spacing_angstrom


def _map(
    simulate: Callable[[Job], Truth], jobs: list[Job], processes: int, progress: Callable[[int], None]
) -> list[Truth]:
    """The results in the order of `jobs`, whichever is done first."""
    if min(processes, len(jobs)) == 1:
        truths = []
        for job in jobs:
            truths.append(simulate(job))
            progress(len(truths))
        return truths
    # A forked child would inherit the locks of the parent's threads, held or not.
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(simulate, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _labels(names: list[str], shape: Shape, truths: list[Truth]) -> Labels:
    tomograms = [(name, *shape, spacing, len(motors)) for name, (motors, spacing) in zip(names, truths, strict=True)]
    points = [(name, *point) for name, (motors, _) in zip(names, truths, strict=True) for point in motors.tolist()]
    return Labels(pd.DataFrame(tomograms, columns=TOMOGRAM_COLUMNS), pd.DataFrame(points, columns=MOTOR_COLUMNS))
