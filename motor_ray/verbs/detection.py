"""Verbs that find motors, judge what was found, and hand it on."""

from dataclasses import dataclass
from typing import Annotated, Literal

from motor_ray.errors import ConfigError
from motor_ray.verbs.flags import CareFlags, DetectFlags, EvaluateFlags, Result, Unprefixed, all_settings


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Find motors in every tomogram of an archive."""

    out: str
    """Folder or s3:// prefix for the tables."""

    model: tuple[str, ...]
    """Checkpoint folder, such as STORAGE/NAME/best; of several, heatmaps are averaged. STORAGE/NAME/snapshots stands
    for all in it."""

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
        from motor_ray.results import motors_told

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
        said = {"out": self.out, **{name: run[name] for name in names}, **motors_told(self.out)}
        return said, bool(run["counts"]["failures"])


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
class LabelCare:
    """List labels that are likely missing, wrong or misplaced, with pictures."""

    detections: str
    """The --out of a finished `motor-ray detect` in labelled tomograms."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    out: str
    """Folder or s3:// prefix for the table and the pictures. It must not be there yet."""

    archive: str | None = None
    """Folder or s3:// prefix that holds the tomograms, for the pictures; where the run found them when not given."""

    manifest: str | None = None
    """Table made by `motor-ray manifest`, in place of --archive."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[CareFlags, Unprefixed] = CareFlags()

    def run(self) -> Result:
        """Compare."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.archive.manifest import find_tomograms, read_manifest
        from motor_ray.results import care_for_labels

        if self.archive and self.manifest:
            raise ConfigError("give --archive or --manifest, the tomograms for the pictures, not both")
        settings = all_settings(self)
        manifest = read_manifest(self.manifest) if self.manifest else None
        if self.archive:
            manifest = find_tomograms(self.archive, settings.archive)[0]
        labels = read_labels(self.labels, settings.archive)
        return care_for_labels(manifest, labels, self.detections, self.out, settings.care), 0
