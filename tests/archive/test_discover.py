import itertools
import shutil
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import mrcfile
import numpy as np
import pyarrow as pa
import pytest
import s3fs
import zarr

from motor_ray.archive import candidates, discover, listing
from motor_ray.archive.manifest import find_tomograms, make_manifest
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, OutageError

SETTINGS = ArchiveSettings()
SPACING = "Reconstructions/VoxelSpacing13.480"
TOMOGRAM = f"{SPACING}/Tomograms/100"
PICTURE = cv2.imencode(".png", np.full((20, 30), 99, np.uint8))[1].tobytes()


def write_mrc(path: Path, spacing: float = 13.48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((4, 5, 6), np.float32))
        file.voxel_size = spacing


def write_zarr(path: Path, spacing: float = 13.48) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    datasets: Any = []
    for level in range(2):
        group.create_array(
            str(level), data=np.zeros([size >> level for size in (4, 6, 8)], np.float32), chunks=(2, 2, 2)
        )
        steps = [{"type": "scale", "scale": [spacing * 2**level] * 3}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    axes: Any = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)


def ids(table: pa.Table) -> list[str]:
    return list(table["tomo_id"].to_pylist())


def found(archive: Path | str, **settings: Any) -> dict[str, str]:
    """Where each tomogram lies, none of them a failure."""
    table = make_manifest(str(archive), ArchiveSettings(**settings))
    return dict(zip(ids(table), table["uri"].to_pylist(), strict=True))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run TS_1 of the portal's dataset 10001, with all that may lie beside a tomogram."""
    run = tmp_path / "portal" / "10001" / "TS_1"
    for place in (
        f"{TOMOGRAM}/TS_1",
        f"{SPACING}/Annotations/101/membrane-1.0_segmentationmask",
        "TiltSeries/100/TS_1",
    ):
        write_mrc(run / f"{place}.mrc")
        write_zarr(run / f"{place}.zarr")
    write_mrc(run / "Frames" / "TS_1_000.mrc")
    write_mrc(run / "Gains" / "gain.mrc")
    for place in ("../Images/snapshot", f"{SPACING}/Images/100/key-photo-original", f"{SPACING}/KeyPhotos/thumbnail"):
        write_picture(run / f"{place}.png")
    (run.parent / "dataset_metadata.json").write_text("{}")
    (run / TOMOGRAM / "tomogram_metadata.json").write_text("{}")
    return run


@pytest.mark.parametrize("place", ["../..", "..", ".", "Reconstructions", SPACING, f"{SPACING}/Tomograms", TOMOGRAM])
def test_of_the_portal_only_tomograms_are_listed_wherever_one_begins(run: Path, place: str) -> None:
    assert found((run / place).resolve()) == {"TS_1": str(run / TOMOGRAM / "TS_1.mrc")}


def test_a_run_without_tomograms_says_what_was_passed_over(run: Path) -> None:
    shutil.rmtree(run / "Reconstructions")
    with pytest.raises(ManifestError, match="looked in 1 folder, passed over 3 of the CryoET Data Portal's"):
        make_manifest(str(run), SETTINGS)


def test_folders_named_like_the_portals_hold_tomograms_where_the_portals_layout_does_not_show(tmp_path: Path) -> None:
    for name in ("Images", "Frames"):
        write_picture(tmp_path / name / "slice_0000.png")
    assert list(found(tmp_path)) == ["Frames", "Images"]


def test_of_an_mrc_and_an_ome_zarr_of_one_name_the_mrc_is_taken_unless_a_coarser_level_is_asked_for(
    tmp_path: Path,
) -> None:
    write_mrc(tmp_path / "a.rec")
    write_zarr(tmp_path / "a.zarr")
    write_mrc(tmp_path / "b.mrc")
    write_zarr(tmp_path / "c.ome.zarr")
    (tmp_path / "c.mrc.gz").write_bytes(b"\x1f\x8b")
    assert [Path(uri).name for uri in found(tmp_path).values()] == ["a.rec", "b.mrc", "c.ome.zarr"]
    table = make_manifest(str(tmp_path), ArchiveSettings(zarr_level=1))
    assert [Path(uri).name for uri in table["uri"].to_pylist()] == ["a.zarr", "b.mrc", "c.ome.zarr"]
    assert table.select(["size_z", "voxel_spacing_angstrom", "chunk_depth"]).to_pylist() == [
        {"size_z": 2, "voxel_spacing_angstrom": 26.96, "chunk_depth": 2},
        {"size_z": 4, "voxel_spacing_angstrom": 13.48, "chunk_depth": None},
        {"size_z": 2, "voxel_spacing_angstrom": 26.96, "chunk_depth": 2},
    ]


def test_two_files_of_one_kind_and_name_are_still_refused(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc")
    write_mrc(tmp_path / "a.rec")
    with pytest.raises(ManifestError, match="two tomograms are called a"):
        make_manifest(str(tmp_path), SETTINGS)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (1.0, 13.48),  # 1 stands for unknown
        (13.4812, 13.4812),  # the same, with more digits
        (10.0, 13.48),
        (26.96, 13.48),
    ],
)
def test_the_spacing_of_the_portals_folder_counts_where_the_file_says_another_or_none(
    tmp_path: Path, stated: float, expected: float
) -> None:
    write_mrc(tmp_path / TOMOGRAM / "a.mrc", stated)
    write_zarr(tmp_path / TOMOGRAM / "b.zarr", stated)
    expected_zarr = 13.48 if stated == 1 else expected
    spacings = make_manifest(str(tmp_path), SETTINGS)["voxel_spacing_angstrom"].to_pylist()
    assert spacings == [pytest.approx(expected), pytest.approx(expected_zarr)]
    coarse = make_manifest(str(tmp_path), ArchiveSettings(zarr_level=1))["voxel_spacing_angstrom"].to_pylist()
    assert coarse == [pytest.approx(expected), pytest.approx(2 * expected_zarr)]
    named = make_manifest(str(tmp_path), ArchiveSettings(voxel_spacing_angstrom=7))[
        "voxel_spacing_angstrom"
    ].to_pylist()
    assert named == [7, 7]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["1/A/13.480/100", "2/A/13.480/100"], ["1-A", "2-A"]),
        (["1/A/13.480/100", "1/A/13.480/101"], ["A-100", "A-101"]),
        (["1/A/13.480/100", "1/A/7.840/100"], ["A-13.480", "A-7.840"]),
        (["1/A/13.480/100", "1/A/7.840/101", "2/A/13.480/100"], ["1-A-13.480-100", "1-A-7.840-101", "2-A-13.480-100"]),
        (["1/A/13.480/100", "1/B/13.480/100"], ["A", "B"]),
    ],
)
def test_tomograms_of_one_name_are_told_apart_by_what_differs_and_others_keep_theirs(
    tmp_path: Path, places: list[str], expected: list[str]
) -> None:
    for place in [*places, "1/Z/13.480/100"]:
        dataset, run, spacing, number = place.split("/")
        write_mrc(
            tmp_path / dataset / run / f"Reconstructions/VoxelSpacing{spacing}/Tomograms/{number}/{run}.mrc",
            float(spacing),
        )
    assert list(found(tmp_path)) == [*expected, "Z"]


def test_files_that_every_run_calls_alike_are_named_after_the_run_even_if_one_is_damaged(tmp_path: Path) -> None:
    for run in "AB":
        write_mrc(tmp_path / "1" / run / TOMOGRAM / "tomogram.mrc")
    (tmp_path / "1" / "C" / TOMOGRAM).mkdir(parents=True)
    (tmp_path / "1" / "C" / TOMOGRAM / "tomogram.mrc").write_bytes(b"")
    table, failures = find_tomograms(str(tmp_path), SETTINGS)
    assert (ids(table), ids(failures)) == (["A-tomogram", "B-tomogram"], ["C-tomogram"])


def test_tomograms_that_no_part_of_the_layout_tells_apart_are_refused(tmp_path: Path) -> None:
    for mirror in ("here", "there"):
        write_mrc(tmp_path / mirror / "1" / "A" / TOMOGRAM / "A.mrc")
    with pytest.raises(ManifestError, match=r"two tomograms are called A: \S+ and \S+; rename or leave out one"):
        make_manifest(str(tmp_path), SETTINGS)


def test_links_lead_outside_or_to_what_is_hidden_but_to_nothing_twice(tmp_path: Path) -> None:
    archive, outside = tmp_path / "archive", tmp_path / "outside"
    for place in ("tomo_a", ".store/tomo_b", "../outside/tomo_c"):
        write_picture(archive / place / "slice_0000.png")
    for link, target in {
        "again": archive / "tomo_a",
        "b": archive / ".store" / "tomo_b",
        "out": outside,
        "out_again": outside / "tomo_c",
        "up": tmp_path,
    }.items():
        (archive / link).symlink_to(target)
    (outside / "round").symlink_to(outside)
    assert list(found(archive)) == ["b", "tomo_a", "tomo_c"]


def test_an_archive_of_links_is_named_after_the_links(tmp_path: Path) -> None:
    for number in range(40):
        write_picture(tmp_path / "store" / str(number) / "slice_0000.png")
        (tmp_path / "archive").mkdir(exist_ok=True)
        (tmp_path / "archive" / f"tomo_{number:02d}").symlink_to(tmp_path / "store" / str(number))
    assert list(found(tmp_path / "archive")) == [f"tomo_{number:02d}" for number in range(40)]


def test_all_is_found_however_few_threads_and_however_small_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        write_mrc(tmp_path / f"{number % 2}" / f"{number}.mrc")
    monkeypatch.setattr(discover, "THREADS", 2)
    monkeypatch.setattr(discover, "PIECE", 3)
    assert list(found(tmp_path)) == [str(number) for number in range(7)]


def test_a_storage_that_is_out_is_no_fault_of_a_tomogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OutageError("not now")

    write_mrc(tmp_path / "a.mrc")
    monkeypatch.setattr(candidates, "read_header", fail)
    with pytest.raises(OutageError, match="not now"):
        find_tomograms(str(tmp_path), SETTINGS)


class ManyObjects(s3fs.S3FileSystem):  # type: ignore[misc]
    """A bucket of which only the listing exists: a million objects in one folder, each made when it is asked for."""

    cachable = False

    async def _info(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"name": path, "type": "directory"}

    async def _iterdir(self, bucket: str, prefix: str = "", **_: Any) -> AsyncIterator[dict[str, Any]]:
        assert (bucket, prefix) == ("bucket", "flat/")
        for number in range(1_000_000):
            yield {"name": f"bucket/flat/slice_{number:07d}.jpg", "type": "file"}

    async def _lsdir(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the folder was listed whole")


def test_of_a_million_slices_in_one_folder_a_page_is_held_and_as_many_names_as_a_tomogram_has_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = ManyObjects(anon=True)
    monkeypatch.setattr(discover, "filesystem", lambda *_: (files, "bucket/flat"))
    tracemalloc.start()
    with pytest.raises(ManifestError, match=r"flat: holds more than 65536 images.*give each tomogram a folder"):
        make_manifest("s3://bucket/flat", SETTINGS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20  # a list of a million such entries takes 300 MiB


def test_a_page_of_s3_is_asked_for_when_the_one_before_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ManyObjects(anon=True)
    made = itertools.count()
    original = files._iterdir

    async def counted(*args: Any, **named: Any) -> AsyncIterator[dict[str, Any]]:
        async for entry in original(*args, **named):
            next(made)
            yield entry

    monkeypatch.setattr(files, "_iterdir", counted)
    entries = listing.entries(files, "bucket/flat")
    assert [entry.name for entry in itertools.islice(entries, 1500)] == [
        f"slice_{number:07d}.jpg" for number in range(1500)
    ]
    assert next(made) == 2 * listing.PAGE


def test_an_object_that_stands_for_the_folder_is_not_in_it(memory: str) -> None:
    files = fsspec.filesystem("memory")
    files.makedirs(f"{memory}/a/b")
    files.pipe_file(f"{memory}/a/c", b"")
    listed = [{"name": "/bucket/a/", "type": "file"}, *files.ls("/bucket/a", detail=True)]
    assert sorted(listing._described(listed, "/bucket/a")) == [
        listing.Entry("/bucket/a/b", "b", is_folder=True),
        listing.Entry("/bucket/a/c", "c", is_folder=False),
    ]
