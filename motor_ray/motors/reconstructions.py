"""The picture of what a pre-trained network makes of slices: what it was shown, what it said, and the truth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from motor_ray.motors.picture import write_picture

TITLES = ("shown, parts hidden", "what the network says", "the truth, with its noise")

RANGE = 2.5
"""Deviations either side of the mean from black to white."""


class Restored(NamedTuple):
    """One row: z-scored frames ``(y, x)``."""

    title: str
    shown: NDArray[np.floating]
    said: NDArray[np.floating]
    truth: NDArray[np.floating]


def reconstruction_figure(uri: str, rows: Sequence[Restored]) -> None:
    """Write a PNG with a row per frame. Raises ValueError without rows, StorageError if `uri` cannot be written."""
    if not rows:
        raise ValueError("the picture of reconstructions needs at least one row")
    figure = Figure(figsize=(9.6, 3.1 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(TITLES), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for axis, image in zip(line, row[1:], strict=True):
            axis.imshow(image, cmap="gray", vmin=-RANGE, vmax=RANGE, interpolation="antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row.title, fontsize=9.5)
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=12)
    write_picture(uri, figure)
