from pathlib import Path
from typing import Any

import cv2
import fsspec
import mrcfile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from motor_ray.archive.manifest import (
    check_manifest,
    find_tomograms,
    make_manifest,
    read_manifest,
    read_unusable,
    write_manifest,
)
from motor_ray.archive.readers import open_tomogram
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, StorageError
from motor_ray.sources import BeyondEndError
from motor_ray.tables import FAILURES, MANIFEST

SETTINGS = ArchiveSettings()
PICTURE = cv2.imencode(".jpg", np.full((20, 30), 99, np.uint8))[1].tobytes()
ROW: dict[str, Any] = {
    "tomo_id": "tomo_003acc",
    "uri": "s3://bucket/train/tomo_003acc/slice_{z:04d}.jpg",
    "format": "jpeg_stack",
    "size_z": 500,
    "size_y": 1912,
    "size_x": 1847,
    "voxel_spacing_angstrom": None,
}


def write_stack(folder: Path, zs: range | list[int] = range(3), picture: bytes = PICTURE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for z in zs:
        (folder / f"slice_{z:04d}.jpg").write_bytes(picture)


def write_mrc(path: Path, spacing: float = 13.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((4, 5, 6), np.float32))
        file.voxel_size = spacing


def ids(table: pa.Table) -> list[str]:
    return list(table["tomo_id"].to_pylist())


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two stacks, a volume of each other kind, and things that are no tomograms."""
    root = tmp_path / "archive"
    write_stack(root / "train" / "tomo_b")
    write_stack(root / "train" / "tomo_a", [0, 4])
    write_mrc(root / "volumes" / "run.1" / "TS_1.rec")
    zarr.create_array(root / "volumes" / "TS_2.ome.zarr", data=np.zeros((2, 3, 4), np.uint8))
    (root / "train_labels.csv").write_text("row_id\n")
    (root / "train" / "tomo_b" / "._slice_0000.jpg").write_bytes(b"what a Mac leaves behind")
    (root / "empty").mkdir()
    return root


def test_every_tomogram_of_an_archive_is_found_whatever_its_format(archive: Path) -> None:
    table = make_manifest(str(archive), SETTINGS)
    assert table.schema == MANIFEST
    rows = {row.pop("tomo_id"): tuple(row.values()) for row in table.to_pylist()}
    assert rows == {
        "TS_1": (f"{archive}/volumes/run.1/TS_1.rec", "mrc", 4, 5, 6, 13.1, None),
        "TS_2": (f"{archive}/volumes/TS_2.ome.zarr", "ome_zarr", 2, 3, 4, None, 2),
        "tomo_a": (f"{archive}/train/tomo_a/slice_{{z:04d}}.jpg", "jpeg_stack", 5, 20, 30, None, None),
        "tomo_b": (f"{archive}/train/tomo_b/slice_{{z:04d}}.jpg", "jpeg_stack", 3, 20, 30, None, None),
    }


def test_every_row_can_be_opened(archive: Path) -> None:
    for row in make_manifest(str(archive), SETTINGS).to_pylist():
        shape = (row["size_z"], row["size_y"], row["size_x"])
        reader = open_tomogram(row["uri"], row["format"], shape, SETTINGS)
        assert reader.read_slice(0).shape == shape[1:]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("train", ["tomo_a", "tomo_b"]),
        ("train/tomo_b", ["tomo_b"]),
        ("train/tomo_b/", ["tomo_b"]),
        ("train/tomo_b/slice_0001.jpg", ["slice_0001"]),
        ("volumes/run.1/TS_1.rec", ["TS_1"]),
        ("volumes/TS_2.ome.zarr", ["TS_2"]),
    ],
)
def test_an_archive_may_be_a_folder_of_it_a_tomogram_or_a_file(archive: Path, place: str, expected: list[str]) -> None:
    assert ids(make_manifest(f"{archive}/{place}", SETTINGS)) == expected


def test_nothing_depends_on_a_local_disk(archive: Path, memory: str) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(archive), f"{memory}/archive", recursive=True)
    table = make_manifest(f"{memory}/archive", SETTINGS)
    local = make_manifest(str(archive), SETTINGS)
    assert table.drop_columns("uri") == local.drop_columns("uri")
    for row in table.to_pylist():
        assert row["uri"].startswith("memory://")
        shape = (row["size_z"], row["size_y"], row["size_x"])
        assert open_tomogram(row["uri"], row["format"], shape, SETTINGS).read_slice(0).shape == shape[1:]
    write_manifest(table, f"{memory}/manifest.parquet", FAILURES.empty_table())
    assert read_manifest(f"{memory}/manifest.parquet") == table


def test_a_stated_spacing_is_put_in_place_of_the_files(archive: Path) -> None:
    table = make_manifest(str(archive), ArchiveSettings(voxel_spacing_angstrom=15.6))
    assert table["voxel_spacing_angstrom"].to_pylist() == [15.6] * 4


def test_links_to_tomograms_are_followed(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "linked").symlink_to(archive / "train" / "tomo_a")
    (tmp_path / "links" / "linked.rec").symlink_to(archive / "volumes" / "run.1" / "TS_1.rec")
    with pytest.raises(ManifestError, match="two tomograms are called linked"):
        make_manifest(str(tmp_path / "links"), SETTINGS)


def test_a_link_that_leads_back_is_not_followed_in_circles(archive: Path) -> None:
    before = make_manifest(str(archive), ArchiveSettings())
    (archive / "back").symlink_to(archive)
    assert make_manifest(str(archive), ArchiveSettings()) == before


def test_braces_in_the_names_of_folders_are_kept(tmp_path: Path) -> None:
    write_stack(tmp_path / "{x}" / "tomo_{z}")
    row = make_manifest(str(tmp_path), SETTINGS).to_pylist()[0]
    assert row["tomo_id"] == "tomo_{z}"
    assert open_tomogram(row["uri"], row["format"], (3, 20, 30), SETTINGS).read_slice(2).shape == (20, 30)


def test_the_size_is_taken_from_another_slice_if_the_first_is_damaged(tmp_path: Path) -> None:
    write_stack(tmp_path / "tomo")
    (tmp_path / "tomo" / "slice_0000.jpg").write_bytes(b"")
    assert make_manifest(str(tmp_path), SETTINGS).select(["size_z", "size_y", "size_x"]).to_pylist() == [
        {"size_z": 3, "size_y": 20, "size_x": 30}
    ]


def test_empty_files_are_told_from_a_failing_storage_where_their_ranges_are_refused(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    original = type(files).cat_file

    def refuse(self: Any, path: str, start: int | None = None, end: int | None = None) -> Any:
        if start is not None and files.size(path) == 0:
            raise BeyondEndError("The requested range is not satisfiable")
        return original(self, path, start, end)

    monkeypatch.setattr(type(files), "cat_file", refuse)
    for name, data in (("a/0.jpg", b""), ("a/1.jpg", PICTURE), ("b.mrc", b""), ("c/0.jpg", b"")):
        files.pipe_file(f"{memory}/{name}", data)
    table, failures = find_tomograms(memory, SETTINGS)
    assert table.select(["tomo_id", "size_y", "size_x"]).to_pylist() == [{"tomo_id": "a", "size_y": 20, "size_x": 30}]
    assert ids(failures) == ["b", "c"]
    assert "holds 0 bytes, expected an MRC header" in failures["error"][0].as_py()
    assert "0.jpg: is empty; copy the file again" in failures["error"][1].as_py()


def test_two_tomograms_of_one_name_are_refused_naming_both(archive: Path) -> None:
    write_mrc(archive / "volumes" / "tomo_a.mrc")
    with pytest.raises(ManifestError, match=r"two tomograms are called tomo_a: \S+ and \S+; rename") as raised:
        make_manifest(str(archive), SETTINGS)
    assert f"{archive}/volumes/tomo_a.mrc" in str(raised.value)
    assert f"{archive}/train/tomo_a/slice_{{z:04d}}.jpg" in str(raised.value)


def test_a_place_without_tomograms_is_refused(archive: Path, memory: str) -> None:
    with pytest.raises(ManifestError, match=r"empty: holds no tomogram \(looked in 1 folder\); expected folders of"):
        make_manifest(str(archive / "empty"), SETTINGS)
    with pytest.raises(ManifestError, match=r"train_labels\.csv: is not a tomogram, expected a folder or a \.mrc"):
        make_manifest(str(archive / "train_labels.csv"), SETTINGS)
    for nowhere in (str(archive / "nowhere"), f"{memory}/nowhere"):
        with pytest.raises(ManifestError, match=r"nowhere: there is nothing here; check the path"):
            make_manifest(nowhere, SETTINGS)


def test_tomograms_that_cannot_be_used_are_failures_beside_the_others(archive: Path) -> None:
    (archive / "volumes" / "packed.mrc.gz").write_bytes(b"\x1f\x8b")
    write_stack(archive / "train" / "tomo_c", picture=b"junk")
    write_stack(archive / "train" / "tomo_d")
    (archive / "train" / "tomo_d" / "overview.png").write_bytes(PICTURE)
    table, failures = find_tomograms(str(archive), SETTINGS)
    assert ids(table) == ["TS_1", "TS_2", "tomo_a", "tomo_b"]
    assert failures.schema == FAILURES
    errors = dict(zip(ids(failures), failures["error"].to_pylist(), strict=True))
    assert list(errors) == ["packed", "tomo_c", "tomo_d"]
    assert "compressed with gzip" in errors["packed"]
    assert "slice_0002.jpg: is neither a JPEG nor a PNG" in errors["tomo_c"]
    assert "images of more than one kind" in errors["tomo_d"]
    with pytest.raises(ManifestError, match=r"gunzip it first, or move it out .* \(2 more cannot be used either\)"):
        make_manifest(str(archive), SETTINGS)


def test_a_manifest_comes_back_as_it_was_written(archive: Path, tmp_path: Path) -> None:
    (archive / "torn.mrc").write_bytes(bytes(100))
    table, unusable = find_tomograms(str(archive), SETTINGS)
    there = str(tmp_path / "new" / "manifest.parquet")
    write_manifest(table, there, unusable)
    assert (read_manifest(there), read_unusable(there)) == (table, unusable)
    assert len(unusable) == 1
    assert len(read_unusable(str(tmp_path / "other.parquet"))) == 0


def test_a_manifest_made_by_other_means_is_brought_into_our_types() -> None:
    table = pa.table(
        {
            "remark": ["mine"],
            "voxel_spacing_angstrom": pa.array([float("nan")], pa.float32()),
            "tomo_id": pa.array(["a"], pa.large_string()),
            "uri": pa.array(["a.mrc"]).dictionary_encode(),
            **{name: pa.array([7], pa.int64()) for name in ("size_z", "size_y", "size_x")},
            "format": ["mrc"],
        }
    )
    checked = check_manifest(table)
    assert checked.schema == MANIFEST
    assert checked.to_pylist() == [dict(zip(MANIFEST.names, ["a", "a.mrc", "mrc", 7, 7, 7, None, None], strict=True))]


def test_a_chunk_depth_may_be_left_out_or_empty_for_some_as_pandas_writes_it() -> None:
    rows = [ROW, {**ROW, "tomo_id": "b", "chunk_depth": 16}]
    assert check_manifest(pa.Table.from_pylist([ROW]))["chunk_depth"].to_pylist() == [None]
    for depths in (pa.array([None, 16]), pa.array([float("nan"), 16.0])):
        table = pa.Table.from_pylist(rows).append_column("chunk_depth", depths)
        checked = check_manifest(table)
        assert checked.schema == MANIFEST
        assert checked["chunk_depth"].to_pylist() == [None, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "has no rows; expected one per tomogram"),
        ([{"size_y": 0}], "tomo_003acc has 0 in size_y, expected more than 0"),
        ([{"size_z": -3}], "tomo_003acc has -3 in size_z"),
        ([{"voxel_spacing_angstrom": 0.0}], r"tomo_003acc has 0\.0 in voxel_spacing_angstrom"),
        ([{"chunk_depth": 0}], "tomo_003acc has 0 in chunk_depth, expected more than 0"),
        ([{"chunk_depth": 2.5}], "the column chunk_depth holds double, expected int32"),
        ([{"format": "tiff"}], "has 'tiff' in format, expected one of jpeg_stack, mrc, ome_zarr"),
        ([{}, {"uri": "other"}], "two tomograms are called tomo_003acc: s3://.* and other; rename"),
        ([{"tomo_id": ""}], "has no tomo_id; every tomogram needs a name"),
        ([{}, {"tomo_id": "b", "uri": None}], "the column uri is empty in row 2; every tomogram needs a value"),
        ([{"size_x": "wide"}], "the column size_x holds string, expected int32"),
        ([{"size_x": 2**40}], "the column size_x holds int64, expected int32"),
        ([{"tomo_id": 7}], "the column tomo_id holds int64, expected string"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: list[dict[str, Any]], message: str) -> None:
    rows = [{**ROW, **change} for change in changes]
    table = pa.Table.from_pylist(rows) if rows else MANIFEST.empty_table()
    with pytest.raises(ManifestError, match=f"^mine: .*{message}"):
        check_manifest(table, "mine")


def test_missing_columns_of_a_manifest_are_named() -> None:
    table = pa.Table.from_pylist([ROW]).drop_columns(["uri", "size_z"])
    with pytest.raises(ManifestError, match="lacks the columns uri, size_z; expected tomo_id, uri, format"):
        check_manifest(table)


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    with pytest.raises(StorageError, match=r"manifest\.parquet: cannot be read"):
        read_manifest(str(path))
    path.write_text("tomo_id,uri\n")
    with pytest.raises(ManifestError, match=r"is not a Parquet file .* make it with 'motor-ray manifest'"):
        read_manifest(str(path))
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ManifestError, match="lacks the columns"):
        read_manifest(str(path))
