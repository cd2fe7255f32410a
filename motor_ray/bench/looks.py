"""What looking twice saves, and what it costs: the same archive, exhaustively and from coarse to fine.

The detector is the demo's, trained on its simulated tomograms; the archive is another, of tomograms as deep as real
ones, with the public data's mix of motors.
"""

import tempfile
from pathlib import Path
from typing import Any

from motor_ray.archive.labels import Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import motor_counts_like_public
from motor_ray.bench.timing import machine
from motor_ray.config_values import settings_from
from motor_ray.demo import simulate, train_demo
from motor_ray.detector.description import Models
from motor_ray.detector.device import pick_device
from motor_ray.distributed.detect import detect
from motor_ray.results import evaluate_run
from motor_ray.tables import FAILURES

Shape = tuple[int, int, int]

SHAPE: Shape = (240, 256, 256)
SEED = 4242

FEWER, F2_APART = 4.0, 0.01
"""What is asked: at least so many times fewer slices, and F2 no farther apart than that."""


def bench_looks(model: Models = (), *, tomograms: int = 64, shape: Shape = SHAPE) -> dict[str, Any]:
    """Detect twice in a simulated archive of `tomograms`, each of `shape`, with `model`, or else the demo's.

    Returns how many times fewer slices the second way takes and how far apart the F2 scores are, with what is asked.
    """
    with tempfile.TemporaryDirectory(prefix="motor-ray-bench-") as temporary:
        folder = Path(temporary)
        labels = simulate(folder / "archive", motor_counts_like_public(tomograms, SEED), SEED, shape)
        model = model or train_demo(folder)
        ways = {"exhaustive": True, "coarse to fine": False}
        looks = {name: _look(folder, model, labels, exhaustive=way) for name, way in ways.items()}
    return {
        "requirements": compare(looks),
        "tomograms": tomograms,
        "motors": len(labels.motors),
        "shape": list(shape),
        "looks": looks,
        "machine": machine(pick_device()),
    }


def compare(looks: dict[str, Any]) -> dict[str, Any]:
    """How the two ways compare, and whether that is what is asked."""
    all_slices, some = looks["exhaustive"], looks["coarse to fine"]
    fewer = all_slices["slices"] / some["slices"]
    apart = abs(all_slices["f2"] - some["f2"])
    return {
        "times_fewer_slices": {"value": round(fewer, 2), "wanted": FEWER, "ok": fewer >= FEWER},
        "f2_apart": {"value": round(apart, 4), "wanted": F2_APART, "ok": apart <= F2_APART},
    }


def _look(folder: Path, model: Models, labels: Labels, *, exhaustive: bool) -> dict[str, Any]:
    settings = settings_from({"detect": {"exhaustive": exhaustive}})
    out = str(folder / f"exhaustive {exhaustive}")
    manifest = make_manifest(str(folder / "archive" / "train"), settings.archive)
    run = detect(manifest, FAILURES.empty_table(), model, out, settings)
    scores = evaluate_run(out, labels, settings.evaluate)
    return {
        "slices": run["counts"]["planned"],
        "seconds": run["seconds"],
        **{name: scores["tomograms"][name] for name in ("f2", "precision", "recall")},
        "motors": {name: scores["motors"][name] for name in ("f2", "precision", "recall")},
    }
