"""The page reads an MRC file as motor_ray does: the same values, the same spacing, the same refusals."""

import struct

import numpy as np
import pytest

from motor_ray.archive.mrc import open_mrc
from motor_ray.config import ArchiveSettings
from motor_ray.errors import TomogramError
from tests.web.files import SHAPE, volume, write_mrc

READ = """async ([name, z]) => {
    const { openMrc } = await import("/static/mrc.js");
    try {
        const source = await openMrc(document.getElementById("file").files[0]);
        const words = (value) => Number.isFinite(value) ? value : String(value);
        const values = (await source.read(z)).slice(0, 2000); // enough, and not too much to hand over
        return { ...source, values: Array.from(values, words) };
    } catch (error) {
        return { error: error.message };
    }
}"""


@pytest.fixture
def read(page):
    """What the page makes of slice `z` of a file."""
    # The page itself is to leave the file alone.
    page.evaluate("window.addEventListener('change', (event) => event.stopImmediatePropagation(), true)")

    def read(path, z=0):
        page.set_input_files("#file", path)
        return page.evaluate(READ, [path.name, z])

    return read


def patched(path, place, format, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(format, data, place, *values)
    path.write_bytes(data)
    return path


def same(read, path, z):
    ours, theirs = open_mrc(str(path), ArchiveSettings()), read(path, z)
    assert (theirs["depth"], theirs["height"], theirs["width"]) == ours.shape
    assert theirs["spacing"] == ours.voxel_spacing_angstrom
    np.testing.assert_array_equal(np.array(theirs["values"], float), ours.read_slice(z).astype(float).ravel())


@pytest.mark.parametrize("extended", [0, 160])
@pytest.mark.parametrize("dtype", ["i1", "<i2", ">i2", "<f4", ">f4", "<u2", ">u2", "<f2", ">f2"])
def test_values_of_all_types_and_byte_orders_are_those_that_we_read(read, tmp_path, dtype, extended):
    same(read, write_mrc(tmp_path / "a.mrc", volume(dtype), extended=extended), 17)


@pytest.mark.parametrize(("stamp", "flags"), [(1146047817, 1), (1146047817, 0), (0, 1)])
def test_bytes_are_signed_only_where_imod_says_so(read, tmp_path, stamp, flags):
    same(read, patched(write_mrc(tmp_path / "a.mrc", volume("i1")), 152, "<2i", stamp, flags), 3)


def test_odd_halves_are_understood(read, tmp_path):
    path = write_mrc(tmp_path / "a.mrc", np.zeros(SHAPE, "f2"))
    odd = np.array([np.inf, -np.inf, np.nan, 6e-8, 65504, -0.1], "f2")
    same(read, patched(path, 1024, "12s", odd.tobytes()), 0)


@pytest.mark.parametrize("stamp", [b"\x11\x11\0\0", b"\0\0\0\0"])
def test_a_wrong_machine_stamp_is_seen_through(read, tmp_path, stamp):
    same(read, patched(write_mrc(tmp_path / "a.mrc", volume()), 212, "4s", stamp), 5)


@pytest.mark.parametrize("spacing", [0.0, 1.0, 13.328, (0.0, 7.5, 7.5)])
def test_the_spacing_is_the_one_that_we_find(read, tmp_path, spacing):
    same(read, write_mrc(tmp_path / "a.mrc", volume(), spacing=spacing), 0)


@pytest.mark.parametrize(
    ("place", "format", "values", "words"),
    [
        (12, "<i", (4,), "MRC mode 4"),
        (64, "<3i", (3, 2, 1), "(3, 2, 1), expected (1, 2, 3)"),
        (92, "<i", (10**9,), "claims to take 1000001024 bytes"),
        (92, "<i", (-2000,), "claims to take -976 bytes"),
        (0, "<i", (-1,), "is not an MRC file"),
        (0, "3s", (b"BZh",), "bunzip2 it first"),
    ],
)
def test_what_we_refuse_the_page_refuses_in_much_the_same_words(read, tmp_path, place, format, values, words):
    path = patched(write_mrc(tmp_path / "a.mrc", volume()), place, format, *values)
    with pytest.raises(TomogramError):
        open_mrc(str(path), ArchiveSettings())
    assert words in read(path)["error"]


def test_a_slice_of_a_file_larger_than_4_gb_is_read_alone(read, tmp_path):
    path = write_mrc(tmp_path / "a.mrc", volume("f4"))
    z, edge = 1100, 1024
    patched(path, 0, "<3i", edge, edge, 1200)
    with path.open("r+b") as file:  # sparse: it takes no room
        file.seek(1024 + z * edge * edge * 4)
        file.write(np.arange(edge, dtype="<f4").tobytes())
        file.truncate(1024 + 1200 * edge * edge * 4)
    assert read(path, z)["values"][:edge] == list(range(edge))
