"""MRC volumes (.mrc, .rec, .map) read by byte range, so that a slice costs a slice.

The format is that of MRC2014 (Cheng et al. 2015, doi 10.1016/j.jsb.2015.04.002) with what is met in the wild: a wrong
or absent machine stamp, unsigned bytes in mode 0, an unknown voxel size written as 0 or 1. Slices are along z with rows
along y; what microscopes and viewers keep in the extended header is skipped.
"""

import math
import struct
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from motor_ray.config import ArchiveSettings
from motor_ray.errors import SliceCorruptError, SliceMissingError, TomogramError
from motor_ray.storage import DEFAULTS, failure, filesystem, open_source

HEADER_BYTES = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
"""Real-valued modes and their numpy types; mode 0 may mean ``u1`` as well."""

MAX_EDGE = 2**20
"""A longer edge is the sign of the wrong byte order, or of no MRC file at all."""

_WORDS = (
    "10i6f3i3f2i"  # nx ny nz mode, starts, mx my mz | cella, cellb | mapc mapr maps | dmin dmax dmean | ispg nsymbt
)
_IMOD_STAMP = 1146047817
_SUPPORTED = "0 (bytes), 1 (int16), 2 (float32), 6 (uint16) or 12 (float16)"


@dataclass(frozen=True, kw_only=True)
class MrcHeader:
    """What the first 1024 bytes say about the data."""

    shape: tuple[int, int, int]
    """z, y, x."""

    dtype: np.dtype
    """As stored, byte order included. Mode 0 is int8 here, the standard's meaning."""

    data_offset: int
    """Bytes before the first slice."""

    file_bytes: int
    """Bytes that the file really has."""

    bytes_signed: bool | None
    """Whether mode 0 is signed, where IMOD wrote the file and says so."""

    voxel_spacing_angstrom: float | None
    """None where the header holds 0 or 1, which writers use for 'unknown'."""

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize


class MrcTomogram:
    """An MRC file whose header has been read."""

    def __init__(self, uri: str, header: MrcHeader, settings: ArchiveSettings = DEFAULTS) -> None:
        self.uri = uri
        self.shape = header.shape
        self.voxel_spacing_angstrom = header.voxel_spacing_angstrom
        self.header = header
        self._source = open_source(uri, settings)

    def read_slice(self, z: int) -> np.ndarray:
        """`(y, x)` values of slice `z` in the stored type but this machine's byte order; read-only.

        Raises SliceCorruptError if the file ends before the slice does, SliceMissingError if the file is gone,
        StorageError if the storage refuses it, OutageError if the storage does not answer.
        """
        header = self.header
        if not 0 <= z < self.shape[0]:
            raise SliceMissingError(f"{self.uri}: there is no slice {z}; the slices are 0 to {self.shape[0] - 1}")
        start = header.data_offset + z * header.slice_bytes
        end = start + header.slice_bytes
        if end > header.file_bytes:
            raise SliceCorruptError(
                f"{self.uri}: ends within or before slice {z} of {self.shape[0]}: it has {header.file_bytes} bytes, "
                f"expected {end}; copy the file again"
            )
        try:
            data = self._source.read(self.uri, start, end)
        except FileNotFoundError:
            raise SliceMissingError(f"{self.uri}: is not there any more; restore it") from None
        if len(data) < header.slice_bytes:
            raise SliceCorruptError(f"{self.uri}: became shorter while it was read, at slice {z}; leave it in peace")
        values = np.frombuffer(data, header.dtype).reshape(self.shape[1:])
        return values.astype(header.dtype.newbyteorder("="), copy=False)


def open_mrc(uri: str, settings: ArchiveSettings) -> MrcTomogram:
    """Open the MRC file `uri`: its header is read, nothing else.

    Raises TomogramError if it is not an MRC file, or one of a kind we do not read.
    """
    header = read_header(uri, settings)
    if header.dtype == np.int8 and not _bytes_are_signed(header, settings):
        header = replace(header, dtype=np.dtype(np.uint8))
    return MrcTomogram(uri, header, settings)


def read_header(uri: str, settings: ArchiveSettings) -> MrcHeader:
    """Read the header of the MRC file `uri`.

    `settings.voxel_spacing_angstrom`, if given, is put in place of what the file says. Raises TomogramError for a
    compressed, foreign, truncated or unsupported file, StorageError or OutageError if it cannot be read.
    """
    files, path = filesystem(uri, settings)
    try:
        file_bytes = int(files.info(path)["size"])
        data = bytes(open_source(uri, settings).read(uri, 0, HEADER_BYTES))
    except FileNotFoundError:
        raise TomogramError(f"{uri}: there is no such file; make the manifest again") from None
    except OSError as error:
        raise failure(uri, "cannot be read", error) from None
    return parse_header(data, file_bytes, uri, settings.voxel_spacing_angstrom)


def parse_header(data: bytes, file_bytes: int, uri: str, voxel_spacing_angstrom: float | None = None) -> MrcHeader:
    """What the first bytes of a file of `file_bytes` say; a given spacing replaces theirs. Raises TomogramError."""
    for magic, name, tool in ((b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2")):
        if data.startswith(magic):
            raise TomogramError(f"{uri}: is compressed with {name}, so no slice can be read alone; {tool} it first")
    if len(data) < HEADER_BYTES:
        raise TomogramError(f"{uri}: holds {len(data)} bytes, expected an MRC header of 1024; copy the file again")
    order = _byte_order(data, uri)
    words = struct.unpack_from(order + _WORDS, data)
    nx, ny, nz, mode = words[:4]
    axes, data_offset = words[16:19], HEADER_BYTES + words[23]
    if mode not in MODES:
        raise TomogramError(f"{uri}: is of MRC mode {mode}, expected {_SUPPORTED}; convert it")
    if axes not in ((1, 2, 3), (0, 0, 0)):  # some writers leave the axes zero
        raise TomogramError(f"{uri}: its axes are stored in the order {axes}, expected (1, 2, 3); convert it")
    if not HEADER_BYTES <= data_offset <= file_bytes:
        raise TomogramError(
            f"{uri}: its header claims to take {data_offset} bytes of the file's {file_bytes}; copy the file again"
        )
    spacing = voxel_spacing_angstrom or _spacing(words, uri)
    stamp, flags = struct.unpack_from(order + "2i", data, 152)
    return MrcHeader(
        shape=(nz, ny, nx),
        dtype=np.dtype(MODES[mode]).newbyteorder(order),
        data_offset=data_offset,
        file_bytes=file_bytes,
        bytes_signed=bool(flags & 1) if stamp == _IMOD_STAMP else None,
        voxel_spacing_angstrom=spacing,
    )


def _bytes_are_signed(header: MrcHeader, settings: ArchiveSettings) -> bool:
    """Whether mode 0 is read as int8. Where nobody says so it is not: signed bytes then show, by wrapped values."""
    if settings.mrc_mode_0 != "auto":
        return settings.mrc_mode_0 == "int8"
    return bool(header.bytes_signed)


def _byte_order(data: bytes, uri: str) -> Literal["<", ">"]:
    """The order in which the header makes sense, the machine stamp's first: the stamp is sometimes wrong."""
    orders: tuple[Literal["<", ">"], ...] = (">", "<") if data[212] == 0x11 else ("<", ">")
    for order in orders:
        nx, ny, nz, mode = struct.unpack_from(order + "4i", data)
        if all(0 < edge <= MAX_EDGE for edge in (nx, ny, nz)) and 0 <= mode < 256:
            return order
    nx, ny, nz, mode = struct.unpack_from(orders[0] + "4i", data)
    raise TomogramError(
        f"{uri}: is not an MRC file: its header gives {nx} x {ny} x {nz} voxels of mode {mode}, expected edges of 1 to "
        f"{MAX_EDGE} and mode {_SUPPORTED}"
    )


def _spacing(words: tuple[float, ...], uri: str) -> float | None:
    """Voxel spacing from the cell's edges and the grid's counts, the mean of the axes that are known."""
    edges = [length / count if count > 0 else 0.0 for length, count in zip(words[10:13], words[7:10], strict=True)]
    known = [edge for edge in edges if math.isfinite(edge) and edge > 0 and not math.isclose(edge, 1, abs_tol=1e-4)]
    if known and max(known) > 1.01 * min(known):
        size = " x ".join(f"{edge:g}" for edge in edges)
        raise TomogramError(
            f"{uri}: its voxels are {size} angstrom (x, y, z), expected cubes; "
            "resample it, or state the true spacing as --archive.voxel-spacing-angstrom"
        )
    # Six digits are what float32 holds: 13.328, not 13.32800006866455.
    return float(f"{sum(known) / len(known):.6g}") if known else None
