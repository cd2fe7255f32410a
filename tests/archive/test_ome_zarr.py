import itertools
import json
import math
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from motor_ray.archive import ome_zarr
from motor_ray.archive.ome_zarr import OmeZarrTomogram, open_ome_zarr
from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import ArchiveSettings
from motor_ray.errors import OutageError, SliceCorruptError, SliceMissingError, StorageError, TomogramError
from motor_ray.sources import FilesSource

SHAPE = (6, 8, 10)
SETTINGS = ArchiveSettings()


def volume(dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)


def write(
    uri: str, data: np.ndarray, *, zarr_format: Any = 2, scale: float = 10.0, unit: str = "angstrom", **image: Any
) -> str:
    """`data` and its every second voxel as the two levels of an OME-Zarr group; `image` overwrites metadata."""
    group = zarr.open_group(uri, mode="w", zarr_format=zarr_format)
    datasets = []
    for level in range(2):
        part = data[..., :: 2**level, :: 2**level, :: 2**level]
        chunks = (*[1] * (data.ndim - 3), 2, 4, 5)
        group.create_array(str(level), data=part, chunks=chunks)
        factors = [1.0] * (data.ndim - 3) + [scale * 2**level] * 3
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": factors}]})
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] * (data.ndim - 3)
    axes += [{"name": name, "type": "space", "unit": unit} for name in "zyx"]
    metadata = {"axes": axes, "datasets": datasets, **image}
    group.attrs.update({"multiscales": [metadata]} if zarr_format == 2 else {"ome": {"multiscales": [metadata]}})
    return uri


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", ">i2", "float16", "float32"])
def test_every_slice_is_what_zarr_wrote(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    data = volume(dtype)
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), data, zarr_format=zarr_format), SETTINGS)
    assert reader.shape == SHAPE
    assert reader.voxel_spacing_angstrom == 10
    values = reader.read_slice(3)
    assert values.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(values, data[3])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_level_has_its_own_shape_spacing_and_slices(tmp_path: Path, zarr_format: int) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume(), zarr_format=zarr_format)
    reader = open_ome_zarr(uri, ArchiveSettings(zarr_level=1))
    assert (reader.shape, reader.voxel_spacing_angstrom, reader.coarseness) == ((3, 4, 5), 20, 2)
    np.testing.assert_array_equal(reader.read_slice(1), volume()[2, ::2, ::2])
    stated = ArchiveSettings(zarr_level=1, voxel_spacing_angstrom=13.1)
    assert open_ome_zarr(uri, stated).voxel_spacing_angstrom == pytest.approx(26.2)


def test_a_level_that_is_not_there_is_refused(tmp_path: Path) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume())
    with pytest.raises(TomogramError, match=r"no level 2; its levels are 0 to 1, choose one with --archive\."):
        open_ome_zarr(uri, ArchiveSettings(zarr_level=2))
    zarr.create_array(tmp_path / "bare.zarr", data=volume())
    with pytest.raises(TomogramError, match=r"is a single array and has no level 1; leave out --archive\.zarr-level"):
        open_ome_zarr(str(tmp_path / "bare.zarr"), ArchiveSettings(zarr_level=1))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([[10.0] * 3, [10.0, 20.0, 20.0]], r"level 1 are 1 x 2 x 2 times as long \(z, y, x\).*choose another"),
        ([[10.0] * 3, None], r"does not say how coarse its level 1 is; leave out --archive\.zarr-level"),
    ],
)
def test_a_level_of_which_the_voxels_are_not_known_is_refused(
    tmp_path: Path, scales: list[list[float] | None], message: str
) -> None:
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}] if scale else []}
        for level, scale in enumerate(scales)
    ]
    uri = write(str(tmp_path / "a.zarr"), volume(), datasets=datasets)
    with pytest.raises(TomogramError, match=message):
        open_ome_zarr(uri, ArchiveSettings(zarr_level=1, voxel_spacing_angstrom=10))


def test_a_group_that_is_on_no_disk_is_read_as_well(memory: str) -> None:
    uri = write(f"{memory}/a.zarr", volume())
    reader = open_tomogram(uri, "ome_zarr", SHAPE, SETTINGS)
    np.testing.assert_array_equal(reader.read_slice(5), volume()[5])


def test_slices_read_together_are_those_read_alone(tmp_path: Path) -> None:
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), volume()), SETTINGS)
    for values, z in zip(read_slices(reader, [4, 1, 2], threads=2), [4, 1, 2], strict=True):
        np.testing.assert_array_equal(np.asarray(values), reader.read_slice(z))


def test_a_damaged_chunk_spoils_only_its_own_slices(tmp_path: Path) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume())
    (tmp_path / "a.zarr" / "0" / "1.1.1").write_bytes(b"no codec wrote this")
    slices = read_slices(open_ome_zarr(uri, SETTINGS), range(6), threads=2)
    assert [type(values) for values in slices] == [np.ndarray] * 2 + [SliceCorruptError] * 2 + [np.ndarray] * 2
    assert f"{uri}: slice 2 cannot be read" in str(slices[2])


def test_a_damaged_part_of_a_shard_spoils_only_its_own_slices(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=volume(), chunks=(2, 4, 5), shards=(6, 8, 10))
    shard = tmp_path / "a.zarr" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(data[-12 * 16 - 4 : -4], "<u8").reshape(3, 2, 2, 2)  # of each chunk its place and length
    offset, length = index[1, 0, 0].tolist()
    data[offset : offset + length] = bytes(length)
    shard.write_bytes(data)
    slices = open_ome_zarr(str(tmp_path / "a.zarr"), SETTINGS).read_slices(range(6))
    assert [type(values) for values in slices] == [np.ndarray] * 2 + [SliceCorruptError] * 2 + [np.ndarray] * 2


def test_leading_axes_of_one_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), volume()[None]), SETTINGS)
    assert reader.shape == SHAPE
    assert reader.voxel_spacing_angstrom == 10
    np.testing.assert_array_equal(reader.read_slice(2), volume()[2])
    with pytest.raises(TomogramError, match=r"has the shape \(2, 6, 8, 10\), expected one volume \(z, y, x\)"):
        open_ome_zarr(write(str(tmp_path / "b.zarr"), np.stack([volume()] * 2)), SETTINGS)


@pytest.mark.parametrize(
    ("scale", "unit", "spacing"),
    [
        (1.31, "nanometer", 13.1),
        (1310, "picometer", 13.1),
        (1.31e-9, "meter", 13.1),
        (13.1, "Angstrom", 13.1),
        (13.1, "parsec", None),
        (0.0, "angstrom", None),
    ],
)
def test_the_spacing_is_in_angstrom_or_unknown(tmp_path: Path, scale: float, unit: str, spacing: float | None) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume(), scale=scale, unit=unit)
    assert open_ome_zarr(uri, SETTINGS).voxel_spacing_angstrom == (spacing and pytest.approx(spacing))
    assert open_ome_zarr(uri, ArchiveSettings(voxel_spacing_angstrom=7)).voxel_spacing_angstrom == 7


def test_the_scale_of_the_whole_image_counts_too(tmp_path: Path) -> None:
    overall = [{"type": "scale", "scale": [2.0, 2.0, 2.0]}]
    uri = write(str(tmp_path / "a.zarr"), volume(), coordinateTransformations=overall)
    assert open_ome_zarr(uri, SETTINGS).voxel_spacing_angstrom == 20


def test_a_bare_array_is_a_volume_of_unknown_spacing(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=volume())
    reader = open_ome_zarr(str(tmp_path / "a.zarr"), SETTINGS)
    assert reader.voxel_spacing_angstrom is None
    np.testing.assert_array_equal(reader.read_slice(0), volume()[0])


def test_a_slice_outside_the_volume_is_missing(tmp_path: Path) -> None:
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), volume()), SETTINGS)
    for z in (-1, 6):
        with pytest.raises(SliceMissingError, match=f"there is no slice {z}; the slices are 0 to 5"):
            reader.read_slice(z)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"axes": [{"name": name} for name in "xyz"]}, "its axes are x, y, z, expected them to end in z, y, x"),
        ({"datasets": [{"path": "7"}]}, "the array '7' that its metadata names is not there; copy it again"),
        ({"datasets": []}, "has no level 0; it has 0"),
        ({"datasets": ["0"]}, "cannot be opened as Zarr"),
        ({"datasets": {"path": "0"}}, "cannot be opened as Zarr"),
        ({"datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale"}]}]}, "cannot be opened as Zarr"),
        ({"axes": 3}, "cannot be opened as Zarr"),
        (
            {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 1.0, 1.0]}]},
            r"20 x 10 x 10 angstrom.*--archive\.voxel-spacing-angstrom",
        ),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, image: dict[str, Any], message: str) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume(), **image)
    with pytest.raises(TomogramError, match=message) as raised:
        open_ome_zarr(uri, SETTINGS)
    assert str(raised.value).startswith(f"{uri}: ")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TomogramError, match=r"nothing\.zarr: is not a Zarr group: it has no metadata"):
        open_ome_zarr(str(tmp_path / "nothing.zarr"), SETTINGS)
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    with pytest.raises(TomogramError, match="has no 'multiscales', expected an OME-Zarr image"):
        open_ome_zarr(str(tmp_path / "group.zarr"), SETTINGS)
    zarr.create_array(tmp_path / "complex.zarr", data=volume("complex64"))
    with pytest.raises(TomogramError, match="holds values of type complex64, expected integers or floats; convert it"):
        open_ome_zarr(str(tmp_path / "complex.zarr"), SETTINGS)
    zarr.create_array(tmp_path / "huge.zarr", shape=(4, 2**17, 2**17), chunks=(4, 64, 64), dtype="u1")
    with pytest.raises(TomogramError, match=r"claims to have the shape \(4, 131072, 131072\), expected edges of 1 to"):
        open_ome_zarr(str(tmp_path / "huge.zarr"), SETTINGS)
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("no JSON")
    with pytest.raises(TomogramError, match="cannot be opened as Zarr"):
        open_ome_zarr(str(tmp_path / "broken.zarr"), SETTINGS)


def test_a_codec_that_nobody_knows_is_told_when_opening(tmp_path: Path) -> None:
    uri = write(str(tmp_path / "a.zarr"), volume(), zarr_format=3)
    metadata = tmp_path / "a.zarr" / "0" / "zarr.json"
    described = json.loads(metadata.read_text())
    described["codecs"][-1] = {"name": "of my own", "configuration": {}}
    metadata.write_text(json.dumps(described))
    with pytest.raises(TomogramError, match=r"cannot be opened as Zarr \(.*of my own"):
        open_ome_zarr(uri, SETTINGS)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """Path, start and end of every read from memory:// since the test began."""
    calls = []
    kind = type(fsspec.filesystem("memory"))
    original = kind.cat_file

    def record(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> Any:
        calls.append((self._strip_protocol(path).split(".zarr/")[1], start, end))
        return original(self, path, start, end, **more)

    monkeypatch.setattr(kind, "cat_file", record)
    return calls


@pytest.mark.parametrize("block_bytes", [1, 400, 2**20])
@pytest.mark.parametrize("zs", [[5], [0, 2], [9, 3, 4, 3], range(10)])
def test_each_chunk_of_the_layers_that_are_wanted_is_fetched_once_and_no_other(
    memory: str, fetched: list[Any], zs: list[int], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).normal(size=(10, 9, 11)).astype("f4")
    zarr.create_array(f"{memory}/a.zarr", data=data, chunks=(4, 4, 5), zarr_format=2)
    reader = open_ome_zarr(f"{memory}/a.zarr", SETTINGS)
    monkeypatch.setattr(ome_zarr, "BLOCK_BYTES", block_bytes)
    fetched.clear()
    for z, values in zip(zs, read_slices(reader, zs, threads=8), strict=True):
        np.testing.assert_array_equal(np.asarray(values), data[z])
    keys = [f"{z}.{y}.{x}" for z, y, x in itertools.product({z // 4 for z in zs}, range(3), range(3))]
    assert Counter(key for key, _, _ in fetched) == Counter(keys)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    chunks=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    shards=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    block=st.integers(1, 2000),
    data=st.data(),
)
def test_any_slices_of_any_layout_are_what_zarr_wrote(
    shape: Any, chunks: Any, shards: Any, block: int, data: st.DataObject
) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, shape).astype("u2")
    whole = tuple(map(int.__mul__, chunks, shards)) if shards else None
    array = zarr.create_array(MemoryStore(), data=values, chunks=chunks, shards=whole)
    reader = OmeZarrTomogram("a.zarr", array)
    zs = data.draw(st.lists(st.integers(-1, shape[0]), max_size=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ome_zarr, "BLOCK_BYTES", block)
        for z, found in zip(zs, reader.read_slices(zs), strict=True):
            if 0 <= z < shape[0]:
                np.testing.assert_array_equal(np.asarray(found), values[z])
            else:
                assert isinstance(found, SliceMissingError)


@pytest.mark.parametrize(("chunks", "shards"), [((64, 64, 64), None), ((2, 512, 512), (64, 512, 512))])
def test_no_more_than_the_wanted_slices_and_one_chunk_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: Any, shards: Any
) -> None:
    shape, slices, chunk = (64, 512, 512), 4 * 512 * 512 * 4, math.prod(chunks) * 4
    array = zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=chunks, shards=shards, dtype="f4")
    array[:] = np.broadcast_to(np.arange(64, dtype="f4")[:, None, None], shape)
    reader = open_ome_zarr(str(tmp_path / "a.zarr"), SETTINGS)
    monkeypatch.setattr(ome_zarr, "BLOCK_BYTES", chunk)
    reader.read_slices([0])  # what is imported or started once is not counted
    tracemalloc.start()
    found = reader.read_slices([5, 20, 40, 60])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [np.unique(np.asarray(values)).tolist() for values in found] == [[5], [20], [40], [60]]
    assert peak < slices + 4 * chunk < math.prod(shape) * 4 / 4


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_that_are_not_there_hold_the_fill_value(tmp_path: Path, zarr_format: Any) -> None:
    for fill in (7, 0):
        path = tmp_path / f"{fill}.zarr"
        array = zarr.create_array(
            path, shape=SHAPE, chunks=(2, 4, 5), dtype="u1", fill_value=fill, zarr_format=zarr_format
        )
        array[2:4, :4, :5] = 99
        expected = np.full(SHAPE, fill)
        expected[2:4, :4, :5] = 99
        slices = open_ome_zarr(str(path), SETTINGS).read_slices(range(6))
        np.testing.assert_array_equal(np.stack([np.asarray(values) for values in slices]), expected)


def test_a_fill_value_of_null_is_read_as_zero(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, chunks=(2, 4, 5), dtype="f4", zarr_format=2)
    metadata = tmp_path / "a.zarr" / ".zarray"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fill_value": None}))
    assert not open_ome_zarr(str(tmp_path / "a.zarr"), SETTINGS).read_slice(3).any()


def test_the_depth_of_a_chunk_is_that_of_what_is_decoded_together_and_at_most_the_volumes(tmp_path: Path) -> None:
    for name, size, shards in (("deep", 64, None), ("shallow", 2, None), ("sharded", 2, (4, 8, 10))):
        zarr.create_array(tmp_path / f"{name}.zarr", data=volume(), chunks=(size, 4, 5), shards=shards)
    depths = [
        open_ome_zarr(str(tmp_path / f"{name}.zarr"), SETTINGS).chunk_depth for name in ("deep", "shallow", "sharded")
    ]
    assert depths == [6, 2, 2]


def test_of_a_shard_the_wanted_parts_are_fetched_once_and_all_in_one_piece(memory: str, fetched: list[Any]) -> None:
    data = np.random.default_rng(0).normal(size=(8, 16, 16)).astype("f4")
    zarr.create_array(f"{memory}/a.zarr", data=data, chunks=(4, 4, 4), shards=(8, 8, 8))
    reader = open_ome_zarr(f"{memory}/a.zarr", SETTINGS)
    for zs, requests in ([1, 2], 4 * (1 + 4)), (range(8), 4):  # an index and four chunks of each shard, or the shard
        fetched.clear()
        np.testing.assert_array_equal(np.stack([np.asarray(values) for values in reader.read_slices(zs)]), data[zs])
        assert len(fetched) == len(set(fetched)) == requests


def test_threads_that_read_at_once_each_get_their_own(memory: str) -> None:
    data = np.random.default_rng(0).normal(size=(40, 30, 30)).astype("f4")
    zarr.create_array(f"{memory}/a.zarr", data=data, chunks=(8, 8, 8))
    reader = open_ome_zarr(f"{memory}/a.zarr", SETTINGS)
    with ThreadPoolExecutor(8) as pool:
        slabs = [range(start, start + 5) for start in range(0, 36, 3)]
        for zs, slices in zip(slabs, pool.map(reader.read_slices, slabs), strict=True):
            np.testing.assert_array_equal(np.stack([np.asarray(values) for values in slices]), data[zs])


@pytest.mark.parametrize("error", [PermissionError, OutageError])
def test_a_storage_that_refuses_a_chunk_spoils_its_slices_and_one_that_is_out_ends_the_reading(
    memory: str, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    uri = write(f"{memory}/a.zarr", volume())
    reader = open_ome_zarr(uri, SETTINGS)
    original = FilesSource._fetch

    def refuse(self: Any, key: str, *span: Any) -> Any:
        if key.endswith("0/1.0.1"):
            raise error("not now")
        return original(self, key, *span)

    monkeypatch.setattr(FilesSource, "_fetch", refuse)
    if error is OutageError:
        with pytest.raises(OutageError, match="not now"):
            read_slices(reader, range(6), threads=2)
    else:
        slices = read_slices(reader, range(6), threads=2)
        assert [type(values) for values in slices] == [np.ndarray] * 2 + [StorageError] * 2 + [np.ndarray] * 2
        assert f"{uri}/0/1.0.1: cannot be read (not now)" in str(slices[3])


@pytest.mark.parametrize(("error", "kind"), [(OutageError, OutageError), (PermissionError, StorageError)])
def test_a_storage_that_fails_while_opening_says_nothing_about_the_group(
    memory: str, monkeypatch: pytest.MonkeyPatch, error: type[OSError], kind: type[OSError]
) -> None:
    uri = write(f"{memory}/a.zarr", volume())

    def fail(*_: Any) -> Any:
        raise error("not now")

    monkeypatch.setattr(FilesSource, "_fetch", fail)
    with pytest.raises(kind, match="not now") as raised:
        open_ome_zarr(uri, SETTINGS)
    assert type(raised.value) is kind
