import io
import resource
import struct
from typing import Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motor_ray.archive.pictures import (
    MOST_CHUNKS,
    MOST_SCANS,
    SMALLEST_EDGE,
    check_pixels,
    decode_picture,
    is_picture,
    picture_size,
)
from motor_ray.errors import SliceCorruptError

RNG = np.random.default_rng(0)
SIZE = (60, 48)
GREY: NDArray[np.uint8] = RNG.integers(0, 256, SIZE, dtype=np.uint8)
DEEP: NDArray[np.uint16] = RNG.integers(0, 65536, SIZE, dtype=np.uint16)
COLOUR: NDArray[np.uint8] = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
REAL = RNG.normal(size=SIZE).astype(np.float32)
MOST = 2**20


def saved(pixels, kind, **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: NDArray[np.generic], order: Literal["<", ">"], *, big: bool = False) -> bytes:
    """An uncompressed TIFF or BigTIFF of grey values in this byte order."""
    y, x = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    form = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = [(256, x), (257, y), (258, 8 * pixels.itemsize), (259, 1), (262, 1), (273, 0), (277, 1), (278, y)]
    tags += [(279, len(data)), (339, form)]
    start = (16 if big else 8) + (16 + 20 * len(tags) if big else 6 + 12 * len(tags))
    entry = order + ("HHQQ" if big else "HHII")
    # A short value stands at the front of its field, in either byte order.
    entries = b"".join(
        struct.pack(entry, tag, 16 if big else 4, 1, start if tag == 273 else value) for tag, value in tags
    )
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQQ", 43, 8, 0, 16, len(tags))
        return head + entries + bytes(8) + data
    return mark + struct.pack(order + "HIH", 42, 8, len(tags)) + entries + bytes(4) + data


PACKED = ("tiff_lzw", "tiff_adobe_deflate", "packbits")
ORDERS: list[tuple[Literal["<", ">"], bool]] = [("<", False), ("<", True), (">", False)]
SAME = {
    "PNG": (saved(GREY, "PNG"), GREY),
    "deep PNG": (cv2.imencode(".png", DEEP)[1].tobytes(), DEEP),
    "TIFF": (saved(GREY, "TIFF"), GREY),
    "deep TIFF": (saved(DEEP, "TIFF"), DEEP),
    "real TIFF": (saved(REAL, "TIFF"), REAL),
    "long TIFF": (saved(GREY.astype(np.int32), "TIFF"), GREY.astype(np.int32)),
    **{f"{packing} of {name}": (saved(of, "TIFF", compression=packing), of) for packing in PACKED
       for name, of in (("bytes", GREY), ("words", DEEP), ("numbers", REAL))},
    **{f"{order} {of.dtype} {'Big' * big}TIFF": (tiff(of, order, big=big), of) for order, big in ORDERS
       for of in (GREY, DEEP, REAL)},
    "first of several": (saved(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(255 - GREY)]), GREY),
}  # fmt: skip

NEAR = {
    "JPEG": (saved(GREY, "JPEG", quality=100), GREY),
    "progressive JPEG": (saved(GREY, "JPEG", quality=100, progressive=True), GREY),
    "JPEG in TIFF": (saved(GREY, "TIFF", compression="jpeg", quality=100), GREY),
    "colour JPEG": (saved(COLOUR, "JPEG", quality=100, subsampling=0), np.array(Image.fromarray(COLOUR).convert("L"))),
    "colour PNG": (saved(COLOUR, "PNG"), np.array(Image.fromarray(COLOUR).convert("L"))),
    "transparent PNG": (saved(Image.fromarray(GREY).convert("LA"), "PNG"), GREY),
    "palette PNG": (saved(Image.fromarray(GREY).convert("P"), "PNG"), GREY),
    "colour TIFF": (saved(COLOUR, "TIFF"), np.array(Image.fromarray(COLOUR).convert("L"))),
    "palette TIFF": (saved(Image.fromarray(GREY).convert("P"), "TIFF"), GREY),
    "fax TIFF": (saved(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4"), None),
    "black and white PNG": (saved(Image.fromarray(GREY).convert("1"), "PNG"), None),
}


@pytest.mark.parametrize(("data", "pixels"), SAME.values(), ids=SAME)
def test_grey_values_come_out_as_they_went_in(data, pixels):
    assert is_picture(data)
    assert picture_size(data, "a") == SIZE
    decoded = decode_picture(data, "a", MOST)
    assert decoded.dtype == pixels.dtype
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(("data", "pixels"), NEAR.values(), ids=NEAR)
def test_colour_turns_grey_and_losses_are_small(data, pixels):
    decoded = decode_picture(data, "a", MOST)
    assert decoded.shape == SIZE
    assert decoded.dtype == np.uint8
    if pixels is None:
        assert set(np.unique(decoded)) == {0, 255}
    else:
        assert np.abs(decoded.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_does_not_turn_a_slice(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for pixels, options in ((GREY, {}), (DEEP, {}), (REAL, {"compression": "tiff_lzw"})):
        data = saved(pixels, "TIFF", exif=exif, **options)
        assert picture_size(data, "a") == SIZE
        np.testing.assert_array_equal(decode_picture(data, "a", MOST), pixels)
    for kind in ("JPEG", "PNG"):
        assert decode_picture(saved(GREY, kind, exif=exif), "a", MOST).shape == SIZE


@pytest.mark.parametrize("edge", [SMALLEST_EDGE - 1, SMALLEST_EDGE])
def test_an_image_has_room_for_a_motor(edge):
    for kind in ("PNG", "TIFF", "JPEG"):
        data = saved(GREY[:edge], kind)
        if edge == SMALLEST_EDGE:
            assert decode_picture(data, "a", MOST).shape == (edge, SIZE[1])
        else:
            with pytest.raises(SliceCorruptError, match=f"{edge} x {SIZE[1]}"):
                decode_picture(data, "a", MOST)


def test_pixels_are_counted_before_they_are_decoded():
    check_pixels((100, 100), "a", 10_000)
    with pytest.raises(SliceCorruptError, match="100 x 101 pixels, expected at most 10,000"):
        check_pixels((100, 101), "a", 10_000)
    for kind in ("PNG", "TIFF", "JPEG"):
        with pytest.raises(SliceCorruptError, match="60 x 48"):
            decode_picture(saved(GREY, kind), "a", 60 * 48 - 1)


@pytest.mark.parametrize("edge", [20_000, 65_535, 2**31 - 1])
def test_nothing_is_allocated_for_what_an_image_only_claims(edge):
    png = SAME["PNG"][0]
    jpeg = NEAR["JPEG"][0]
    at = jpeg.index(b"\xff\xc0") + 5
    claims = [
        png[:16] + struct.pack(">II", edge, edge) + png[24:],
        *([jpeg[:at] + struct.pack(">HH", edge, edge) + jpeg[at + 4 :]] if edge < 65536 else []),
        *(tiff(GREY, "<", big=big).replace(struct.pack("<I", 60), struct.pack("<I", edge)) for big in (False, True)),
    ]
    claims[-2:] = [one.replace(struct.pack("<I", 48), struct.pack("<I", edge)) for one in claims[-2:]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in claims:
        with pytest.raises(SliceCorruptError, match=r"pixels, expected|TIFF header"):
            decode_picture(data, "a", 2**26)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_jpeg_of_endless_scans_is_not_walked_through():
    """Each takes 56 bytes, and with 8192 x 8192 pixels a twentieth of a second."""
    jpeg = NEAR["progressive JPEG"][0]
    start, end = jpeg.rfind(b"\xff\xc4"), jpeg.rfind(b"\xff\xd9")
    scan = jpeg[start:end]
    own = jpeg.count(b"\xff\xda")
    few, many = (jpeg[:end] + scan * number + jpeg[end:] for number in (MOST_SCANS - own, MOST_SCANS - own + 1))
    decode_picture(few, "a", MOST)
    with pytest.raises(SliceCorruptError, match=f"{MOST_SCANS + 1} scans"):
        decode_picture(many, "a", MOST)


def png_with(kind: bytes, length: int, data: bytes = b"") -> bytes:
    """A PNG with another chunk before its pixels."""
    png = SAME["PNG"][0]
    return png[:33] + struct.pack(">I", length) + kind + data + bytes(4) + png[33:]


def test_nothing_is_allocated_for_what_a_part_of_a_png_claims():
    png = SAME["PNG"][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (2**30, 2**31 - 1, 2**32 - 1, len(png)):
        for data in (png[:33] + struct.pack(">I", length) + png[37:], png_with(b"tEXt", length)):
            with pytest.raises(SliceCorruptError, match="ends after"):
                decode_picture(data, "a", MOST)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_animations_and_a_png_in_crumbs_are_refused():
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    with pytest.raises(SliceCorruptError, match="animation"):
        decode_picture(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), "a", MOST)
    png = SAME["PNG"][0]
    with pytest.raises(SliceCorruptError, match="chunks"):
        decode_picture(png[:33] + (bytes(4) + b"tEXt" + bytes(4)) * MOST_CHUNKS + png[33:], "a", MOST)


@pytest.mark.parametrize("data", [b"", b"\xff", b"GIF89a", b"BM", b"%PDF", b"<svg/>", b"II", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_picture_of_ours_is_told_by_its_first_bytes(data):
    assert not is_picture(data)
    with pytest.raises(SliceCorruptError, match="expected a JPEG, PNG or TIFF"):
        decode_picture(data, "a", MOST)


def test_kinds_of_tiff_that_pillow_does_not_know_are_refused():
    wide = tiff(np.zeros((60, 96), np.float64), "<").replace(
        struct.pack("<HHII", 339, 4, 1, 3), struct.pack("<HHII", 339, 4, 1, 6)
    )
    for data in (wide, tiff(DEEP, "<").replace(struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 3))):
        with pytest.raises(SliceCorruptError, match="TIFF"):
            decode_picture(data, "a", MOST)


SEEDS = [data for data, _ in (SAME | NEAR).values()]
WORDS = [struct.pack(order + "I", word) for order in "<>" for word in (0, 1, 60, 2**16, 2**31 - 1, 2**31, 2**32 - 1)]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with bytes flipped, changed, cut out, put in, or taken from another file."""
    made = bytearray(data)
    near_head = rng.random() < 0.5
    for _ in range(rng.integers(1, 8)):
        at = int(rng.integers(min(len(made), 200) if near_head else len(made)))
        match rng.integers(7):
            case 0:
                made[at] ^= 1 << int(rng.integers(8))
            case 1:
                made[at] = int(rng.integers(256))
            case 2:
                del made[at : at + int(rng.integers(1, 40))]
            case 3:
                made[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case 4:
                made[at : at + 4] = WORDS[rng.integers(len(WORDS))]
            case 5:
                other = SEEDS[rng.integers(len(SEEDS))]
                start = int(rng.integers(len(other)))
                made[at : at + 50] = other[start : start + 50]
            case _:
                del made[max(at, 20) :]
        if not made:
            break
    return bytes(made)


def test_4000_damaged_files_are_decoded_or_refused_and_nothing_else():
    rng = np.random.default_rng(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: list[str] = []
    for number in range(4000):
        data = mutated(SEEDS[number % len(SEEDS)], rng)
        try:
            pixels = decode_picture(data, "a", MOST)
        except SliceCorruptError as error:
            refused.append(str(error))
        else:
            assert pixels.ndim == 2
            assert min(pixels.shape) >= SMALLEST_EDGE
            assert pixels.size <= MOST
            assert pixels.dtype.isnative
    assert 1000 < len(refused) < 4000
    assert not [message for message in refused if " object at " in message or "\n" in message]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
