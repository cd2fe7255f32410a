"""A slice that comes as one image file from anywhere: JPEG, PNG or TIFF, told apart by content and distrusted.

How large an image claims to be is checked before anything is allocated for its pixels.
"""

import io
import struct
import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from motor_ray.archive.jpeg_stack import decode_image, image_size
from motor_ray.errors import SliceCorruptError

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_PNG, _ANIMATION = b"\x89PNG\r\n\x1a\n", (b"acTL", b"fcTL", b"fdAT")
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")
"""Pillow's names for grey images of 8, 16 and 32 bits."""

SMALLEST_EDGE = 16
"""Pixels; on less there is no room for a motor."""

MOST_SCANS = 100
"""Of a progressive JPEG, which usually has about ten. A few bytes make another, and each is a walk over all pixels."""

MOST_CHUNKS = 100_000
"""Parts of a PNG, which are usually of 8 kB or more."""

COLOUR_MODES = ("RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr")
"""Those that are turned grey."""


def is_picture(data: bytes) -> bool:
    """Whether the file's first bytes are those of a JPEG, PNG or TIFF."""
    return data.startswith((_JPEG, _PNG, *_TIFF))


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """`(y, x)` that the image claims to have. Raises SliceCorruptError if it does not say, or is of another kind."""
    if not is_picture(data):
        raise SliceCorruptError(
            f"{name}: begins with {data[:8].hex(' ') or 'nothing'}, expected a JPEG, PNG or TIFF image"
        )
    if not data.startswith(_TIFF):
        return image_size(data, name)
    with _open_tiff(data, name) as image:
        return image.height, image.width


def decode_picture(data: bytes, name: str, most_pixels: int) -> NDArray[np.generic]:
    """The `(y, x)` grey values of an image file: uint8 or uint16, of a TIFF also int32 or float32.

    Of a TIFF with several pages it is the first. `name` stands for the file in messages. Raises SliceCorruptError if
    the file is damaged, or claims to have more than `most_pixels`.
    """
    size = picture_size(data, name)
    check_pixels(size, name, most_pixels)
    if data.startswith(_JPEG):
        _check_scans(data, name)
        return decode_image(data, name, size)
    if data.startswith(_PNG):
        _check_chunks(data, name)
        return decode_image(data, name, size)
    with _open_tiff(data, name) as image:
        if image.mode not in (*GREY_MODES, *COLOUR_MODES):
            raise SliceCorruptError(f"{name}: is a TIFF of the kind {image.mode}, expected 8 or 16-bit grey")
        try:
            pixels = np.array(image if image.mode in GREY_MODES else image.convert("L"))
        except Exception as error:  # whatever Pillow's and libtiff's plugins raise on damage: many kinds
            raise SliceCorruptError(f"{name}: cannot be decoded ({error}); copy the file again") from None
    if pixels.shape != size:
        raise SliceCorruptError(f"{name}: its pixels cannot be decoded; copy the file again")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def check_pixels(size: tuple[int, int], name: str, most: int) -> None:
    """Raises SliceCorruptError if an image of `size` (y, x) has more than `most` pixels, or too few for a motor."""
    if min(size) < SMALLEST_EDGE:
        raise SliceCorruptError(
            f"{name}: is {size[0]} x {size[1]} pixels, expected edges of {SMALLEST_EDGE} at least; there is no room "
            "for a motor"
        )
    if size[0] * size[1] > most:
        raise SliceCorruptError(
            f"{name}: claims to be {size[0]} x {size[1]} pixels, expected at most {most:,} in all; a slice of a "
            "tomogram is smaller"
        )


def _check_scans(data: bytes, name: str) -> None:
    scans = data.count(_SCAN)
    if scans > MOST_SCANS:
        raise SliceCorruptError(f"{name}: is a JPEG of {scans} scans, expected {MOST_SCANS} at most; save it again")


def _check_chunks(data: bytes, name: str) -> None:
    """Raises SliceCorruptError if a PNG's chunks do not fit into the file: OpenCV makes room for what they claim."""
    at = len(_PNG)
    for _ in range(MOST_CHUNKS):
        if at + 12 > len(data):
            raise SliceCorruptError(f"{name}: ends after {len(data)} bytes, before its image does; copy the file again")
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        if kind in _ANIMATION:
            raise SliceCorruptError(f"{name}: is an animation, expected one image")
        at += 12 + length
    raise SliceCorruptError(f"{name}: is a PNG of more than {MOST_CHUNKS:,} chunks; save it again")


def _open_tiff(data: bytes, name: str) -> "TiffImageFile":
    # Of damage in what a TIFF says beside its pixels Pillow warns; all that counts here is whether it has the pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return _tiff_kind()(io.BytesIO(data))
    except Exception as error:  # of many kinds, depending on where it is damaged
        raise SliceCorruptError(
            f"{name}: its TIFF header cannot be understood ({error}); copy the file again, or save it as grey of 8 or "
            "16 bits"
        ) from None


@cache
def _tiff_kind() -> "type[TiffImageFile]":
    from PIL.ExifTags import Base
    from PIL.TiffImagePlugin import TiffImageFile  # Pillow takes long to import

    class AsStored(TiffImageFile):
        """An orientation tag must not turn a slice."""

        def _setup(self) -> None:
            self.tag_v2.pop(Base.Orientation, None)
            super()._setup()

        def load_end(self) -> None:
            """Nothing: here Pillow would look for an orientation again, and turn the pixels."""

    return AsStored
