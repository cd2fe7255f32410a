from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.archive.jpeg_stack import (
    MAX_SLICES,
    JpegStack,
    decode_image,
    image_size,
    read_image_size,
    stack_pattern,
)
from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, SliceCorruptError, SliceMissingError, StorageError
from motor_ray.storage import open_source

SIZE = (48, 40)


def picture(size: tuple[int, int] = SIZE, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, top, size).astype(dtype)


def encode(image: np.ndarray, suffix: str = ".jpg", *flags: int) -> bytes:
    return cv2.imencode(suffix, image, flags)[1].tobytes()


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """`jpeg` with a segment of metadata behind its first marker."""
    return jpeg[:2] + bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


@pytest.fixture
def stack(tmp_path: Path) -> JpegStack:
    """Three slices, of which the middle one is missing."""
    for z in (0, 2):
        (tmp_path / f"slice_{z:04d}.jpg").write_bytes(encode(picture(seed=z)))
    return JpegStack(f"{tmp_path}/slice_{{z:04d}}.jpg", (3, *SIZE))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_comes_back_exactly_in_its_depth(dtype: type) -> None:
    image = picture(dtype=dtype)
    decoded = decode_image(encode(image, ".png"), "a.png", SIZE)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("flags", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)])
def test_a_jpeg_comes_back_as_opencv_decodes_it(flags: tuple[int, ...]) -> None:
    data = encode(picture(), ".jpg", *flags)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(decode_image(data, "a.jpg", SIZE), expected)


def test_a_colour_image_becomes_grey() -> None:
    grey = picture()
    decoded = decode_image(encode(np.dstack([grey] * 3), ".png"), "a.png", SIZE)
    np.testing.assert_array_equal(decoded, grey)


def test_an_orientation_tag_does_not_turn_the_slice() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    plain = encode(picture())
    turned = with_segment(plain, 0xE1, exif)
    obeying = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert obeying is not None
    assert obeying.shape == SIZE[::-1]
    np.testing.assert_array_equal(decode_image(turned, "a.jpg", SIZE), decode_image(plain, "a.jpg", SIZE))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@settings(deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_an_image_cut_anywhere_is_corrupt(suffix: str, kept: float) -> None:
    data = encode(picture(), suffix)
    # PNG's last chunk, and JPEG's last marker, are what an image may not lack.
    cut = data[: int(kept * len(data))]
    with pytest.raises(SliceCorruptError, match=r"^cut\.img: .*(copy the file again|neither a JPEG nor a PNG)"):
        decode_image(cut, "cut.img", SIZE)


def test_a_cut_jpeg_with_a_whole_thumbnail_is_still_corrupt() -> None:
    data = with_segment(encode(picture()), 0xE1, b"thumbnail" + encode(picture((8, 8))))
    decode_image(data, "a.jpg", SIZE)
    with pytest.raises(SliceCorruptError, match="before its image does"):
        decode_image(data[:-40], "a.jpg", SIZE)


def test_bytes_behind_the_end_of_an_image_do_no_harm() -> None:
    for suffix in (".jpg", ".png"):
        data = encode(picture(), suffix)
        np.testing.assert_array_equal(decode_image(data + b"\0" * 7, "a", SIZE), decode_image(data, "a", SIZE))


def test_a_damaged_png_is_corrupt() -> None:
    data = bytearray(encode(picture(), ".png"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(SliceCorruptError, match="cannot be decoded; copy the file again"):
        decode_image(bytes(data), "a.png", SIZE)


def test_an_image_of_another_size_is_corrupt() -> None:
    with pytest.raises(SliceCorruptError, match=r"is 48 x 40 pixels, expected 40 x 48 .* make the manifest again"):
        decode_image(encode(picture()), "a.jpg", SIZE[::-1])


def test_an_absurd_size_is_refused_before_anything_is_decoded() -> None:
    data = encode(picture(), ".png")
    bomb = data[:16] + (60000).to_bytes(4, "big") * 2 + data[24:]
    with pytest.raises(SliceCorruptError, match="claims to be 60000 x 60000 pixels, expected edges of 1 to 16384"):
        decode_image(bomb, "a.png", (60000, 60000))


def test_the_size_is_found_behind_much_metadata_by_reading_on(tmp_path: Path) -> None:
    data = encode(picture())
    for _ in range(3):
        data = with_segment(data, 0xE2, bytes(60000))
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert read_image_size(open_source(str(path)), str(path)) == SIZE
    with pytest.raises(SliceCorruptError, match="within the image's header"):
        image_size(data[:65536], "a.jpg")


def test_a_stack_reads_its_slices_and_reports_the_missing_and_the_damaged(stack: JpegStack, tmp_path: Path) -> None:
    (tmp_path / "slice_0002.jpg").write_bytes(b"")
    first, second, third = read_slices(stack, [0, 1, 2], threads=3)
    assert isinstance(first, np.ndarray)
    assert first.shape == SIZE
    assert isinstance(second, SliceMissingError)
    assert "slice_0001.jpg: slice 1 of 3 is not there; restore the file" in str(second)
    assert isinstance(third, SliceCorruptError)
    assert "slice_0002.jpg: is empty; copy the file again" in str(third)


def test_a_slice_outside_the_stack_is_missing(stack: JpegStack) -> None:
    with pytest.raises(SliceMissingError, match="there is no slice -1; the slices are 0 to 2"):
        stack.read_slice(-1)


def test_a_slice_that_the_storage_refuses_is_neither_missing_nor_corrupt(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").mkdir()
    with pytest.raises(StorageError, match=r"0\.jpg: cannot be read \(Is a directory\)"):
        JpegStack(f"{tmp_path}/{{z}}.jpg", (1, *SIZE)).read_slice(0)


def test_opening_costs_nothing_and_the_spacing_is_the_users(memory: str) -> None:
    reader = open_tomogram(
        f"{memory}/nothing/{{z}}.jpg", "jpeg_stack", (5, 6, 7), ArchiveSettings(voxel_spacing_angstrom=13.1)
    )
    assert reader.shape == (5, 6, 7)
    assert reader.voxel_spacing_angstrom == 13.1
    assert open_tomogram("a", "jpeg_stack", (5, 6, 7), ArchiveSettings()).voxel_spacing_angstrom is None


@settings(deadline=None)
@given(
    st.sets(st.integers(0, MAX_SLICES - 1), min_size=1, max_size=20),
    st.integers(1, 6),
    st.text("ab{}_0%", max_size=5),
    st.text("ab{}_-", max_size=5),
)
def test_the_pattern_gives_back_the_names(zs: set[int], width: int, before: str, after: str) -> None:
    before = before + "_" if before.endswith("0") else before
    names = {z: f"{before}{z:0{width}d}{after}.png" for z in zs}
    pattern, found = stack_pattern(names.values(), "folder")
    assert found == sorted(zs)
    assert {z: pattern.format(z=z) for z in zs} == names


def test_a_lone_image_without_a_number_is_one_slice() -> None:
    assert stack_pattern(["bacteria.png"], "folder") == ("bacteria.png", [0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["slice_0000.jpg", "slice_0000.png"], r"more than one kind, such as slice_0000\.jpg and slice_0000\.png"),
        (["slice_0000.jpg", "overview.jpg"], r"such as overview\.jpg and slice_0000\.jpg; keep the slices"),
        (["one.png", "two.png"], r"such as one\.png and two\.png"),
        (["slice_1.jpg", "slice_0002.jpg"], r"different widths, such as slice_1\.jpg and slice_0002\.jpg; rename"),
        (["slice_01.jpg", "slice_001.jpg"], r"different widths"),
        (["scan_20260131.jpg"], r"numbered up to 20260131, expected z below 65536"),
    ],
)
def test_names_that_follow_no_single_pattern_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ManifestError, match=rf"^folder: .*{message}"):
        stack_pattern(names, "folder")
