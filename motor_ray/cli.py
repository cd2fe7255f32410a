"""``motor-ray <verb>``: parse, build the settings, call one function.

Results go to stdout, one JSON object a verb; progress and messages to stderr. Exit codes: 0 done; 1 finished, but
something was lost or failed; 2 wrong usage or input, before any work was done; 130 stopped by Ctrl-C.

Verbs import what they need when they run, so that ``--help`` answers at once.
"""

import argparse
import contextlib
import difflib
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from motor_ray import __version__
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
from motor_ray.errors import ConfigError, MotorRayError, UnfinishedError

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
        from motor_ray.archive.manifest import find_tomograms, write_manifest

        table, failures = find_tomograms(self.archive, all_settings(self).archive)
        write_manifest(table, self.out)
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
        labels = read_labels(self.labels, anonymous=settings.archive.anonymous)
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

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[DetectFlags, Unprefixed] = DetectFlags()

    def run(self) -> Result:
        """Detect."""
        from motor_ray.archive.manifest import find_tomograms, read_manifest
        from motor_ray.distributed.detect import detect
        from motor_ray.tables import FAILURES

        if (self.archive is None) == (self.manifest is None):
            raise ConfigError("give either --archive or --manifest, the tomograms to look at")
        settings = all_settings(self)
        if self.manifest:
            tomograms = (read_manifest(self.manifest), FAILURES.empty_table())
        else:
            tomograms = find_tomograms(str(self.archive), settings.archive)
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
        labels = read_labels(self.labels, anonymous=settings.archive.anonymous)
        unusable = failures["error"].to_pylist()
        result = draw_dataset_check(manifest, labels, settings, self.out)
        return result | {"unusable": unusable}, bool(unusable)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast this machine is, as ratios within one run."""

    what: tyro.conf.Positional[Literal["model"]]
    """What to measure."""

    out: str | None = None
    """JSON file to write, beside stdout."""

    def run(self) -> Result:
        """Measure."""
        from motor_ray.bench.model import bench_model
        from motor_ray.storage import write_json

        result = bench_model()
        if self.out:
            write_json(self.out, result)
        return result, 0


Verb = Demo | Simulate | Manifest | Train | Detect | Evaluate | Figure | Bench

VERBS: dict[str, type[Verb]] = {
    verb.__name__.lower(): verb for verb in (Demo, Simulate, Manifest, Train, Detect, Evaluate, Figure, Bench)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or the given arguments in its place; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("motor_ray").setLevel(logging.INFO)
    try:
        asked = parse(sys.argv[1:] if arguments is None else arguments)
        # Ray, too, prints to stdout, which is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result, code = asked.run()
    except MotorRayError as error:
        print(f"motor-ray: {error}", file=sys.stderr)
        return 1 if isinstance(error, UnfinishedError) else 2
    except KeyboardInterrupt:
        print("motor-ray: stopped", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    return int(code)


def parse(arguments: Sequence[str]) -> Verb:
    """The verb that `arguments` ask for, its settings complete. Raises ConfigError or SystemExit for wrong usage."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(f"motor-ray {__version__}" if name == "--version" else overview())
        raise SystemExit(0)
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb {name!r}; {hint}")
    refuse_repeats(arguments)
    verb = VERBS[name]
    asked: Verb = tyro.cli(verb, args=arguments[1:], default=defaults(verb, arguments), prog=f"motor-ray {name}")
    return asked


def overview() -> str:
    """What ``motor-ray --help`` says."""
    lines = [f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: motor-ray VERB [OPTIONS]",
            "",
            "Finds bacterial flagellar motors in cryo-electron tomograms.",
            "",
            *lines,
            "",
            "motor-ray VERB --help lists the options of a verb.",
        ]
    )


def refuse_repeats(arguments: Sequence[str]) -> None:
    """Raises ConfigError if an option is given twice: one of the two values would be dropped in silence."""
    options = [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    # --a.no-b is the opposite of --a.b, and an underscore stands for a dash.
    counts = Counter(option.replace("_", "-").replace(".no-", ".") for option in options)
    twice = [option for option, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(f"{', '.join(twice)}: given more than once; give it once")


def defaults(verb: type[Verb], arguments: Sequence[str]) -> Any:
    """An instance of `verb` as it is if no flag is given: the defaults, or the values of the --config file."""
    values = {one.name: one.default if one.default is not MISSING else tyro.MISSING for one in fields(verb)}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(arguments)[0].config
    if path and "settings" in values:
        flags = type(values["settings"])
        values["settings"] = part_of(read_settings(path), flags)
    return verb(**values)


def part_of(settings: RunSettings, flags: type[Settings]) -> Settings:
    """The groups of `settings` that `flags` has."""
    return flags(**{name: getattr(settings, name) for name in flags.model_fields})


def all_settings(verb: Any) -> RunSettings:
    """Every setting of a run of `verb`: its flags', and its --config file's for groups that it has no flags for."""
    base = read_settings(verb.config) if verb.config else RunSettings()
    return base.model_copy(update={name: getattr(verb.settings, name) for name in type(verb.settings).model_fields})


if __name__ == "__main__":
    raise SystemExit(main())
