"""Whole validation tomograms through the detection pipeline, after training or beside it."""

from typing import Any

import ray.train

from motor_ray.archive.labels import read_labels
from motor_ray.config_values import settings_from
from motor_ray.distributed.detect import detect
from motor_ray.errors import MotorRayError
from motor_ray.results import evaluate_run
from motor_ray.storage import join, read_json, read_table, write_json
from motor_ray.tables import FAILURES

EPOCHS = "validation/epochs"
"""Folder, below a run's, of the scores that were taken beside training."""


def look_at_tomograms(run_uri: str, model: str, out: str) -> dict[str, Any]:
    """Detect in the validation tomograms of a run, into `out`, with one of its models; what `evaluate` says of it."""
    run = read_json(join(run_uri, "run.json"))
    settings = settings_from(run["settings"], run_uri)
    manifest = read_table(join(run_uri, "manifest.parquet"))
    chosen = [row for row in manifest.to_pylist() if row["tomo_id"] in set(run["split"]["validation"])]
    detect(type(manifest).from_pylist(chosen, schema=manifest.schema), FAILURES.empty_table(), model, out, settings)
    return evaluate_run(out, read_labels(join(run_uri, "labels.csv")), settings.evaluate)


def validate_checkpoint(checkpoint: ray.train.Checkpoint, run_uri: str, epoch: int) -> dict[str, Any]:
    """What Ray Train runs beside training, with a checkpoint of the run; the tomogram scores after that epoch.

    What goes wrong is written down in their place: Ray Train would only log it, where nobody looks.
    """
    model = join(run_uri, checkpoint.path.rstrip("/").rsplit("/", 1)[-1])
    try:
        scores = look_at_tomograms(run_uri, model, join(run_uri, "validation", f"epoch_{epoch:04d}"))["tomograms"]
    except MotorRayError as error:
        scores = {"error": str(error)}
    write_json(join(run_uri, EPOCHS, f"{epoch:04d}.json"), {"epoch": epoch - 1, **scores})
    return {f"tomogram_{name}": scores[name] for name in ("f2", "precision", "recall") if name in scores}
