"""Pre-training without labels: on this process, and on a real Ray with what training makes of it."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from motor_ray.archive.manifest import make_manifest
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import load_checkpoint
from motor_ray.detector.pretrained import read_tensors
from motor_ray.detector.reconstruction import build_reconstructor
from motor_ray.distributed.frames import frames_table
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.optimisation import prepared
from motor_ray.distributed.pretrain_loop import Pictures, Restorer, puzzles_at, with_neighbours_seen
from motor_ray.distributed.pretraining import even_slices, pretrain, pretrain_plans, some_pictures
from motor_ray.distributed.training import train
from motor_ray.errors import ConfigError, ManifestError, RunError, TomogramError
from motor_ray.storage import read_table
from motor_ray.tables import FAILURES

NONE = FAILURES.empty_table()


@pytest.fixture
def manifest(archive, settings):
    return make_manifest(archive.uri, settings.archive)


@pytest.fixture
def settings(settings):
    values = settings.model_dump()
    train = values["train"] | {"epochs": 3, "learning_rate": 2e-3, "batch_size": 4}
    return settings_from(values | {"train": train, "pretrain": {"slices_per_tomogram": 4, "mask_pixels": 16}})


class Loaded:
    """The frames of a plan, in memory."""

    def __init__(self, plan, settings):
        rows = [LoadSlab(with_neighbours_seen(settings)).load(row) for row in plan.to_pylist()]
        self.frames = {f"{row['slab_id']}/0": row["frames"][row["channels"], 0] for row in rows}
        assert len(frames_table(rows)) == len(plan)

    def frame(self, slice_id):
        return self.frames[slice_id]


def test_tomograms_that_validate_are_not_learned_from(manifest, settings):
    plans = pretrain_plans(manifest, settings)
    learned, held_out = (set(plans[part]["tomo_id"].to_pylist()) for part in ("train", "validation"))
    assert learned.isdisjoint(held_out)
    assert learned | held_out == set(manifest["tomo_id"].to_pylist())
    assert len(plans["train"]) == 4 * len(learned)


def test_slices_have_the_neighbours_that_they_are_asked_for(settings):
    assert even_slices(20, settings) == [1, 7, 12, 18]
    far = settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update={"neighbour": 4})})
    assert even_slices(20, far) == [4, 8, 11, 15]
    assert even_slices(1, settings) == [0]
    assert even_slices(3, settings) == [1]


def test_a_single_tomogram_cannot_validate_itself(manifest, settings):
    with pytest.raises(ManifestError, match="needs two tomograms or more, one of them to validate with; got 1"):
        pretrain_plans(manifest.slice(0, 1), settings)


def test_pictures_lie_between_their_neighbours(manifest, settings):
    plan = pretrain_plans(manifest, settings)["train"].slice(0, 4)
    three = LoadSlab(with_neighbours_seen(settings))
    one = LoadSlab(settings)
    for row in plan.to_pylist():
        [z] = row["zs"]
        alone = one.load(row | {"zs": [z - 1, z, z + 1]})["frames"][:, 0]
        row = three.load(row)
        assert np.array_equal(row["frames"][row["channels"], 0], alone)
    assert len(some_pictures(plan, settings)) == 4


def test_the_loss_falls_below_that_of_mean_grey(manifest, settings):
    plan = pretrain_plans(manifest, settings)["train"].slice(0, 8)
    pictures = Pictures(plan, settings, Loaded(plan, settings))
    torch.manual_seed(0)
    learner = Restorer(prepared(build_reconstructor(settings.model), settings.train), settings, torch.device("cpu"))
    before = np.mean(learner.judge(pictures, range(8)))
    for step in range(40):
        learner.step([puzzles_at(pictures, settings, step, [*range(8)])], progress=step / 40)
    after = np.mean(learner.judge(pictures, range(8)))
    assert after < 0.97 < 1 < before


def test_a_puzzle_is_the_same_in_the_same_epoch_and_another_in_the_next(manifest, settings):
    plan = pretrain_plans(manifest, settings)["validation"]
    pictures = Pictures(plan, settings, Loaded(plan, settings))
    first, again, next_one = (puzzles_at(pictures, settings, epoch, [0, 1]) for epoch in (1, 1, 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first[:4], again[:4], strict=True))
    assert not torch.equal(first.images, next_one.images)


def test_settings_that_would_be_passed_over_are_refused(manifest, settings, tmp_path):
    asked = settings.model_copy(update={"train": settings.train.model_copy(update={"start_from": "runs/a/best"})})
    with pytest.raises(ConfigError, match=r"--train\.start-from takes a whole detector"):
        pretrain(manifest, NONE, asked, str(tmp_path), "run", workers=(1, 1), resume=False)


@pytest.mark.parametrize(
    ("groups", "error", "complaint"),
    [
        ({"model": {"in_slices": 3}, "pretrain": {"mask_share": 0}}, ConfigError, "mask_share 0 hides nothing"),
        ({"frame": {"mode": "spacing"}}, TomogramError, "spacing"),
    ],
)
def test_what_nothing_could_be_learned_with_is_refused_before_the_name_is_taken(
    manifest, settings, tmp_path, groups, error, complaint
):
    asked = settings_from(settings.model_dump() | {group: dict(own) for group, own in groups.items()})
    column = manifest.schema.get_field_index("voxel_spacing_angstrom")
    unknown = manifest.set_column(column, manifest.field(column), pa.nulls(len(manifest), pa.float64()))
    with pytest.raises(error, match=complaint):
        pretrain(unknown, NONE, asked, str(tmp_path), "run", workers=(1, 1), resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_backbone_is_taught_without_labels_and_a_detector_trained_from_it(
    manifest, archive, settings, tmp_path, workers
):
    run = pretrain(manifest, NONE, settings, str(tmp_path), "pre", workers=(workers, workers), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "pre" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[-1]["loss_total"] < lines[0]["loss_total"]
    assert run["best"]["validation_loss"] == min(line["validation_loss"] for line in lines) < 1
    assert len(read_table(str(tmp_path / "pre" / "failures.parquet"))) == run["unread"] == 0
    assert (tmp_path / "pre" / "reconstruction.png").stat().st_size > 10_000
    with pytest.raises(RunError, match="a run of this name is there"):
        pretrain(manifest, NONE, settings, str(tmp_path), "pre", workers=(1, 1), resume=False)
    assert pretrain(manifest, NONE, settings, str(tmp_path), "pre", workers=(1, 1), resume=True) == run
    other = settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update={"mask_share": 0.5})})
    with pytest.raises(RunError, match=r"pretrain\.mask_share was 0\.3, is 0\.5"):
        pretrain(manifest, NONE, other, str(tmp_path), "pre", workers=(1, 1), resume=True)
    model = settings.model.model_copy(update={"pretrained": run["backbone"]})
    trained = settings.model_copy(update={"model": model})
    train(manifest, archive.labels, trained, str(tmp_path), "from-it", workers=(1, 1), resume=False)
    start, taught = load_checkpoint(tmp_path / "from-it" / "start"), read_tensors(run["backbone"])
    assert all(torch.equal(tensor, taught[name]) for name, tensor in start.backbone.state_dict().items())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_slices_that_cannot_be_read_are_listed(damaged, settings, tmp_path):
    manifest = make_manifest(damaged, settings.archive)
    every = settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update={"slices_per_tomogram": 18})})
    run = pretrain(manifest, NONE, every, str(tmp_path), "pre", workers=(1, 1), resume=False)
    failures = read_table(str(tmp_path / "pre" / "failures.parquet"))
    assert isinstance(failures, pa.Table)
    assert sorted(failures["z"].to_pylist()) == [3, 4]
    assert run["unread"] == 2
