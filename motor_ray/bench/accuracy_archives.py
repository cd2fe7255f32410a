"""The tomograms of the accuracy benchmark: simulated, hard, and the same wherever they are made.

    WORK/archives/<part>-<hash of what they are>/<spacing>/train/..., train_labels.csv

They are hard on purpose: low contrast, many distractors, and in the test voxel spacings that training did not see.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyarrow as pa

from motor_ray.archive.imaging import SimulationSettings
from motor_ray.archive.labels import Labels, read_labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config import ArchiveSettings, RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.samples import with_labelled_spacing
from motor_ray.machine import cores

Part = Literal["train", "validation", "calibration", "test", "unlabelled"]

SEEDS: dict[Part, int] = {"train": 7100, "validation": 7200, "calibration": 7500, "test": 7300, "unlabelled": 7400}
"""Seed of the first archive of each part; that of the next spacing is one higher."""


JUDGING: tuple[Part, ...] = ("calibration", "test")
"""What trained detectors look at whole."""

MADE_WITH = ("shape", "train_counts", "motor_counts", "signal_to_noise", "clutter")
ARCHIVE = (*MADE_WITH, "tomograms", "seen_spacings", "unseen_spacings")
"""Names of the sizes that tomograms depend on, the first whatever they are for."""

TOMOGRAMS_PER_PROCESS = 8
"""Fewer are simulated before another process has started."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the benchmark's data and budget depend on; results of other sizes are never mixed."""

    shape: tuple[int, int, int] = (40, 160, 160)
    tomograms: tuple[int, int, int, int, int] = (132, 48, 120, 120, 66)
    """To train on, to choose the best epoch with, to learn thresholds from, to test, and without labels."""

    seen_spacings: tuple[float, ...] = (13.1, 16.0, 19.7)
    """Angstrom per voxel of all parts."""

    unseen_spacings: tuple[float, ...] = (14.5, 22.0)
    """Angstrom per voxel that only the test has, for as many tomograms each."""

    train_counts: tuple[int, ...] = (1, 2, 0, 1)
    motor_counts: tuple[int, ...] = (1, 0, 2, 0, 1, 0, 1, 0)
    """Motors of each tomogram, in turn; of those that are not trained on half have none."""

    signal_to_noise: float = 1.4
    clutter: float = 1.7

    frame: int = 128
    box_angstrom: float = 1400.0
    """Less than the recipe's boxes, 100 pixels of a frame of 720, are of a public tomogram of 13.1 angstrom, 1750: so
    that with several levels those of some spacings belong to P2, and those of others to P3."""

    backbone: str = "resnet18"
    neck_channels: int = 128
    """Of our pyramids and of RetinaNet's and FCOS's, which take multiples of 32."""

    head_channels: int = 64
    epochs: int = 6
    batch_size: int = 4
    learning_rate: float = 1e-3
    slices_per_motor: int = 3

    @property
    def parts(self) -> dict[Part, int]:
        """Tomograms of each part."""
        return dict(zip(SEEDS, self.tomograms, strict=True))

    @property
    def box_pixels(self) -> float:
        """How large a box is in a frame of the middle one of the spacings."""
        return self.box_angstrom / self.seen_spacings[len(self.seen_spacings) // 2] * self.frame / self.shape[-1]

    @property
    def training(self) -> str:
        """A short name: equal for sizes with which the same is learned, whatever it is judged with afterwards."""
        shown = [archive_name(self, part) for part in self.parts if part not in JUDGING]
        how = {name: value for name, value in asdict(self).items() if name not in ARCHIVE}
        return short_hash([shown, how])

    @property
    def judging(self) -> str:
        """A short name: equal for sizes with which detectors are judged on the same tomograms."""
        return short_hash([archive_name(self, part) for part in JUDGING])


class Archive(NamedTuple):
    """Tomograms and what is known of them."""

    manifest: pa.Table
    labels: Labels


Changes = Mapping[str, Mapping[str, Any]]
"""Settings by group and name."""


def settings_of(sizes: Sizes, seed: int, changes: Changes) -> RunSettings:
    """The recipe at these sizes, with `changes` by group: the repository's own but for the backbone and the frame.

    Every row starts from random weights, for none may have seen images that others have not.
    """
    values: dict[str, dict[str, Any]] = {
        "frame": {"size": sizes.frame},
        "targets": {"box_pixels": sizes.box_pixels, "box_angstrom": sizes.box_angstrom},
        "model": {
            "backbone": sizes.backbone,
            "pretrained": "none",
            "neck_channels": sizes.neck_channels,
            "head_channels": sizes.head_channels,
        },
        "augment": {"flips": True, "rotation_degrees": 180, "translation_pixels": 10},
        "train": {
            "epochs": sizes.epochs,
            "batch_size": sizes.batch_size,
            "learning_rate": sizes.learning_rate,
            "scale_learning_rate": "no",
            "slices_per_motor": sizes.slices_per_motor,
            "seed": seed,
        },
        # A low threshold, so that an average precision has its whole curve, and linking all that there is. Of whole
        # tomograms every third slice, for time: 39 to 66 angstrom apart, where motors are 450 wide and taught on 120.
        "detect": {"score_threshold": 0.02, "z_stride": 3},
    }
    return settings_from(merged(values, changes), "bench accuracy")


def merged(settings: Changes, changes: Changes) -> dict[str, dict[str, Any]]:
    """`settings` with `changes`."""
    return {group: {**settings.get(group, {}), **changes.get(group, {})} for group in {**settings, **changes}}


def archive(work: Path, part: Part, sizes: Sizes) -> Archive:
    """The tomograms of a part; those that are not in the folder `work` yet are simulated there."""
    spacings = spacings_of(sizes, part)
    each, rest = divmod(sizes.parts[part], len(spacings))
    folder = work / "archives" / archive_name(sizes, part)
    groups = []
    for place, spacing in enumerate(spacings):
        where = folder / f"{spacing:g}"
        counts = sizes.train_counts if part == "train" else sizes.motor_counts
        motors = list(itertools.islice(itertools.cycle(counts), each + (place < rest)))
        _simulate(where, motors, SEEDS[part] + place, spacing, sizes)
        labels = read_labels(str(where / "train_labels.csv"))
        groups.append(
            Archive(with_labelled_spacing(make_manifest(str(where / "train"), ArchiveSettings()), labels), labels)
        )
    tables = [pd.concat(rows, ignore_index=True) for rows in zip(*map(_tables, groups), strict=True)]
    return Archive(pa.concat_tables([one.manifest for one in groups]).sort_by("tomo_id"), Labels(*tables))


def spacings_of(sizes: Sizes, part: Part) -> tuple[float, ...]:
    """The voxel spacings of a part, for about as many tomograms each."""
    return sizes.seen_spacings + (sizes.unseen_spacings if part == "test" else ())


def archive_name(sizes: Sizes, part: Part) -> str:
    """The folder of a part: the same for sizes that make it of the same tomograms."""
    made = [getattr(sizes, name) for name in MADE_WITH]
    return f"{part}-{short_hash([part, made, sizes.parts[part], spacings_of(sizes, part)])}"


def short_hash(value: Any) -> str:
    """A short name for what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _tables(one: Archive) -> tuple[pd.DataFrame, pd.DataFrame]:
    return one.labels.tomograms, one.labels.motors


def _simulate(where: Path, motor_counts: list[int], seed: int, spacing: float, sizes: Sizes) -> None:
    """Simulate beside `where`, then rename: what is there is whole."""
    if where.exists():
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".simulating-", dir=where.parent) as fresh:
        simulate_archive(
            fresh,
            len(motor_counts),
            seed,
            sizes.shape,
            voxel_spacing_angstrom=spacing,
            motor_counts=motor_counts,
            settings=SimulationSettings(signal_to_noise=sizes.signal_to_noise, clutter=sizes.clutter),
            processes=min(cores(), max(len(motor_counts) // TOMOGRAMS_PER_PROCESS, 1)),
        )
        whole = Path(fresh) / "whole"
        whole.mkdir()
        for name in ("train", "train_labels.csv"):
            shutil.move(Path(fresh) / name, whole / name)
        try:
            whole.rename(where)
        except OSError:  # another process, with another row, may have been faster; it made the same
            if not where.exists():
                raise
