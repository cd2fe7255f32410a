"""What a finished run is worth, in numbers and pictures.

Joins archive, slices and motors, which know nothing of one another.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from motor_ray.archive.labels import Labels
from motor_ray.config import CareSettings, EvaluateSettings, RunSettings
from motor_ray.config_values import checked, settings_from
from motor_ray.errors import ConfigError, ExportError, LabelsError, OutageError, RunError, StorageError
from motor_ray.motors.calibration import Calibration
from motor_ray.motors.evaluate import evaluate
from motor_ray.motors.export import PLACE, Format, chosen_motors, copick_config, export_files
from motor_ray.motors.figures import MotorsPanel, dataset_check, motors_figure, validation_page
from motor_ray.motors.label_care import KINDS, find_suspects
from motor_ray.motors.matching import outcomes
from motor_ray.storage import absolute, exists, join, read_json, read_table, write_bytes, write_table
from motor_ray.views import box_edges, check_row, close_ups, motors_panel, spacing_of

Row = dict[str, Any]

WRITERS = 16
"""Files that are written at a time."""

COPICK_CONFIG = "copick_config.json"

SHEET_COLUMNS = 4
"""Suspects in a row of the contact sheet."""


def evaluate_run(detections: str, labels: Labels, settings: EvaluateSettings) -> Row:
    """Compare the finished run under `detections` with labels: what `motor-ray evaluate` prints.

    The threshold is that of `settings`, else the one that was learned for the run's model, else the usual one;
    ``threshold_from`` says which. Raises RunError if there is no finished run, MetricError if a tomogram of it is not
    labelled.
    """
    trained = run_settings(detections)
    motors = read_table(join(detections, "motors.parquet"))
    settings, origin = decided(detections, motors, settings)
    known = set(labels.tomograms["tomo_id"])
    tomograms = read_table(join(detections, "tomograms.parquet")).to_pylist()
    scores = evaluate(
        read_table(join(detections, "slabs")),
        motors,
        labels.motors,
        labels.tomograms,
        {
            row["tomo_id"]: box_edges((row["size_y"], row["size_x"]), spacing_of(row, labels), trained)
            for row in tomograms
            if row["tomo_id"] in known
        },
        reach_angstrom=trained.targets.reach_angstrom,
        settings=settings,
    )
    return {"threshold_from": origin, **scores}


def decided(detections: str, motors: pa.Table, settings: EvaluateSettings) -> tuple[EvaluateSettings, str]:
    """`settings` with a threshold for the finished run under `detections`, and where it is from.

    `motors` are the MOTORS of the run. Raises RunError if it is not finished.
    """
    if settings.threshold is not None:
        return settings, "settings"
    there = finished_run(detections).get("calibration")
    if there is None:
        return settings.model_copy(update={"threshold": settings.threshold_or_usual}), "usual"
    calibration = checked(Calibration, there, join(detections, "run.json"))
    threshold = calibration.threshold_of(tomogram_maxima(detections, motors))
    return settings.model_copy(update={"threshold": threshold}), f"calibration ({calibration.method})"


def motors_told(detections: str) -> Row:
    """How many motors of the finished run under `detections` count as such, and from which score on."""
    motors = read_table(join(detections, "motors.parquet"))
    settings, origin = decided(detections, motors, EvaluateSettings())
    counted = pc.sum(pc.greater_equal(motors["score"], settings.threshold_or_usual)).as_py() or 0
    return {"motors": counted, "threshold": settings.threshold, "threshold_from": origin}


def tomogram_maxima(detections: str, motors: pa.Table) -> NDArray[np.float64]:
    """``(n,)`` scores of the best motor of each tomogram that a run looked at, NaN where it found none."""
    tomo_ids = read_table(join(detections, "tomograms.parquet"), columns=["tomo_id"])["tomo_id"].to_pylist()
    best = motors.select(["tomo_id", "score"]).to_pandas().groupby("tomo_id")["score"].max()
    return np.asarray(best.reindex(tomo_ids).to_numpy(dtype=np.float64))


def run_settings(detections: str) -> RunSettings:
    """The settings of a finished run. Raises RunError if it is not there or not finished."""
    return settings_from(finished_run(detections)["settings"], join(detections, "run.json"))


def finished_run(detections: str) -> Row:
    """The run.json of a finished run. Raises RunError if it is not there or not finished."""
    where = join(detections, "run.json")
    try:
        run = read_json(where)
    except OutageError:
        raise
    except StorageError:
        raise RunError(f"{detections}: holds no run.json; give the --out of a motor-ray detect") from None
    if not isinstance(run, dict) or run.get("status") != "done":
        raise RunError(f"{detections}: that run has not finished; run the same motor-ray detect again")
    if "best" in run:
        raise RunError(
            f"{detections}: is a training, expected a detection; give the --out of a motor-ray detect, or what a "
            f"training saw in its validation tomograms, {join(detections, 'validation', 'best')}"
        )
    return run


def export_run(detections: str, to: Format, out: str, settings: EvaluateSettings, *, relion: int) -> Row:
    """Write the motors of the finished run under `detections` for another program, to `out`; returns what was written.

    `out` becomes a folder for copick and ndjson, else a file; only motors from the threshold on are written, which is
    chosen as in `evaluate_run`. Raises RunError if there is no finished run; ExportError if `out` is there already, if
    a format in angstrom meets a tomogram without voxel spacing, or STAR a name it cannot hold. Then nothing is written.
    """
    finished_run(detections)
    tomograms = read_table(join(detections, "tomograms.parquet")).to_pylist()
    failures = read_table(join(detections, "failures.parquet"))
    unreadable = set(failures.filter(pc.is_null(failures["z"]))["tomo_id"].to_pylist())
    found = read_table(join(detections, "motors.parquet"))
    settings, origin = decided(detections, found, settings)
    motors = chosen_motors(found.to_pandas(), to, settings.threshold_or_usual)
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
        "threshold_from": origin,
        "tomograms": len(sizes.keys() | unreadable),
        "unreadable": len(unreadable),
        "with_motors": motors["tomo_id"].nunique(),
        "motors": len(motors),
        "files": uris,
    }


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
    dataset_check(out, [check_row(title, row, labels, settings, changes) for title, row, changes in rows])
    return {"figure": out, "tomograms": [row["tomo_id"] for _, row, _ in rows]}


def draw_motors(manifest: pa.Table, labels: Labels, detections: str, tomo_ids: Sequence[str], out: str) -> None:
    """Draw a slice of each of `tomo_ids` with what the run under `detections` found there, and what is true."""
    settings = run_settings(detections)
    found = read_table(join(detections, "motors.parquet")).to_pandas()
    rows = {row["tomo_id"]: row for row in manifest.to_pylist()}
    panels = []
    for name in tomo_ids:
        own = found.loc[found["tomo_id"] == name, ["z", "y", "x", "score"]].to_numpy(np.float64)
        panels.append(motors_panel(rows[name], labels, own, settings))
    motors_figure(out, panels)


def draw_validation(
    manifest: pa.Table, labels: Labels, detections: str, out: str, settings: EvaluateSettings, most: int = 6
) -> dict[str, int]:
    """Draw what the run under `detections` found, missed and wrongly found, at most so many of each.

    Those with the best scores are drawn, and of missed motors the first; how they are told apart is as in
    `evaluate_run`. Slices that cannot be read are passed over. `manifest` may hold more tomograms than were looked at.

    Returns how many there are in all: ``{"found": ..., "missed": ..., "false": ...}``. Raises RunError if there is no
    finished run, MetricError if a tomogram has no voxel spacing.
    """
    run = run_settings(detections)
    looked_at = set(read_table(join(detections, "tomograms.parquet"))["tomo_id"].to_pylist())
    rows = {row["tomo_id"]: row for row in manifest.to_pylist() if row["tomo_id"] in looked_at}
    table = read_table(join(detections, "motors.parquet"))
    threshold = decided(detections, table, settings)[0].threshold_or_usual
    motors = table.to_pandas()
    tomograms = labels.tomograms[labels.tomograms["tomo_id"].isin(rows.keys())]
    came = outcomes(motors, labels.motors, tomograms, threshold, settings.radius_angstrom)
    marked = motors[motors["score"] >= threshold]
    found, missed, false = (list(itertools.islice(close_ups(group, rows, labels, marked, run), most)) for group in came)
    counts = {name: len(group) for name, group in came._asdict().items()}
    validation_page(out, found, missed, false, counts)
    return counts


def care_for_labels(
    manifest: pa.Table | None, labels: Labels, detections: str, out: str, settings: CareSettings
) -> Row:
    """Which labels the run under `detections` contradicts, as tables and a contact sheet in the folder `out`.

    Written are suspects.parquet, suspects.csv and contact_01.png, ..., most suspicious first. Pictures are of the
    tomograms of `manifest`, else of where the run found them; a suspect whose slice cannot be read has none.

    Returns how many there are of each kind, and where. Raises RunError if there is no finished run, ConfigError if it
    kept too few detections to tell which labels it does not see, ExportError if `out` is there already, LabelsError if
    no tomogram is both labelled and looked at.
    """
    run = run_settings(detections)
    if settings.wrong_score < (kept := run.detect.score_threshold):
        flags = f"--care.wrong-score {kept:g}" + (f" --care.missing-score {kept:g}" * (kept > settings.missing_score))
        raise ConfigError(
            f"care.wrong_score {settings.wrong_score:g}: the run kept no detections below "
            f"{kept:g}; give {flags}, or detect again with --detect.score-threshold "
            f"{settings.wrong_score:g}"
        )
    if exists(out):
        raise ExportError(f"{out}: is there already, and nothing is overwritten; remove it or give another --out")
    motors = read_table(join(detections, "motors.parquet"))
    table, counts = find_suspects(
        read_table(join(detections, "slabs")),
        motors,
        labels.motors,
        labels.tomograms,
        reach_angstrom=run.targets.reach_angstrom,
        settings=settings,
    )
    write_table(table, join(out, "suspects.parquet"))
    write_bytes(join(out, "suspects.csv"), table.to_pandas().to_csv(index=False, lineterminator="\n").encode())
    rows = manifest if manifest is not None else read_table(join(detections, "tomograms.parquet"))
    marked = motors.filter(pc.greater_equal(motors["score"], settings.wrong_score)).to_pandas()
    sheets = draw_suspects(table.to_pandas(), rows, labels, marked, run, out, settings.tiles)
    return {
        "out": out,
        "suspects": {kind: counts[kind] for kind in KINDS},
        **{name: count for name, count in counts.items() if name not in KINDS},
        "table": join(out, "suspects.csv"),
        "sheets": sheets,
    }


def draw_suspects(
    suspects: pd.DataFrame,
    manifest: pa.Table,
    labels: Labels,
    found: pd.DataFrame,
    settings: RunSettings,
    out: str,
    tiles: int,
) -> list[str]:
    """Draw the SUSPECTS, in their order and `tiles` to a page, with the motors `found` around them; URIs of the pages.

    Passed over are those whose tomogram is not in `manifest` or whose slice cannot be read.
    """
    rows = {row["tomo_id"]: row for row in manifest.to_pylist()}
    there = suspects[suspects["tomo_id"].isin(rows.keys())]
    panels = (
        panel._replace(title=_suspect_title(row))
        for place, row in enumerate(there.to_dict("records"))
        for panel in close_ups(there.iloc[[place]], rows, labels, found, settings)
    )
    pages: list[str] = []
    while page := list[MotorsPanel](itertools.islice(panels, tiles)):
        pages.append(join(out, f"contact_{len(pages) + 1:02d}.png"))
        motors_figure(pages[-1], page, SHEET_COLUMNS, "labelled")
    return pages


def _suspect_title(row: Mapping[Hashable, Any]) -> str:
    off = "" if np.isnan(row["distance_angstrom"]) else f", {row['distance_angstrom'] / 10:.0f} nm"
    return f"{row['rank']}. {row['kind']}, {row['score']:.2f}{off}\n{row['tomo_id']}, z = {row['z']:.0f}"
