"""A small archive and a small detector, made once: what the pipeline's tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from motor_ray.archive.labels import Labels
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.distributed.cluster import connected

COUNTS = [1, 0, 2, 1, 0, 1, 1, 0, 1, 1, 1, 2]
SHAPE = (20, 96, 96)

SMALL = settings_from(
    {
        "frame": {"size": 96},
        "targets": {"box_pixels": 32},
        "model": {"backbone": "resnet18", "pretrained": "none", "neck_channels": 8, "head_channels": 8},
        "train": {"epochs": 2, "batch_size": 4, "slices_per_motor": 3, "tomograms": "no"},
        "detect": {"score_threshold": 0.01, "slab_slices": 6, "exhaustive": True},
    }
)


class Archive(NamedTuple):
    uri: str
    labels_csv: str
    labels: Labels


@pytest.fixture(scope="session")
def settings() -> RunSettings:
    return SMALL


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder = tmp_path_factory.mktemp("archive")
    labels = simulate_archive(
        str(folder), len(COUNTS), 1, SHAPE, voxel_spacing_angstrom=24.0, motor_counts=COUNTS, processes=1
    )
    return Archive(str(folder / "train"), str(folder / "train_labels.csv"), labels)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained detector: what it finds is arbitrary, but the same for the same frame."""
    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("model") / "best")
    save_checkpoint(uri, build_model(SMALL.model), SMALL, {})
    return uri


@pytest.fixture
def damaged(archive: Archive, tmp_path: Path) -> str:
    """A copy of three tomograms in which slice 3 of the first is missing and slice 4 is cut short."""
    for tomogram in sorted(Path(archive.uri).iterdir())[:3]:
        copy = tmp_path / "damaged" / tomogram.name
        copy.mkdir(parents=True)
        for path in tomogram.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    first = sorted((tmp_path / "damaged").iterdir())[0]
    (first / "slice_0003.jpg").unlink()
    (first / "slice_0004.jpg").write_bytes((first / "slice_0004.jpg").read_bytes()[:500])
    return str(tmp_path / "damaged")


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """A local Ray for all tests that need one."""
    with connected():
        yield
