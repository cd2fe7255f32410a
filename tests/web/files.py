"""Files for the page, and what it should make of them."""

import base64
from pathlib import Path
from typing import Any

import cv2
import mrcfile
import numpy as np
from numpy.typing import NDArray

SHAPE = (30, 20, 24)
"""z, y, x."""

SPACING = 13.1


def volume(dtype: str = "i2") -> NDArray[Any]:
    """Each voxel's value says where it is, and some are negative where the type has such."""
    z, y, x = np.indices(SHAPE)
    values: NDArray[Any] = 3 * z + 2 * y + x - (0 if np.dtype(dtype).kind == "u" else 60)
    return values.astype(dtype)


def write_mrc(
    path: Path, values: NDArray[Any], *, extended: int = 0, spacing: float | tuple[float, ...] = SPACING
) -> Path:
    """`values` as MRC, in their own byte order, with so many bytes of extended header."""
    with mrcfile.new(path, overwrite=True) as file:
        file.set_extended_header(np.full(extended, b"\x7f", dtype="S1"))
        file.set_data(values)
        file.voxel_size = spacing
    return path


def picture(kind: str, values: NDArray[Any], *options: int) -> bytes:
    """`values` as the bytes of an image file."""
    done, data = cv2.imencode(kind, values, options)
    assert done
    return data.tobytes()


def drop(page: Any, name: str, data: bytes, kind: str = "") -> None:
    """As if the file came from the desktop."""
    script = """([name, type, data]) => {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type }));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, [name, kind, base64.b64encode(data).decode()])
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})


def pixels(page: Any) -> NDArray[np.uint8]:
    """`(y, x)` grey levels on the canvas."""
    script = """() => {
        const canvas = document.getElementById("canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.height, canvas.width, Array.from(data.filter((_, i) => i % 4 === 0))];
    }"""
    height, width, levels = page.evaluate(script)
    return np.array(levels, np.uint8).reshape(height, width)


def as_drawn(page: Any, values: NDArray[Any]) -> NDArray[np.float64]:
    """`values` as grey levels, by where the contrast's sliders stand."""
    low, high = (float(page.locator(slider).input_value()) for slider in ("#low", "#high"))
    return np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255
