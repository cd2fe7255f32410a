"""Stacks of JPEG or PNG images, one per z-slice, such as Kaggle's ``<tomo_id>/slice_NNNN.jpg``.

A stack's URI holds the pattern of its file names, ``.../slice_{z:04d}.jpg``, so that reading a slice needs no listing;
a brace that belongs to a name is doubled. The number in a name is z, counted from 0. A lone image without a number is
a stack of one slice. Images do not say their voxel spacing.
"""

import re
import struct
from collections.abc import Iterable

import cv2
import numpy as np
import simplejpeg

from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, SliceCorruptError, SliceMissingError
from motor_ray.storage import DEFAULTS, Source, failure, open_source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

MAX_EDGE = 16384
"""Images with a longer edge are refused before anything is allocated for them."""

MAX_SLICES = 65536
"""A stack numbered higher is numbered by something else than z, a date for instance."""

HEADER_BYTES = 65536
"""Holds the size of nearly every image; metadata rarely pushes it farther back."""

# An orientation tag must not turn a slice; ANYDEPTH keeps 16-bit PNGs as they are.
_FLAGS = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)  # the last number in a name is z
_BARE_MARKERS = frozenset([0x01, *range(0xD0, 0xD8)])


class JpegStack:
    """A tomogram whose slices are image files. Opening it costs no request."""

    def __init__(self, uri: str, shape: tuple[int, int, int], settings: ArchiveSettings = DEFAULTS) -> None:
        self.uri = uri
        self.shape = shape
        self.voxel_spacing_angstrom = settings.voxel_spacing_angstrom
        self._source = open_source(uri, settings)

    def read_slice(self, z: int) -> np.ndarray:
        """`(y, x)` grey values of slice `z`: uint8, or uint16 for a 16-bit PNG.

        Raises SliceMissingError if the file is not there, SliceCorruptError if it is damaged or not of the stack's
        size, StorageError if the storage refuses it, OutageError if the storage does not answer.
        """
        if not 0 <= z < self.shape[0]:
            raise SliceMissingError(f"{self.uri}: there is no slice {z}; the slices are 0 to {self.shape[0] - 1}")
        uri = self.uri.format(z=z)
        try:
            data = bytes(self._source.read(uri))
        except FileNotFoundError:
            raise SliceMissingError(
                f"{uri}: slice {z} of {self.shape[0]} is not there; restore the file, or renumber the stack from 0"
            ) from None
        return decode_image(data, uri, self.shape[1:])


def decode_image(data: bytes, uri: str, size: tuple[int, int]) -> np.ndarray:
    """The `(y, x)` grey values in a JPEG or PNG file's bytes, uint8 or uint16.

    `size` is the expected `(y, x)`; `uri` names the file in messages. Raises SliceCorruptError if the image is
    truncated, damaged, or of another size; the size is checked before anything is allocated. Bytes changed within a
    JPEG's scan go unnoticed: the format has no checksum.
    """
    found, end = _inspect(data, uri)
    if found != size:
        raise SliceCorruptError(
            f"{uri}: is {found[0]} x {found[1]} pixels, expected {size[0]} x {size[1]} like the stack's first slice; "
            "replace the file, or make the manifest again"
        )
    # libjpeg fills what is missing with grey and merely prints a warning.
    if data.rfind(_JPEG_END if data.startswith(_JPEG) else _PNG_END, end) < 0:
        raise SliceCorruptError(f"{uri}: ends after {len(data)} bytes, before its image does; copy the file again")
    try:
        image = _decode_jpeg(data) if data.startswith(_JPEG) else cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS)
    except (cv2.error, ValueError) as error:
        what = getattr(error, "err", error)
        raise SliceCorruptError(f"{uri}: cannot be decoded ({what}); copy the file again") from None
    if image is None or image.shape != size:
        raise SliceCorruptError(f"{uri}: its pixels cannot be decoded; copy the file again")
    return image


def _decode_jpeg(data: bytes) -> np.ndarray:
    """The same pixels as OpenCV's, in 85 % of the time."""
    return np.asarray(simplejpeg.decode_jpeg(data, "GRAY", fastdct=False, strict=False)[:, :, 0])


def image_size(data: bytes, uri: str) -> tuple[int, int]:
    """`(y, x)` of a JPEG or PNG from its first bytes. Raises SliceCorruptError if they do not say it."""
    return _inspect(data, uri)[0]


def read_image_size(source: Source, uri: str) -> tuple[int, int]:
    """`(y, x)` of the image `uri`, from a ranged read of its first bytes.

    Raises SliceCorruptError if it is not a JPEG or PNG image, StorageError if it cannot be read.
    """
    try:
        data = bytes(source.read(uri, 0, HEADER_BYTES))
        if data.startswith(_JPEG) and len(data) == HEADER_BYTES and _jpeg_header(data) is None:
            data = bytes(source.read(uri))
    except FileNotFoundError as error:
        raise failure(uri, "cannot be read", error) from None
    return image_size(data, uri)


def stack_pattern(names: Iterable[str], folder: str) -> tuple[str, list[int]]:
    """The pattern that gives the `names` of a folder's images, and the sorted slice numbers that are there.

    The pattern is a format string of z; ``["slice_0000.jpg", "slice_0001.jpg"]`` gives ``"slice_{z:04d}.jpg"``. A
    single image without a number gives its own name and ``[0]``. Raises ManifestError if the names follow no single
    pattern; `folder` names the folder in its message.
    """
    parts = {name: _NUMBERED.fullmatch(name) for name in sorted(names)}
    kinds = {(match[1], match[3]) if match else (name, ""): name for name, match in parts.items()}
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise ManifestError(
            f"{folder}: holds images of more than one kind, such as {first} and {second}; "
            "keep the slices of one tomogram in a folder of their own"
        )
    before, after = next(iter(kinds))
    numbers = [match[2] for match in parts.values() if match]
    if not numbers:
        return escape_pattern(before), [0]
    width = min(map(len, numbers))
    zs = sorted(map(int, numbers))
    for number in numbers:
        if number != f"{int(number):0{width}d}":
            shortest = min(numbers, key=len)
            raise ManifestError(
                f"{folder}: the slices are numbered with different widths, such as {before}{shortest}{after} and "
                f"{before}{number}{after}; rename them to one width"
            )
    if zs[-1] >= MAX_SLICES:
        raise ManifestError(
            f"{folder}: the slices are numbered up to {zs[-1]}, expected z below {MAX_SLICES}; number them from 0"
        )
    field = f"{{z:0{width}d}}" if width > 1 else "{z}"
    return escape_pattern(before) + field + escape_pattern(after), zs


def escape_pattern(text: str) -> str:
    """`text` as the fixed part of a pattern: its braces doubled."""
    return text.replace("{", "{{").replace("}", "}}")


def _inspect(data: bytes, uri: str) -> tuple[tuple[int, int], int]:
    """The image's `(y, x)`, and how many bytes its header takes. Raises SliceCorruptError."""
    if not data:
        raise SliceCorruptError(f"{uri}: is empty; copy the file again")
    if data.startswith(_JPEG):
        header = _jpeg_header(data)
    elif data.startswith(_PNG):
        header = (struct.unpack_from(">II", data, 16), 24) if len(data) >= 24 else None
    else:
        raise SliceCorruptError(f"{uri}: is neither a JPEG nor a PNG image; it begins with {data[:4].hex(' ')}")
    if header is None:
        raise SliceCorruptError(f"{uri}: ends or breaks off within the image's header; copy the file again")
    size, end = header
    size = size if data.startswith(_JPEG) else size[::-1]
    if not all(0 < edge <= MAX_EDGE for edge in size):
        raise SliceCorruptError(
            f"{uri}: claims to be {size[0]} x {size[1]} pixels, expected edges of 1 to {MAX_EDGE}; it is damaged"
        )
    return size, end


def _jpeg_header(data: bytes) -> tuple[tuple[int, int], int] | None:
    """`(y, x)` from the frame header and the position behind it, or None if there is none."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        elif marker in _FRAME_MARKERS:
            return struct.unpack_from(">HH", data, at + 5), at + 9
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
