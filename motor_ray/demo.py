"""The whole story in a few minutes on two cores: simulate, train, detect, evaluate, draw."""

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.cluster import connected
from motor_ray.distributed.detect import detect
from motor_ray.distributed.team import slots_for
from motor_ray.distributed.training import train
from motor_ray.errors import RunError, StorageError
from motor_ray.machine import cores
from motor_ray.progress import progress_bar
from motor_ray.results import draw_motors, evaluate_run
from motor_ray.storage import read_table
from motor_ray.tables import FAILURES

SHAPE = (48, 256, 256)
SPACING_ANGSTROM = 16.0
TRAIN_COUNTS = [0, 1, 2, 1, 1, 0, 1, 3] * 4
HELD_OUT_COUNTS = [0, 1, 2, 1, 0, 1, 3, 0, 1, 1, 0, 1]
"""Motors of each tomogram: more than the public data's mix, so that little time suffices to learn."""

MARKER = "motor-ray-demo.txt"
"""A folder is deleted by the next demo only if this file says that a demo made it."""


def demo_settings() -> RunSettings:
    """The recipe, cut down to what two cores can do: a ResNet-18 on small frames, a few epochs from random weights."""
    return settings_from(
        {
            "frame": {"size": SHAPE[1]},
            "targets": {"box_pixels": 40},
            "model": {"backbone": "resnet18", "pretrained": "none", "neck_channels": 64, "head_channels": 32},
            "augment": {"flips": True, "rotation_degrees": 180},
            "train": {"epochs": 10, "batch_size": 4, "learning_rate": 1e-3, "worker_cpus": cores(), "tomograms": "no"},
        }
    )


def demo(out: str) -> dict[str, Any]:
    """Run the demo in the folder `out`; returns its scores and where things are.

    Raises RunError if `out` holds something that is not a demo's.
    """
    folder = fresh_folder(out)
    settings = demo_settings()
    held_out = simulate(folder / "held_out_archive", HELD_OUT_COUNTS, seed=421)
    with connected(slots_for(1, settings)):
        model = train_demo(folder)
        manifest = make_manifest(str(folder / "held_out_archive"), settings.archive)
        found = str(folder / "detections")
        detect(manifest, FAILURES.empty_table(), model, found, settings)
    scores = evaluate_run(found, held_out, settings.evaluate)
    picture = str(folder / "motors.png")
    names = held_out.tomograms.sort_values("n_motors", ascending=False)["tomo_id"].tolist()
    draw_motors(manifest, held_out, found, [*names[:5], names[-1]], picture)
    show_table(held_out, found, scores, scores["tomograms"]["threshold"])
    tomograms = {name: scores["tomograms"][name] for name in ("f2", "precision", "recall")}
    return {"tomograms": tomograms, "mAP@0.5": scores["slices"]["mAP@0.5"], "picture": picture, "model": model}


def train_demo(folder: Path) -> str:
    """Train the demo's detector below `folder`; its checkpoint."""
    settings = demo_settings()
    labels = simulate(folder / "train_archive", TRAIN_COUNTS, seed=420)
    manifest = make_manifest(str(folder / "train_archive"), settings.archive)
    run = train(manifest, labels, settings, str(folder / "runs"), "demo", workers=(1, 1), resume=False)
    return str(run["model"])


def fresh_folder(out: str) -> Path:
    """The folder `out`, empty but for the marker. Raises RunError rather than deleting what no demo made."""
    folder = Path(out).absolute()
    try:
        if folder.exists():
            if not (folder / MARKER).is_file() and any(folder.iterdir()):
                raise RunError(f"{out}: is not empty and was not made by a demo; give --out another folder")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        note = "Made by motor-ray demo, which deletes this folder when it runs again.\n"
        (folder / MARKER).write_text(note, "utf-8")
    except OSError as error:
        raise StorageError(f"{out}: cannot be made a folder ({error.strerror}); give --out another one") from None
    return folder


def simulate(folder: Path, motor_counts: list[int], seed: int, shape: tuple[int, int, int] = SHAPE) -> Labels:
    """Simulate an archive under a bar; its labels."""
    with progress_bar(f"simulating {folder.name}", len(motor_counts), "tomograms") as show:
        return simulate_archive(
            str(folder),
            len(motor_counts),
            seed,
            shape,
            voxel_spacing_angstrom=SPACING_ANGSTROM,
            motor_counts=motor_counts,
            progress=show,
        )


def show_table(labels: Labels, detections: str, scores: dict[str, Any], threshold: float) -> None:
    """What was found in each tomogram, in the terminal."""
    motors = read_table(f"{detections}/motors.parquet").to_pandas()
    table = Table(title="Motors in the held-out tomograms (simulated)")
    for column in ("tomogram", "true", "found", "best score"):
        table.add_column(column, justify="left" if column == "tomogram" else "right")
    for row in labels.tomograms.to_dict("records"):
        own = motors.loc[motors["tomo_id"] == row["tomo_id"], "score"]
        best = f"{own.max():.2f}" if len(own) else "-"
        table.add_row(row["tomo_id"], str(row["n_motors"]), str(int((own >= threshold).sum())), best)
    console = Console(stderr=True)
    console.print(table)
    summary = {name: scores["tomograms"][name] for name in ("f2", "precision", "recall")}
    console.print(
        "  ".join(f"{name} {'-' if value is None else format(value, '.3f')}" for name, value in summary.items())
    )
