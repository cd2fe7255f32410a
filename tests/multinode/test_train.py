"""Training that loses a node and is given another, of data and runs that are in a bucket."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from motor_ray.archive.simulate import simulate_archive
from motor_ray.config_values import settings_from
from motor_ray.storage import filesystem, join, list_names, read_json, write_bytes
from tests.distributed.conftest import COUNTS, SHAPE, SMALL
from tests.distributed.killers import SCORER, TRAINER, until
from tests.distributed.trainings import SLOT, Labelled, goes_through_all_samples

pytestmark = [pytest.mark.ray, pytest.mark.multinode, pytest.mark.timeout(900)]

EPOCHS = 60
"""So many that Ray, which looks for room once a minute, finds the node that comes."""

READERS = {"num_cpus": 5, "memory": 4 * 10**9}
"""Has no slot for a worker, but room for reading and for the look at whole tomograms."""


@pytest.fixture
def labelled(s3, tmp_path: Path) -> Labelled:
    folder = s3.folder()
    simulate_archive(
        str(tmp_path), len(COUNTS), 1, SHAPE, voxel_spacing_angstrom=24.0, motor_counts=COUNTS, processes=1
    )
    files, path = filesystem(join(folder, "archive"))
    files.put(f"{tmp_path / 'train'}/", f"{path}/", recursive=True)
    write_bytes(join(folder, "labels.csv"), (tmp_path / "train_labels.csv").read_bytes())
    train = {"epochs": EPOCHS, "patience": EPOCHS, "checkpoint_steps": 1000, "tensorboard": False, "tomograms": "end"}
    settings = settings_from(SMALL.model_dump() | {"train": SMALL.train.model_dump() | train})
    (tmp_path / "settings.yaml").write_text(settings.model_dump_json())
    archive, labels, runs = (join(folder, name) for name in ("archive", "labels.csv", "runs"))
    return Labelled(archive, labels, runs, tmp_path / "settings.yaml")


@pytest.fixture
def slots(head) -> Iterator[list[str]]:
    """A node that reads, and three with room for a worker each."""
    head.add("readers", READERS)
    names = ["slot1", "slot2", "slot3"]
    for name in names:
        head.add(name, SLOT)
    yield names
    head.lose_all()


def test_workers_become_fewer_and_more_as_nodes_go_and_come_and_whole_tomograms_are_looked_at(head, slots, labelled):
    flags = ["--workers", "1:3", "--train.worker-resources", "slot", "1", "--train.max-failures", "2"]
    with (
        head.watched(TRAINER, SCORER) as seen,
        labelled.started("elastic", *flags, RAY_ADDRESS=head.address) as training,
    ):
        until("it had validated", training.has_validated(1), training.over)
        assert all(head.at_work(name, TRAINER) for name in slots)
        head.lose("slot2")
        until("fewer went on", lambda: training.lines()[-1]["workers"] < 3, training.over)
        head.add("late", SLOT)
        assert training.ends_well()["epochs"] == EPOCHS
    workers = [line["workers"] for line in training.lines()]
    assert workers[0] == 3
    assert workers[-1] == 3
    assert 2 in workers
    assert "late" in seen[TRAINER]
    goes_through_all_samples(training, EPOCHS, workers=3)
    assert seen[SCORER]
    assert read_json(join(training.folder, "run.json"))["validation"]["tomograms"]["n_tomograms"] == 1
    assert "motors.parquet" in list_names(join(training.folder, "validation", "best"))
