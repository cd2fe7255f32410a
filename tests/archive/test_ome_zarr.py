from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from motor_ray.archive.ome_zarr import open_ome_zarr
from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import ArchiveSettings
from motor_ray.errors import SliceCorruptError, SliceMissingError, TomogramError

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


def test_a_level_has_its_own_shape_and_spacing(tmp_path: Path) -> None:
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), volume()), SETTINGS, level=1)
    assert reader.shape == (3, 4, 5)
    assert reader.voxel_spacing_angstrom == 20
    np.testing.assert_array_equal(reader.read_slice(1), volume()[2, ::2, ::2])
    with pytest.raises(TomogramError, match="has no level 2; its levels are 0 to 1"):
        open_ome_zarr(str(tmp_path / "a.zarr"), SETTINGS, level=2)


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


def test_leading_axes_of_one_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    reader = open_ome_zarr(write(str(tmp_path / "a.zarr"), volume()[None]), SETTINGS)
    assert reader.shape == SHAPE
    assert reader.voxel_spacing_angstrom == 10
    np.testing.assert_array_equal(reader.read_slice(2), volume()[2])
    with pytest.raises(TomogramError, match=r"has the shape \(2, 6, 8, 10\), expected one volume \(z, y, x\)"):
        open_ome_zarr(write(str(tmp_path / "b.zarr"), np.stack([volume()] * 2)), SETTINGS)


@pytest.mark.parametrize(
    ("scale", "unit", "spacing"), [(1.31, "nanometer", 13.1), (13.1, "angstrom", 13.1), (13.1, "parsec", None)]
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
        ({"datasets": []}, "has no level 0"),
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
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("no JSON")
    with pytest.raises(TomogramError, match="cannot be opened as Zarr"):
        open_ome_zarr(str(tmp_path / "broken.zarr"), SETTINGS)
