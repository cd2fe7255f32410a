"""A slice that comes as one image file from anywhere: JPEG, PNG or TIFF, told apart by content and distrusted.

How large an image claims to be is checked before anything is allocated for its pixels.
"""

import io
import struct

import numpy as np
from numpy.typing import NDArray

from motor_ray.archive.jpeg_stack import decode_image, image_size
from motor_ray.errors import SliceCorruptError

_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")
"""Pillow's names for grey images of 8, 16 and 32 bits."""

COLOUR_MODES = ("RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr")
"""Those that are turned grey."""


def is_picture(data: bytes) -> bool:
    """Whether the file's first bytes are those of a JPEG, PNG or TIFF."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", *_TIFF))


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
    if not data.startswith(_TIFF):
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
    """Raises SliceCorruptError if an image of `size` (y, x) has more than `most` pixels."""
    if size[0] * size[1] > most:
        raise SliceCorruptError(
            f"{name}: claims to be {size[0]} x {size[1]} pixels, expected at most {most:,} in all; a slice of a "
            "tomogram is smaller"
        )


def _open_tiff(data: bytes, name: str):  # type: ignore[no-untyped-def]  # Pillow takes long to import
    from PIL import Image, TiffImagePlugin

    try:
        return TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise SliceCorruptError(f"{name}: ends or breaks off within the TIFF's header ({error})") from None
