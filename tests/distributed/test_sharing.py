from pathlib import Path

import pytest

from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config import ArchiveSettings
from motor_ray.distributed import sharing
from motor_ray.distributed.sharing import first_tomogram, require_shared
from motor_ray.errors import RunError


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """What two nodes are asked for, of which the second sees nothing of what lies below /tmp."""
    uris: list[list[str]] = []
    nodes = [
        {"NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}", "Resources": {kind: 2.0}}
        for number, kind in enumerate(("CPU", "GPU"), start=1)
    ]
    here = {"NodeID": "9", "NodeManagerAddress": "10.0.0.9", "Resources": {"CPU": 2.0}}
    head = {"NodeID": "0", "NodeManagerAddress": "10.0.0.8", "Resources": {"memory": 1e9}}

    def unseen_by(asked_nodes, asked_uris):
        assert asked_nodes == nodes
        uris.append(asked_uris)
        return [("10.0.0.2", asked_uris)] if asked_uris else []

    monkeypatch.setattr(sharing, "alive", lambda: [head, here, *nodes])
    monkeypatch.setattr(sharing, "here", lambda: "9")
    monkeypatch.setattr(sharing, "unseen_by", unseen_by)
    return uris


def test_object_storage_is_the_same_for_all(asked):
    require_shared(["s3://bucket/archive"], "s3://bucket/out")
    assert asked == [[]]


def test_a_local_path_that_a_node_does_not_see_is_refused_with_the_node(asked, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    with pytest.raises(RunError, match=rf"^{archive}: the node 10\.0\.0\.2 does not see .*object storage"):
        require_shared([f"{archive}", "s3://bucket/model"], "s3://bucket/out")
    assert asked == [[str(archive)]]


@pytest.mark.parametrize("format", ["jpeg", "mrc", "zarr"])
def test_what_is_asked_for_of_a_tomogram_is_there(format, tmp_path):
    simulate_archive(str(tmp_path), 1, 1, (8, 64, 64), format, processes=1)
    place = first_tomogram(make_manifest(str(tmp_path / "train"), ArchiveSettings()))
    assert (tmp_path / "train") in Path(place).parents
    assert Path(place).exists()


def test_nodes_are_not_asked_for_what_this_process_does_not_see_itself(asked, tmp_path):
    """That is another fault, which has a message of its own."""
    require_shared([str(tmp_path / "gone"), f"file://{tmp_path / 'gone'}"], "s3://bucket/out")
    assert asked == [[]]


def test_a_folder_for_results_is_tried_with_a_file_that_does_not_stay(asked, tmp_path):
    with pytest.raises(RunError, match=rf"^{tmp_path}: the node"):
        require_shared([], str(tmp_path))
    assert asked[0][0].startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_on_one_node_nobody_is_asked(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "alive", lambda: [{"NodeID": "9", "Resources": {"CPU": 2.0}}])
    require_shared([str(tmp_path)], str(tmp_path))
    assert asked == []
