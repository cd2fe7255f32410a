"""What a finished run is worth, in numbers and pictures.

Joins archive, slices and motors, which know nothing of one another.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.archive.readers import open_tomogram
from motor_ray.config import ArchiveSettings, AugmentSettings, EvaluateSettings, RunSettings, settings_from
from motor_ray.errors import ExportError, LabelsError, OutageError, RunError, StorageError
from motor_ray.motors.evaluate import evaluate
from motor_ray.motors.export import PLACE, Format, chosen_motors, copick_config, export_files
from motor_ray.motors.figures import CheckRow, MotorsPanel, dataset_check, motors_figure
from motor_ray.slices.augment import augment, sample_generator
from motor_ray.slices.frame import frames_of
from motor_ray.slices.preprocess import make_frames, to_uint8
from motor_ray.slices.targets import boxes_on_frame, draw_targets
from motor_ray.storage import absolute, exists, join, read_json, read_table, write_bytes

Row = dict[str, Any]

NEAR_ANGSTROM = 200.0
"""A picture of a slice marks the motors whose centre lies this near along z."""

WRITERS = 16
"""Files that are written at a time."""

COPICK_CONFIG = "copick_config.json"


def evaluate_run(detections: str, labels: Labels, settings: EvaluateSettings) -> Row:
    """Compare the finished run under `detections` with labels: what `motor-ray evaluate` prints.

    Raises RunError if there is no finished run, MetricError if a tomogram of it is not labelled.
    """
    trained = run_settings(detections)
    plan = read_table(join(detections, "plan.parquet"))
    shapes = {row["tomo_id"]: (row["size_y"], row["size_x"]) for row in plan.to_pylist()}
    spacings = labels.tomograms.set_index("tomo_id")["voxel_spacing_angstrom"].to_dict()
    return evaluate(
        read_table(join(detections, "slabs")),
        read_table(join(detections, "motors.parquet")),
        labels.motors,
        labels.tomograms,
        {name: box_edges(shape, spacings.get(name), trained) for name, shape in shapes.items()},
        reach_angstrom=trained.targets.reach_angstrom,
        settings=settings,
    )


def run_settings(detections: str) -> RunSettings:
    """The settings of a finished run. Raises RunError if it is not there or not finished."""
    where = join(detections, "run.json")
    try:
        run = read_json(where)
    except OutageError:
        raise
    except StorageError:
        raise RunError(f"{detections}: holds no run.json; give the --out of a motor-ray detect") from None
    if not isinstance(run, dict) or run.get("status") != "done":
        raise RunError(f"{detections}: that run has not finished; run the same motor-ray detect again")
    return settings_from(run["settings"], where)


def export_run(detections: str, to: Format, out: str, settings: EvaluateSettings, *, relion: int) -> Row:
    """Write the motors of the finished run under `detections` for another program, to `out`; returns what was written.

    `out` becomes a folder for copick and ndjson, else a file; only motors from the threshold on are written. Raises
    RunError if there is no finished run; ExportError if `out` is there already, if a format in angstrom meets a
    tomogram without voxel spacing, or STAR a name it cannot hold. Then nothing is written.
    """
    run_settings(detections)
    tomograms = read_table(join(detections, "tomograms.parquet")).to_pylist()
    failures = read_table(join(detections, "failures.parquet"))
    unreadable = set(failures.filter(pc.is_null(failures["z"]))["tomo_id"].to_pylist())
    motors = chosen_motors(read_table(join(detections, "motors.parquet")).to_pandas(), to, settings.threshold)
    sizes = {row["tomo_id"]: tuple(row[f"size_{axis}"] for axis in PLACE) for row in tomograms}
    files = export_files(to, motors, sizes, sizes.keys() | unreadable, relion)
    if to == "copick":
        files |= {COPICK_CONFIG: copick_config(absolute(out))}
    if exists(out):
        raise ExportError(f"{out}: is there already, and nothing is overwritten; remove it or give another --out")
    uris = [join(out, name) if name else out for name in files]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_bytes, uris, files.values()))
    return {
        "out": out,
        "to": to,
        "threshold": settings.threshold,
        "tomograms": len(sizes.keys() | unreadable),
        "unreadable": len(unreadable),
        "with_motors": motors["tomo_id"].nunique(),
        "motors": len(motors),
        "files": uris,
    }


def box_edges(slice_shape: tuple[int, int], spacing: float | None, settings: RunSettings) -> tuple[float, float]:
    """Height and width, in slice voxels, of the boxes that the network was taught on such a slice."""
    height, width = settings.targets.box_pixels / frames_of(slice_shape, spacing, settings.frame)[0].scale
    return float(height), float(width)


def draw_dataset_check(manifest: pa.Table, labels: Labels, settings: RunSettings, out: str) -> Row:
    """Draw what the network is shown: a tomogram without motor, one with, and one with noise and blur.

    Raises LabelsError if the archive holds no labelled tomogram of either kind.
    """
    known = set(labels.tomograms["tomo_id"])
    tomograms = [row for row in manifest.to_pylist() if row["tomo_id"] in known]
    shown = [row for row in tomograms if len(labels.motors_of(row["tomo_id"]))]
    empty = [row for row in tomograms if not len(labels.motors_of(row["tomo_id"]))]
    if not shown or not empty:
        raise LabelsError(
            f"of {len(manifest)} tomograms {len(shown)} are labelled with a motor and {len(empty)} without; "
            "the figure needs one of each"
        )
    gentle = settings.augment.model_copy(update={"poisson_probability": 0.0, "blur_sigma_max": 0.0})
    harsh = settings.augment.model_copy(update={"poisson_probability": 1.0})
    rows = [("no motor", empty[0], gentle), ("motor", shown[0], gentle), ("motor, noise and blur", shown[-1], harsh)]
    dataset_check(out, [_check_row(title, row, labels, settings, changes) for title, row, changes in rows])
    return {"figure": out, "tomograms": [row["tomo_id"] for _, row, _ in rows]}


def _check_row(title: str, row: Row, labels: Labels, settings: RunSettings, changes: AugmentSettings) -> CheckRow:
    """One line of the dataset check: the middle slice, or that of the tomogram's first motor, and its frame there."""
    motors, spacing = labels.motors_of(row["tomo_id"]), labels.spacing_of(row["tomo_id"])
    z = min(round(motors[0, 0]), row["size_z"] - 1) if len(motors) else row["size_z"] // 2
    image = read_slice(row, z, settings.archive)
    reach, edge = settings.targets.reach_angstrom / spacing, settings.targets.box_pixels
    placement = frames_of(image.shape, spacing, settings.frame)
    boxes = [boxes_on_frame(motors, z, reach, frame, edge) for frame in placement]
    tile = int(np.argmax([len(some) for some in boxes]))
    pixels = make_frames(image, placement, settings.preprocess)[tile]
    rng = sample_generator(settings.train.seed, 0, row["tomo_id"])
    augmented, moved = augment(pixels[None], boxes[tile], rng, changes)
    heatmap = draw_targets(moved, settings.frame.size, settings.targets).heatmap[0].numpy()
    on_slice = placement[tile].boxes_to_slice(boxes[tile])
    return CheckRow(title, to_uint8(image, settings.preprocess), augmented[0], heatmap, on_slice, moved)


def draw_motors(manifest: pa.Table, labels: Labels, detections: str, tomo_ids: Sequence[str], out: str) -> None:
    """Draw a slice of each of `tomo_ids` with what the run under `detections` found there, and what is true."""
    settings = run_settings(detections)
    found = read_table(join(detections, "motors.parquet")).to_pandas()
    rows = {row["tomo_id"]: row for row in manifest.to_pylist()}
    panels = []
    for name in tomo_ids:
        own = found.loc[found["tomo_id"] == name, ["z", "y", "x", "score"]].to_numpy(np.float64)
        panels.append(_motors_panel(rows[name], labels, own, settings))
    motors_figure(out, panels)


def _motors_panel(row: Row, labels: Labels, found: NDArray[np.float64], settings: RunSettings) -> MotorsPanel:
    """The slice through the first true motor, else the best found one, else the middle; motors near it are marked."""
    true, spacing = labels.motors_of(row["tomo_id"]), labels.spacing_of(row["tomo_id"])
    seen = true if len(true) else found
    z = min(round(seen[0, 0]), row["size_z"] - 1) if len(seen) else row["size_z"] // 2
    image = to_uint8(read_slice(row, z, settings.archive), settings.preprocess)
    near_true, near_found = (some[np.abs(some[:, 0] - z) * spacing <= NEAR_ANGSTROM, 1:] for some in (true, found))
    edge = box_edges((row["size_y"], row["size_x"]), spacing, settings)[0]
    return MotorsPanel(f"{row['tomo_id']}, z = {z}", image, near_true, near_found, edge, spacing)


def read_slice(row: Row, z: int, settings: ArchiveSettings) -> NDArray[Any]:
    """Slice `z` of a tomogram, which is a row of the MANIFEST, as stored."""
    shape = (row["size_z"], row["size_y"], row["size_x"])
    return open_tomogram(row["uri"], row["format"], shape, settings).read_slice(z)
