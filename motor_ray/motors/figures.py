"""What people look at: the check of the training data, and slices with found and true motors.

Draws arrays; knows neither archives nor models. Uses matplotlib's objects, never pyplot, whose figures are global
state that outlives a call.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from motor_ray import storage

FOUND = "#E69F00"
TRUE = "#56B4E9"
"""Orange and sky blue of Okabe and Ito: told apart with any colour vision, and bright on grey."""

BAR_ANGSTROM = 1000.0
"""Length of the scale bar: 100 nm."""

DPI = 160

HALO = [withStroke(linewidth=2.8, foreground="black", alpha=0.75)]


class CheckRow(NamedTuple):
    """One row of the dataset check."""

    title: str
    raw: NDArray[np.uint8]
    """``(y, x)`` slice as stored."""

    augmented: NDArray[np.uint8]
    """``(h, w)`` frame as trained on."""

    heatmap: NDArray[np.floating]
    """``(h, w)`` target in [0, 1]."""

    raw_boxes: NDArray[np.floating]
    """``(n, 4)`` centre y, x, height, width on the slice."""

    augmented_boxes: NDArray[np.floating]
    """``(n, 4)`` the same on the frame."""


class MotorsPanel(NamedTuple):
    """One slice of the picture of motors; positions and lengths in its voxels."""

    title: str
    image: NDArray[np.uint8]
    """``(y, x)`` slice."""

    true_yx: NDArray[np.floating]
    """``(n, 2)`` labelled motors."""

    found: NDArray[np.floating]
    """``(n, 3)`` y, x and score of detected motors."""

    box_edge: float
    """Diameter of the circle around a found motor."""

    voxel_spacing_angstrom: float | None
    """None leaves out the scale bar."""


def dataset_check(uri: str, rows: Sequence[CheckRow]) -> None:
    """Write a PNG with a row per sample: raw slice, augmented frame and target heatmap, with their boxes.

    Raises ValueError without rows, StorageError if `uri` cannot be written.
    """
    if not rows:
        raise ValueError("the dataset check needs at least one row")
    figure = Figure(figsize=(9.6, 3.0 * len(rows) + 0.35), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (raw, augmented, heatmap) in zip(rows, axes, strict=True):
        raw.set_ylabel(row.title, fontsize=11)
        _show(raw, row.raw, "gray", 255)
        _show(augmented, row.augmented, "gray", 255)
        _draw_boxes(raw, row.raw_boxes)
        _draw_boxes(augmented, row.augmented_boxes)
        image = _show(heatmap, row.heatmap, "magma", 1)
    for axis, title in zip(axes[0], ("raw slice", "augmented frame", "target heatmap"), strict=True):
        axis.set_title(title, fontsize=12)
    bar = figure.colorbar(image, ax=axes[:, 2], shrink=0.6, aspect=30, pad=0.02, panchor=False)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1])
    _write(uri, figure)


def motors_figure(uri: str, panels: Sequence[MotorsPanel], columns: int = 3) -> None:
    """Write a PNG with a grid of slices, found motors circled with their score and true ones crossed.

    Raises ValueError without panels, StorageError if `uri` cannot be written.
    """
    if not panels:
        raise ValueError("the picture of motors needs at least one panel")
    lines = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / lines)
    height = max(panel.image.shape[0] / panel.image.shape[1] for panel in panels)
    size = (3.6 * columns, (3.6 * min(height, 1.6) + 0.3) * lines + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):  # the last line may have room to spare
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    keys = [_key("o", FOUND, "found, with score"), _key("+", TRUE, "true")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    _write(uri, figure)


def _draw_panel(axis: Axes, panel: MotorsPanel) -> None:
    axis.set_title(panel.title, fontsize=10.5)
    _show(axis, panel.image, "gray", 255)
    radius = panel.box_edge / 2
    for y, x, score in np.asarray(panel.found, dtype=float).reshape(-1, 3):
        angles = np.linspace(0, 2 * np.pi, 97)
        circle = (x + radius * np.cos(angles), y + radius * np.sin(angles))
        axis.plot(*circle, color=FOUND, linewidth=1.8, path_effects=HALO)
        above = y - radius * 1.12 > 0.08 * panel.image.shape[0]
        axis.text(
            np.clip(x, 0.06 * panel.image.shape[1], 0.94 * panel.image.shape[1]),
            y - radius * 1.12 if above else y + radius * 1.12,
            f"{score:.2f}",
            color=FOUND,
            fontsize=10,
            fontweight="bold",
            ha="center",
            va="bottom" if above else "top",
            path_effects=HALO,
        )
    true = np.asarray(panel.true_yx, dtype=float).reshape(-1, 2)
    axis.plot(true[:, 1], true[:, 0], "+", color=TRUE, markersize=11, markeredgewidth=2, path_effects=HALO)
    if panel.voxel_spacing_angstrom is not None:
        _draw_scale_bar(axis, panel.image.shape, BAR_ANGSTROM / panel.voxel_spacing_angstrom)


def _draw_scale_bar(axis: Axes, shape: tuple[int, ...], voxels: float) -> None:
    """100 nm in the lower left corner, if the slice is wide enough to hold it."""
    if voxels > 0.9 * shape[1]:
        return
    y, x = shape[0] * 0.95, shape[1] * 0.04
    axis.plot([x, x + voxels], [y, y], color="white", linewidth=3, solid_capstyle="butt", path_effects=HALO)
    label = axis.text(x, y - shape[0] * 0.015, f"{BAR_ANGSTROM / 10:g} nm", va="bottom", path_effects=HALO)
    label.set(color="white", fontsize=9.5)


def _draw_boxes(axis: Axes, boxes: NDArray[np.floating]) -> None:
    for y, x, height, width in np.asarray(boxes, dtype=float).reshape(-1, 4):
        corner = (x - width / 2, y - height / 2)
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=FOUND, linewidth=1.8, path_effects=HALO))


def _show(axis: Axes, image: NDArray[Any], cmap: str, highest: float) -> AxesImage:
    """The image and nothing around it; what is drawn later does not widen the view."""
    shown = axis.imshow(image, cmap=cmap, vmin=0, vmax=highest, interpolation="antialiased")
    axis.set(xticks=[], yticks=[], anchor="N", autoscale_on=False)
    axis.spines[:].set_visible(False)
    return shown


def _key(marker: str, colour: str, label: str) -> Line2D:
    nothing: list[float] = []
    look: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2.2}
    return Line2D(nothing, nothing, linestyle="", marker=marker, markeredgecolor=colour, label=label, **look)


def _write(uri: str, figure: Figure) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    storage.write_bytes(uri, picture.getvalue())
