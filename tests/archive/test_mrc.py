import contextlib
import gzip
import struct
from pathlib import Path
from typing import Any

import fsspec
import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.archive.mrc import open_mrc, parse_header
from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import ArchiveSettings
from motor_ray.errors import SliceCorruptError, SliceMissingError, StorageError, TomogramError
from motor_ray.sources import LocalSource

SHAPE = (5, 7, 6)
SIGNED = ArchiveSettings(mrc_mode_0="int8")
STORED = ["int8", "int16", "float32", "uint16", "float16"]


def volume(dtype: str = "int16", shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 40, shape).clip(0 if dtype[0] == "u" else -127, 127).astype(dtype)


def write(path: Path, data: np.ndarray, **header: Any) -> str:
    """`data` as an MRC file; `header` overwrites fields of its header."""
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(data)
        for name, value in header.items():
            setattr(file.header, name, value)
    return str(path)


def swap_bytes(path: Path, itemsize: int) -> None:
    """Turn a little-endian file without extended header into the big-endian one."""
    data = path.read_bytes()
    words = np.frombuffer(data[:1024], "<u4").astype(">u4").tobytes()
    texts = {104: 8, 208: 4, 224: 800}  # extra type and version, 'MAP ', labels: not numbers
    header = bytearray(words)
    for start, length in texts.items():
        header[start : start + length] = data[start : start + length]
    header[212:216] = b"\x11\x11\0\0"
    path.write_bytes(bytes(header) + np.frombuffer(data[1024:], f"<u{itemsize}").astype(f">u{itemsize}").tobytes())


@pytest.mark.parametrize("dtype", STORED)
def test_every_slice_is_what_mrcfile_wrote(tmp_path: Path, dtype: str) -> None:
    data = volume(dtype)
    reader = open_mrc(write(tmp_path / "a.mrc", data), SIGNED)
    assert reader.shape == SHAPE
    for z in range(SHAPE[0]):
        values = reader.read_slice(z)
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, data[z])


@pytest.mark.parametrize("dtype", STORED)
def test_a_big_endian_file_gives_the_same_values_in_native_order(tmp_path: Path, dtype: str) -> None:
    data = volume(dtype)
    uri = write(tmp_path / "a.mrc", data, cella=(60, 70, 50))
    swap_bytes(tmp_path / "a.mrc", data.itemsize)
    np.testing.assert_array_equal(mrcfile.read(uri), data)
    reader = open_mrc(uri, SIGNED)
    assert reader.voxel_spacing_angstrom == 10
    values = reader.read_slice(3)
    assert values.dtype == np.dtype(dtype)
    assert values.dtype.isnative
    np.testing.assert_array_equal(values, data[3])


@pytest.mark.parametrize("big", [False, True])
def test_a_wrong_machine_stamp_is_seen_through(tmp_path: Path, big: bool) -> None:
    path = tmp_path / "a.mrc"
    write(path, volume())
    if big:
        swap_bytes(path, 2)
    data = bytearray(path.read_bytes())
    data[212:216] = b"DD\0\0" if big else b"\x11\x11\0\0"
    path.write_bytes(data)
    np.testing.assert_array_equal(open_mrc(str(path), SIGNED).read_slice(2), volume()[2])


def test_the_extended_header_is_skipped(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.rec") as file:
        file.set_data(volume())
        file.set_extended_header(np.frombuffer(b"metadata" * 96, "V768"))
    np.testing.assert_array_equal(open_mrc(str(tmp_path / "a.rec"), SIGNED).read_slice(4), volume()[4])


def test_a_slice_is_read_without_the_rest_of_the_file(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = Path(write(tmp_path / "a.mrc", volume("int8"))).read_bytes()
    files = fsspec.filesystem("memory")
    files.pipe_file(f"{memory}/a.mrc", data)
    asked = []
    original = type(files).cat_file

    def record(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        asked.append((start, end))
        return original(self, path, start, end, **options)

    monkeypatch.setattr(type(files), "cat_file", record)
    values = open_mrc(f"{memory}/a.mrc", ArchiveSettings()).read_slice(2)
    np.testing.assert_array_equal(values.view(np.int8), volume("int8")[2])
    assert asked == [(0, 1024), (1024 + 2 * 42, 1024 + 3 * 42)]


def test_auto_reads_the_bytes_of_mode_0_as_unsigned_where_nobody_says_otherwise(tmp_path: Path) -> None:
    data = volume("int8")
    reader = open_mrc(write(tmp_path / "a.mrc", data), ArchiveSettings())
    assert reader.read_slice(0).dtype == np.uint8
    np.testing.assert_array_equal(reader.read_slice(3), data[3].view(np.uint8))


@pytest.mark.parametrize("choice", ["int8", "uint8"])
def test_the_setting_says_what_mode_0_means(tmp_path: Path, choice: Any) -> None:
    uri = write(tmp_path / "a.mrc", volume("int8"))
    assert open_mrc(uri, ArchiveSettings(mrc_mode_0=choice)).read_slice(0).dtype == choice


@pytest.mark.parametrize(("flags", "dtype"), [(1, np.int8), (0, np.uint8)])
def test_imod_says_itself_whether_bytes_are_signed(tmp_path: Path, flags: int, dtype: type) -> None:
    path = tmp_path / "a.rec"
    write(path, volume("int8"))
    data = bytearray(path.read_bytes())
    data[152:160] = b"IMOD" + struct.pack("<i", flags)
    path.write_bytes(data)
    assert open_mrc(str(path), ArchiveSettings()).read_slice(0).dtype == dtype


@pytest.mark.parametrize(
    ("cell", "spacing"),
    [
        ((0, 0, 0), None),
        ((6, 7, 5), None),  # 1 angstrom, which writers put for 'unknown'
        ((-6, -7, -5), None),
        ((float("nan"), 0, 0), None),
        ((6 * 13.328, 7 * 13.328, 5 * 13.328), 13.328),
        ((6 * 13.328, 7 * 13.328, 0), 13.328),
    ],
)
def test_the_spacing_is_the_headers_unless_it_means_unknown(
    tmp_path: Path, cell: tuple[float, float, float], spacing: float | None
) -> None:
    uri = write(tmp_path / "a.mrc", volume(), cella=cell)
    assert open_mrc(uri, SIGNED).voxel_spacing_angstrom == spacing
    stated = ArchiveSettings(voxel_spacing_angstrom=19.7)
    assert open_mrc(uri, stated).voxel_spacing_angstrom == 19.7


def test_voxels_that_are_no_cubes_are_refused_unless_the_spacing_is_stated(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.mrc", volume(), cella=(60, 70, 100))
    with pytest.raises(TomogramError, match=r"10 x 10 x 20 angstrom.*--archive\.voxel-spacing-angstrom"):
        open_mrc(uri, ArchiveSettings())
    assert open_mrc(uri, ArchiveSettings(voxel_spacing_angstrom=10)).voxel_spacing_angstrom == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: gzip.compress(data), "is compressed with gzip.*gunzip it first"),
        (lambda data: b"BZh9" + data, "is compressed with bzip2.*bunzip2 it first"),
        (lambda data: data[:500], "holds 500 bytes, expected an MRC header of 1024; copy the file again"),
        (lambda _: b"", "holds 0 bytes"),
        (lambda data: data[:12] + struct.pack("<i", 4) + data[16:], r"is of MRC mode 4, expected 0 \(bytes\), 1"),
        (lambda data: struct.pack("<i", 0) + data[4:], "is not an MRC file: its header gives 0 x 7 x 5 voxels"),
        (lambda data: struct.pack("<i", -6) + data[4:], "is not an MRC file"),
        (lambda _: b"row_id,tomo_id,Motor axis 0" * 50, "is not an MRC file"),
        (lambda data: data[:64] + struct.pack("<3i", 3, 2, 1) + data[76:], r"in the order \(3, 2, 1\), expected"),
        (
            lambda data: data[:92] + struct.pack("<i", -1) + data[96:],
            "claims to take 1023 bytes of the file's 1444; copy",
        ),
        (
            lambda data: data[:92] + struct.pack("<i", 9999) + data[96:],
            "claims to take 11023 bytes of the file's 1444; copy",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "bad.mrc"
    write(path, volume())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TomogramError, match=message) as raised:
        open_mrc(str(path), ArchiveSettings())
    assert str(raised.value).startswith(f"{path}: ")


@settings(deadline=None)
@given(st.binary(max_size=1100))
def test_any_bytes_are_a_header_or_a_tomogram_error(data: bytes) -> None:
    with contextlib.suppress(TomogramError):
        assert min(parse_header(data, len(data), "a.mrc").shape) > 0


@pytest.mark.parametrize("mode_0", ["auto", "int8"])
def test_of_a_truncated_file_only_the_slices_beyond_its_end_are_corrupt(tmp_path: Path, mode_0: Any) -> None:
    path = tmp_path / "a.mrc"
    write(path, volume("int8"))
    path.write_bytes(path.read_bytes()[: 1024 + 2 * 42 + 10])
    slices = read_slices(open_mrc(str(path), ArchiveSettings(mrc_mode_0=mode_0)), range(5), threads=1)
    assert [type(values) for values in slices[:2]] == [np.ndarray] * 2
    for z, error in enumerate(slices[2:], start=2):
        assert isinstance(error, SliceCorruptError)
        assert f"a.mrc: ends within or before slice {z} of 5" in str(error)


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.mrc", volume(), nx=10**6, ny=10**6, mx=0, my=0)
    with pytest.raises(SliceCorruptError, match="it has 1444 bytes, expected 2000000001024; copy"):
        open_mrc(uri, SIGNED).read_slice(0)


def test_slices_that_are_not_there_are_missing(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.mrc", volume())
    reader = open_mrc(uri, SIGNED)
    with pytest.raises(SliceMissingError, match="there is no slice 5; the slices are 0 to 4"):
        reader.read_slice(5)
    Path(uri).unlink()
    with pytest.raises(SliceMissingError, match="is not there any more"):
        reader.read_slice(0)
    with pytest.raises(TomogramError, match="there is no such file; make the manifest again"):
        open_mrc(uri, SIGNED)


def test_a_storage_that_fails_is_neither_the_tomograms_nor_the_slices_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path / "a.mrc", volume())
    reader = open_mrc(uri, SIGNED)

    def fail(*_: Any, **__: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalSource, "_fetch", fail)
    with pytest.raises(StorageError, match=r"a\.mrc: cannot be read \(Input/output error\)"):
        reader.read_slice(0)
    with pytest.raises(StorageError, match=r"a\.mrc: cannot be read \(Input/output error\)"):
        open_mrc(uri, SIGNED)


def test_a_file_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.mrc", volume())
    assert open_tomogram(uri, "mrc", SHAPE, SIGNED).shape == SHAPE
    with pytest.raises(TomogramError, match=r"is 5 x 7 x 6 voxels .*, the manifest says 6 x 7 x 5; make the manifest"):
        open_tomogram(uri, "mrc", SHAPE[::-1], SIGNED)
    with pytest.raises(TomogramError, match="unknown format 'tiff', expected one of jpeg_stack, mrc, ome_zarr"):
        open_tomogram(uri, "tiff", SHAPE, SIGNED)
