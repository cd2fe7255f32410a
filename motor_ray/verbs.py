"""What each verb of the command line takes and does: its options, and the one function it calls.

Verbs import what they need when they run, so that ``--help`` answers at once.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from motor_ray.config import (
    ArchiveSettings,
    AugmentSettings,
    DetectSettings,
    EvaluateSettings,
    FrameSettings,
    LinkSettings,
    LossSettings,
    ModelSettings,
    PreprocessSettings,
    RunSettings,
    Settings,
    TargetSettings,
    TrainSettings,
    read_settings,
)
from motor_ray.errors import ConfigError

Result = tuple[dict[str, Any], int]
"""The JSON object of a verb, and its exit code."""


class ArchiveFlags(Settings):
    """The settings that concern reading an archive."""

    archive: ArchiveSettings = ArchiveSettings()


class DetectFlags(ArchiveFlags):
    """The settings that concern detection with a trained model."""

    detect: DetectSettings = DetectSettings()
    link: LinkSettings = LinkSettings()


class FigureFlags(ArchiveFlags):
    """The settings that concern what the network is shown."""

    frame: FrameSettings = FrameSettings()
    preprocess: PreprocessSettings = PreprocessSettings()
    augment: AugmentSettings = AugmentSettings()
    targets: TargetSettings = TargetSettings()


class TrainFlags(FigureFlags):
    """The settings that concern training."""

    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    detect: DetectSettings = DetectSettings()


class EvaluateFlags(Settings):
    """The settings that concern comparing with labels."""

    evaluate: EvaluateSettings = EvaluateSettings()


Unprefixed = tyro.conf.arg(name="")
"""Groups of settings stand at the top: ``--detect.score-threshold``, not ``--settings.detect.score-threshold``."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Simulate, train, detect, evaluate and draw: the whole story in a few minutes on two cores."""

    out: str = "motor-ray-demo"
    """Folder for everything the demo makes; made anew each time."""

    def run(self) -> Result:
        """Run the demo."""
        from motor_ray.demo import demo

        return demo(self.out), 0


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Make tomograms with known motors: DIR/train/<tomo_id>/... and DIR/train_labels.csv."""

    out: str
    """Folder to make them in."""

    tomograms: int = 8
    """How many."""

    seed: int = 420
    """The same seed gives the same tomograms, byte for byte."""

    shape: tuple[int, int, int] = (64, 320, 320)
    """Voxels along z, y and x."""

    format: Literal["jpeg", "mrc", "zarr"] = "jpeg"
    """JPEG slices as in the Kaggle challenge, MRC files, or OME-Zarr."""

    voxel_spacing_angstrom: float | None = None
    """One voxel spacing for all; drawn from the public data's spacings when not given."""

    def run(self) -> Result:
        """Write the tomograms."""
        from motor_ray.archive.simulate import simulate_archive
        from motor_ray.progress import progress_bar

        with progress_bar("simulating", self.tomograms, "tomograms") as show:
            labels = simulate_archive(
                self.out,
                self.tomograms,
                self.seed,
                self.shape,
                self.format,
                voxel_spacing_angstrom=self.voxel_spacing_angstrom,
                progress=show,
            )
        motors = len(labels.motors)
        return {"archive": f"{self.out}/train", "labels": f"{self.out}/train_labels.csv", "motors": motors}, 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """List the tomograms of an archive in a table, for `detect --manifest`."""

    archive: str
    """Folder or s3:// prefix that holds tomograms, at any depth."""

    out: str
    """Parquet file to write."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[ArchiveFlags, Unprefixed] = ArchiveFlags()

    def run(self) -> Result:
        """Write the table."""
        from motor_ray.archive.manifest import check_usable, find_tomograms, write_manifest

        table, failures = find_tomograms(self.archive, all_settings(self).archive)
        check_usable(table, failures)
        write_manifest(table, self.out, failures)
        unusable = failures["error"].to_pylist()
        slices = sum(table["size_z"].to_pylist())
        result = {"manifest": self.out, "tomograms": len(table), "slices": slices, "unusable": unusable}
        return result, bool(unusable)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a detector on labelled tomograms."""

    archive: str
    """Folder or s3:// prefix that holds the tomograms."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    storage: str
    """Folder or s3:// prefix for runs."""

    name: str
    """Name of this run: checkpoints and metrics go to STORAGE/NAME."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    workers: int = 1
    """Processes that train together, one GPU each where there are GPUs."""

    resume: bool = False
    """Go on with the run of this name after its last finished epoch."""

    settings: Annotated[TrainFlags, Unprefixed] = TrainFlags()

    def run(self) -> Result:
        """Train."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.archive.manifest import find_tomograms
        from motor_ray.distributed.training import train

        settings = all_settings(self)
        manifest, failures = find_tomograms(self.archive, settings.archive)
        labels = read_labels(self.labels, settings.archive)
        run = train(manifest, labels, settings, self.storage, self.name, workers=self.workers, resume=self.resume)
        names = ("model", "epochs", "seconds", "tomograms", "slices", "best", "unread")
        result = {name: run[name] for name in names} | {"unusable": failures["error"].to_pylist()}
        return result, bool(run["unread"] or len(failures))


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Find motors in every tomogram of an archive."""

    out: str
    """Folder or s3:// prefix for the tables."""

    model: str
    """Checkpoint folder, such as STORAGE/NAME/best."""

    archive: str | None = None
    """Folder or s3:// prefix that holds the tomograms; or give --manifest."""

    manifest: str | None = None
    """Table made by `motor-ray manifest`."""

    dry_run: bool = False
    """Only say what would be done, fetched and how long it would take, from a sample of half a minute."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[DetectFlags, Unprefixed] = DetectFlags()

    def run(self) -> Result:
        """Detect."""
        from motor_ray.archive.manifest import find_tomograms, read_manifest, read_unusable
        from motor_ray.distributed.detect import detect, dry_run

        if (self.archive is None) == (self.manifest is None):
            raise ConfigError("give either --archive or --manifest, the tomograms to look at")
        settings = all_settings(self)
        if self.manifest:
            tomograms = (read_manifest(self.manifest), read_unusable(self.manifest))
        else:
            tomograms = find_tomograms(str(self.archive), settings.archive)
        if self.dry_run:
            return dry_run(*tomograms, self.model, settings), 0
        run = detect(*tomograms, self.model, self.out, settings)
        names = ("tomograms", "slices", "seconds", "counts")
        return {"out": self.out, **{name: run[name] for name in names}}, bool(run["counts"]["failures"])


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare what `detect` found with labels."""

    detections: str
    """The --out of a finished `motor-ray detect`."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[EvaluateFlags, Unprefixed] = EvaluateFlags()

    def run(self) -> Result:
        """Evaluate."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.results import evaluate_run

        return evaluate_run(self.detections, read_labels(self.labels), all_settings(self).evaluate), 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write what `detect` found for another program."""

    detections: str
    """The --out of a finished `motor-ray detect`."""

    to: Literal["kaggle", "star", "copick", "ndjson", "csv"]
    """A submission to the Kaggle challenge, RELION's STAR, a copick project, point annotations of the CryoET Data
    Portal, or a table."""

    out: str
    """What to write: a folder for copick and ndjson, else a file. It must not be there yet."""

    relion: Literal[4, 5] = 5
    """Version of RELION that is to read the STAR file. 5 takes angstrom from the tomogram's centre, which hold for any
    binning; 4 takes voxels, which must be multiplied by the binning that the tomogram had, but needs no voxel
    spacing."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[EvaluateFlags, Unprefixed] = EvaluateFlags()
    """Only motors from `--evaluate.threshold` on are written."""

    def run(self) -> Result:
        """Export."""
        from motor_ray.results import export_run

        return export_run(self.detections, self.to, self.out, all_settings(self).evaluate, relion=self.relion), 0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Draw what the network is shown: raw slice, augmented frame, heatmap."""

    archive: str
    """Folder or s3:// prefix that holds the tomograms."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    out: str
    """PNG file to write."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[FigureFlags, Unprefixed] = FigureFlags()

    def run(self) -> Result:
        """Draw."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.archive.manifest import find_tomograms
        from motor_ray.results import draw_dataset_check

        settings = all_settings(self)
        manifest, failures = find_tomograms(self.archive, settings.archive)
        labels = read_labels(self.labels, settings.archive)
        unusable = failures["error"].to_pylist()
        result = draw_dataset_check(manifest, labels, settings, self.out)
        return result | {"unusable": unusable}, bool(unusable)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast this machine is, as ratios within one run."""

    what: tyro.conf.Positional[Literal["model", "detect", "looks"]]
    """What to measure: the network; the pipeline that feeds it from object storage; what looking twice saves."""

    parts: tuple[Literal["device", "peers", "growth", "model"], ...] = ()
    """Parts of `bench detect`; all of them when not given."""

    model: str | None = None
    """Checkpoint for `bench looks`; the demo's is trained when not given."""

    out: str | None = None
    """JSON file to write, beside stdout."""

    def run(self) -> Result:
        """Measure."""
        from motor_ray.storage import write_json

        result = self._measure()
        if self.out:
            write_json(self.out, result)
        return result, 0

    def _measure(self) -> dict[str, Any]:
        if self.parts and self.what != "detect":
            raise ConfigError("--parts chooses among the parts of `motor-ray bench detect`; leave it out here")
        if self.model and self.what != "looks":
            raise ConfigError("--model is the detector of `motor-ray bench looks`; leave it out here")
        if self.what == "detect":
            from motor_ray.bench.detect import PARTS, bench_detect

            return bench_detect(self.parts or PARTS)
        if self.what == "looks":
            from motor_ray.bench.looks import bench_looks

            return bench_looks(self.model)
        from motor_ray.bench.model import bench_model

        return bench_model()


Verb = Demo | Simulate | Manifest | Train | Detect | Evaluate | Export | Figure | Bench


def all_settings(verb: Any) -> RunSettings:
    """Every setting of a run of `verb`: its flags', and its --config file's for groups that it has no flags for."""
    base = read_settings(verb.config) if verb.config else RunSettings()
    return base.model_copy(update={name: getattr(verb.settings, name) for name in type(verb.settings).model_fields})
