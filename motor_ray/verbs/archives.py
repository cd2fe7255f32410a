"""Verbs that make tomograms, list them, and check them with their labels."""

from dataclasses import dataclass
from typing import Annotated, Literal

from motor_ray.verbs.flags import ArchiveFlags, FigureFlags, Result, Unprefixed, all_settings


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

    signal_to_noise: float = 3.0
    """How clear the tomograms are: density of a membrane over the noise in a voxel; below 1 is hard to see."""

    clutter: float = 1.0
    """How many beads, ribosomes, vesicles and other things that are no motors, relative to the usual."""

    def run(self) -> Result:
        """Write the tomograms."""
        from motor_ray.archive.imaging import SimulationSettings
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
                settings=SimulationSettings(signal_to_noise=self.signal_to_noise, clutter=self.clutter),
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
