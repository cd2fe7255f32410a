"""One checkpoint from several, on a real archive; what is averaged how is tested without."""

import pytest
import torch

from motor_ray.archive.manifest import make_manifest
from motor_ray.config import ArchiveSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import load_checkpoint, save_checkpoint
from motor_ray.detector.description import describe_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.distributed.soup import make_soup, sample_frames
from motor_ray.errors import CheckpointError, RunError

HERE = ArchiveSettings()


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """A run's folder with two snapshots."""
    folder = tmp_path_factory.mktemp("run")
    for cycle in (1, 2):
        torch.manual_seed(cycle)
        save_checkpoint(folder / "snapshots" / f"cycle_0{cycle}", build_model(settings.model), settings, {"map": cycle})
    return folder


def test_a_soup_is_a_checkpoint_of_mean_weights_that_names_its_members(run, settings, tmp_path):
    said = make_soup(f"{run}/snapshots", str(tmp_path / "soup"), None, HERE)
    made = describe_checkpoint(tmp_path / "soup")
    assert made.settings == settings
    assert made.sha256 == said["sha256"]
    assert [one["model"] for one in made.metrics["soup"]] == [f"{run}/snapshots/cycle_0{cycle}" for cycle in (1, 2)]
    assert made.metrics["batch_statistics"] == "averaged"
    mixed, *members = (
        load_checkpoint(uri).state_dict()
        for uri in (tmp_path / "soup", *(run / "snapshots" / f"cycle_0{cycle}" for cycle in (1, 2)))
    )
    for name, tensor in mixed.items():
        expected = (members[0][name] + members[1][name]) / 2 if tensor.is_floating_point() else members[0][name]
        torch.testing.assert_close(tensor, expected)


def test_with_an_archive_only_the_batch_statistics_differ(run, archive, tmp_path):
    manifest = make_manifest(archive.uri, HERE)
    for name, given in {"averaged": None, "taken": manifest}.items():
        make_soup(f"{run}/snapshots", str(tmp_path / name), given, HERE)
    averaged, taken = (load_checkpoint(tmp_path / name).state_dict() for name in ("averaged", "taken"))
    differing = {name for name in taken if not torch.equal(averaged[name], taken[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert differing == {name for name in taken if name.endswith(statistics)}
    assert describe_checkpoint(tmp_path / "taken").metrics["batch_statistics"] == "of 48 images"


def test_images_are_taken_of_many_tomograms(archive, damaged, settings):
    frames = sample_frames(make_manifest(archive.uri, HERE), settings)
    assert frames.shape == (192, 1, 96, 96)  # 4 of each of 48 slabs
    assert len({frame.tobytes() for frame in frames}) == len(frames)
    assert len(sample_frames(make_manifest(damaged, HERE), settings)) == 47  # of 12 slabs, but for what is missing


def test_networks_that_differ_have_no_mean(run, settings, tmp_path):
    other = settings_from(settings.model_dump() | {"model": settings.model.model_dump() | {"neck_channels": 16}})
    save_checkpoint(tmp_path / "other", build_model(other.model), other, {})
    with pytest.raises(CheckpointError, match=r"other: .*model\.neck_channels 16, but .* with 8; weights are averaged"):
        make_soup([f"{run}/snapshots/cycle_01", str(tmp_path / "other")], str(tmp_path / "soup"), None, HERE)
    with pytest.raises(CheckpointError, match="alone is its own average"):
        make_soup(str(tmp_path / "other"), str(tmp_path / "soup"), None, HERE)
    assert not (tmp_path / "soup").exists()


def test_a_checkpoint_is_not_written_over(run):
    last = run / "snapshots" / "cycle_02"
    before = describe_checkpoint(last)
    with pytest.raises(RunError, match="cycle_02: holds a checkpoint already, and nothing is overwritten"):
        make_soup(f"{run}/snapshots", str(last), None, HERE)
    assert describe_checkpoint(last) == before
