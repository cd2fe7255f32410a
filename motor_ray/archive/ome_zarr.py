"""Volumes in OME-Zarr groups (metadata 0.4 in Zarr 2, 0.5 in Zarr 3), and bare Zarr arrays.

Decoding chunks is the library's business; this knows which chunks a few slices lie in, so that each is fetched once
and few are held at a time. What the metadata say is `ome_metadata`'s business.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from motor_ray.archive.ome_metadata import coarseness_of, image_of, level_of, spacing_of
from motor_ray.config import ArchiveSettings
from motor_ray.errors import MotorRayError, OutageError, SliceCorruptError, SliceMissingError, TomogramError
from motor_ray.storage import failure, filesystem, open_source

BLOCK_BYTES = 64 * 2**20
"""How much is decoded at a time, more if a single chunk holds more. While it is decoded it takes up to three times as
much memory: compressed, as a chunk, and cut to the slices."""

MAX_EDGE = 65536
"""Volumes with a longer edge are refused before anything is allocated for them."""


class OmeZarrTomogram:
    """One level of an OME-Zarr group. Several threads may read it at once."""

    def __init__(
        self, uri: str, array: Any, voxel_spacing_angstrom: float | None = None, coarseness: float = 1.0
    ) -> None:
        self.uri = uri
        self.shape: tuple[int, int, int] = array.shape[-3:]
        self.voxel_spacing_angstrom = voxel_spacing_angstrom
        self.coarseness = coarseness
        """Edge of a voxel relative to the finest level's."""
        self.chunk_depth: int = min(array.chunks[-3], self.shape[0])
        """Slices that are stored together."""
        self._array = array
        self._first = (0,) * (array.ndim - 3)
        self._dtype = array.dtype.newbyteorder("=")
        # Chunks of an array with shards are parts of a shard, which is one object.
        self._object: tuple[int, int, int] = (array.shards or array.chunks)[-3:]

    def read_slice(self, z: int) -> np.ndarray:
        """`(y, x)` values of slice `z` in the stored type but this machine's byte order.

        Reads every chunk that holds the slice, that is `chunk_depth` slices. Raises what `read_slices` may return.
        """
        [values] = self.read_slices([z])
        if isinstance(values, MotorRayError):
            raise values
        return values

    def read_slices(self, zs: Sequence[int]) -> list[np.ndarray | MotorRayError]:
        """`(y, x)` values of each of `zs`, in order, fetching each chunk once.

        Beside the slices BLOCK_BYTES or one chunk is held. A chunk that is not there holds the fill value, as the
        format says. In place of a slice that cannot be had there is SliceMissingError for a z outside the volume,
        SliceCorruptError if a chunk of it cannot be decoded, StorageError if the storage refuses it; a chunk has
        `chunk_depth` slices, and all of these end alike. Raises OutageError if the storage does not answer.
        """
        inside = sorted({z for z in zs if 0 <= z < self.shape[0]})
        found = {z: values for layer in self._layers(inside) for z, values in self._read_layer(layer).items()}
        return [found[z] if z in found else self._outside(z) for z in zs]

    def _layers(self, zs: list[int]) -> Iterator[list[int]]:
        """`zs`, ascending, by layers of shards, or of chunks where the slices between them would be too many."""
        for layer in _grouped(zs, self._object[0]):
            together = self._unit_bytes(layer) <= BLOCK_BYTES
            yield from [layer] if together else _grouped(layer, self.chunk_depth)

    def _read_layer(self, zs: list[int]) -> dict[int, np.ndarray | MotorRayError]:
        slices = {z: np.empty(self.shape[1:], self._dtype) for z in zs}
        try:
            for rows, columns in self._blocks(zs):
                block = self._array[(*self._first, slice(zs[0], zs[-1] + 1), rows, columns)]
                for z, values in slices.items():
                    values[rows, columns] = block[z - zs[0]]
        except OutageError:
            raise
        except Exception as error:  # each codec has exceptions of its own
            layers = _grouped(zs, self.chunk_depth)
            if len(layers) > 1:  # of a shard: one by one, they show which is to blame
                return {z: values for layer in layers for z, values in self._read_layer(layer).items()}
            return {z: self._failed(z, error) for z in zs}
        return dict(slices)

    def _failed(self, z: int, error: Exception) -> MotorRayError:
        if isinstance(error, OSError):
            return failure(self.uri, f"slice {z} cannot be read", error)
        why = f"{type(error).__name__}: {error}"
        return SliceCorruptError(f"{self.uri}: slice {z} cannot be read ({why}); copy the chunk again")

    def _blocks(self, zs: list[int]) -> Iterator[tuple[slice, slice]]:
        """Parts of a slice, in whole objects, as rows and columns: of a few objects or, if they are large, of one."""
        (_, size_y, size_x), (_, unit_y, unit_x) = self.shape, self._object
        units = max(BLOCK_BYTES // self._unit_bytes(zs), 1)
        across = min(units, -(-size_x // unit_x))
        down = units // across
        for y in range(0, size_y, down * unit_y):
            for x in range(0, size_x, across * unit_x):
                yield slice(y, min(y + down * unit_y, size_y)), slice(x, min(x + across * unit_x, size_x))

    def _unit_bytes(self, zs: list[int]) -> int:
        """What one object takes in memory while `zs` are read from it."""
        _, y, x = map(min, self._object, self.shape)
        return max(zs[-1] + 1 - zs[0], self.chunk_depth) * y * x * int(self._dtype.itemsize)

    def _outside(self, z: int) -> SliceMissingError:
        return SliceMissingError(f"{self.uri}: there is no slice {z}; the slices are 0 to {self.shape[0] - 1}")


def open_ome_zarr(uri: str, settings: ArchiveSettings) -> OmeZarrTomogram:
    """Open level `settings.zarr_level` of the OME-Zarr group `uri`, 0 being the finest, or the bare Zarr array `uri`.

    A spacing stated in the settings is that of the finest level. Raises TomogramError if there is no such group, level
    or volume, or one that is not a real-valued z, y, x volume; StorageError if it cannot be read.
    """
    try:
        return _open_level(zarr.open(_SourceStore(uri, settings), mode="r"), uri, settings)
    except MotorRayError:
        raise
    except FileNotFoundError:
        raise TomogramError(f"{uri}: is not a Zarr group: it has no metadata; copy it again") from None
    except OSError as error:
        raise failure(uri, "cannot be read", error) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # whatever nonsense metadata can cause
        raise TomogramError(f"{uri}: cannot be opened as Zarr ({error}); copy it again") from None


class _SourceStore(FsspecStore):
    """Reads objects as all else of the archive is read: with the same clients, retries and errors."""

    def __init__(self, uri: str, settings: ArchiveSettings) -> None:
        files, path = filesystem(uri, settings)
        super().__init__(AsyncFileSystemWrapper(files, asynchronous=True), read_only=True, path=path)
        self._uri, self._source = uri.rstrip("/"), open_source(uri, settings)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object `key` or a span of it, None if it is not there."""
        if not isinstance(byte_range, RangeByteRequest | None):  # spans that begin or end at the end
            return await super().get(key, prototype, byte_range)
        span = (byte_range.start, byte_range.end) if byte_range else ()
        try:
            data = await asyncio.to_thread(self._source.read, f"{self._uri}/{key}", *span)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)


def _open_level(node: Any, uri: str, settings: ArchiveSettings) -> OmeZarrTomogram:
    level, stated = settings.zarr_level, settings.voxel_spacing_angstrom
    if isinstance(node, zarr.Array):
        if level:
            raise TomogramError(f"{uri}: is a single array and has no level {level}; leave out --archive.zarr-level")
        return OmeZarrTomogram(uri, _checked(node, uri), stated)
    image = image_of(node.attrs.asdict(), uri)
    array = _member(node, level_of(image, level, uri)["path"], uri)
    coarseness = coarseness_of(image, level, uri)
    spacing = stated * coarseness if stated else spacing_of(image, level, uri)
    return OmeZarrTomogram(uri, _checked(array, uri), spacing, coarseness)


def _member(group: zarr.Group, path: str, uri: str) -> Any:
    try:
        member = group[path]
    except KeyError:
        member = None
    if not isinstance(member, zarr.Array):
        raise TomogramError(f"{uri}: the array '{path}' that its metadata names is not there; copy it again")
    return member


def _checked(array: Any, uri: str) -> Any:
    if array.ndim < 3 or any(size != 1 for size in array.shape[:-3]) or 0 in array.shape:
        raise TomogramError(f"{uri}: has the shape {array.shape}, expected one volume (z, y, x); choose a single image")
    if max(array.shape) > MAX_EDGE:
        raise TomogramError(f"{uri}: claims to have the shape {array.shape}, expected edges of 1 to {MAX_EDGE}")
    if array.dtype.kind not in "iuf":
        raise TomogramError(f"{uri}: holds values of type {array.dtype}, expected integers or floats; convert it")
    return array


def _grouped(zs: Iterable[int], depth: int) -> list[list[int]]:
    layers: dict[int, list[int]] = {}
    for z in zs:
        layers.setdefault(z // depth, []).append(z)
    return list(layers.values())
