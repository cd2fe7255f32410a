"""What the detection benchmark reads: JPEG slices that look like cryo-ET, in an S3 server, and tables that name them.

Many tomograms share one stack of slices: to fetch and decode them costs what it costs for slices of their own, but
the server has them in memory after the first.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motor_ray.bench.object_store import ObjectServer
from motor_ray.tables import MANIFEST

GRAIN, TEXTURE, SHADE = 25.0, 18.0, 30.0
"""Standard deviations, in grey levels, of noise, of what is as fine as ribosomes and of what is as large as cells."""

SPACING_ANGSTROM = 13.3
"""The commonest voxel spacing of the public data."""

UPLOADS = 8
"""Objects that are stored at the same time."""


def jpeg_slices(count: int, shape: tuple[int, int], jpeg_bytes: int) -> tuple[list[bytes], int]:
    """`count` different JPEG images of `shape` (y, x) pixels with about `jpeg_bytes` each, and their quality."""
    random = np.random.default_rng(0)
    encode = partial(_encode, next(_views(random, shape)))
    quality = quality_for(lambda quality: len(encode(quality)), jpeg_bytes)
    views = _views(np.random.default_rng(0), shape)
    return [_encode(next(views), quality) for _ in range(count)], quality


def quality_for(size_of: Callable[[int], int], wanted: int) -> int:
    """The JPEG quality, 1 to 100, at which `size_of` it, which grows with it, comes nearest to `wanted` bytes."""
    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda quality: abs(size_of(quality) - wanted))


def store_slices(server: ObjectServer, slices: list[bytes], name: str = "stack") -> str:
    """Put `slices` into the server's bucket; returns the URI of the stack, as a MANIFEST has it."""
    client = server.client()

    def put(z: int) -> None:
        client.put_object(Bucket=server.bucket, Key=f"{name}/slice_{z:04d}.jpg", Body=slices[z])

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(put, range(len(slices))))
    return f"s3://{server.bucket}/{name}/slice_{{z:04d}}.jpg"


def manifest_of(uri: str, shape: tuple[int, int, int], tomograms: int) -> pa.Table:
    """A MANIFEST of so many `tomograms`, all of them the stack `uri`, or its first slices, of `shape` (z, y, x)."""
    row = dict(zip(("size_z", "size_y", "size_x"), shape, strict=True)) | {
        "uri": uri,
        "format": "jpeg_stack",
        "voxel_spacing_angstrom": SPACING_ANGSTROM,
        "chunk_depth": None,
    }
    return pa.Table.from_pylist([row | {"tomo_id": f"bench_{n:05d}"} for n in range(tomograms)], schema=MANIFEST)


def _views(random: np.random.Generator, shape: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Different views of one large image: to draw every slice anew would take longer than to store it."""
    height, width = (2 * edge for edge in shape)
    grey = np.full((height, width), 128, np.float32)
    for sigma, deviation in ((1.5, GRAIN), (6.0, TEXTURE), (60.0, SHADE)):
        # Blurred on a coarser grid, because a wide blur takes long.
        step = max(int(sigma / 3), 1)
        noise = random.standard_normal((-(-height // step), -(-width // step)), np.float32)
        blurred = cv2.resize(cv2.GaussianBlur(noise, (0, 0), sigma / step), (width, height))
        grey += np.float32(deviation) * blurred / blurred.std()
    whole = np.clip(grey, 0, 255).astype(np.uint8)
    while True:
        y, x = (int(random.integers(edge + 1)) for edge in shape)
        yield np.ascontiguousarray(whole[y : y + shape[0], x : x + shape[1]])


def _encode(image: NDArray[np.uint8], quality: int) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
