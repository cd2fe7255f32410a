"""What people look at: the check of the training data, and slices with found and true motors.

Draws arrays; knows neither archives nor models.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from motor_ray.motors.picture import GREY, ORANGE, SKY, write_picture

FOUND = ORANGE
TRUE = SKY
"""Bright on grey."""

BAR_ANGSTROM = 1000.0
"""Length of the scale bar: 100 nm."""

OUTSIDE = 170
"""Grey level of what lies beyond a slice."""

NONE = {
    "found": "no motor was found",
    "missed": "no motor was missed",
    "false": "nothing was taken for a motor that is none",
}
"""What is said of a group without motors."""

PANEL_INCHES = 2.6
"""Edge of a panel of the page of a validation."""

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
    write_picture(uri, figure)


def motors_figure(uri: str, panels: Sequence[MotorsPanel], columns: int = 3, crosses: str = "true") -> None:
    """Write a PNG with a grid of slices, found motors circled with their score and true ones crossed.

    `crosses` is what the crosses are said to be.

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
    _draw_keys(figure, crosses)
    write_picture(uri, figure)


def validation_page(
    uri: str,
    found: Sequence[MotorsPanel],
    missed: Sequence[MotorsPanel],
    false: Sequence[MotorsPanel],
    counts: Mapping[str, int],
) -> None:
    """Write a PNG with a row each of found, missed and false motors; without any there are words instead.

    `counts` says how many there are in all, as ``found``, ``missed`` and ``false``. Raises StorageError if `uri` cannot
    be written.
    """
    groups = {"found": found, "missed": missed, "false": false}
    columns = max(3, *map(len, groups.values()))
    heights = [PANEL_INCHES + 0.75 if panels else 0.7 for panels in groups.values()]
    figure = Figure(figsize=(PANEL_INCHES * columns, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
    for part, (name, panels) in zip(parts, groups.items(), strict=True):
        _draw_group(part, name, panels, counts[name], columns)
    _draw_keys(figure)
    write_picture(uri, figure)


def close_up(panel: MotorsPanel, y: float, x: float, edge: float) -> MotorsPanel:
    """`edge` voxels high and wide of a panel, with (y, x) in the middle, and the motors there; light grey outside."""
    size = max(round(edge), 1)
    corner = np.rint(np.array([y, x]) - (size - 1) / 2).astype(int)
    image = np.full((size, size), OUTSIDE, np.uint8)
    first = np.maximum(corner, 0)
    last = np.maximum(np.minimum(corner + size, panel.image.shape), first)
    (top, left), (bottom, right) = first - corner, last - corner
    image[top:bottom, left:right] = panel.image[first[0] : last[0], first[1] : last[1]]

    def on_it(motors: NDArray[np.floating]) -> NDArray[np.floating]:
        places = motors[:, :2] - corner
        inside = ((places > -0.5) & (places < size - 0.5)).all(axis=1)
        return np.asarray(np.hstack([places, motors[:, 2:]])[inside])

    return panel._replace(image=image, true_yx=on_it(panel.true_yx), found=on_it(panel.found))


def _draw_group(part: SubFigure, name: str, panels: Sequence[MotorsPanel], count: int, columns: int) -> None:
    if not panels:
        words = f"{name}: {count}, on slices that cannot be read" if count else NONE[name]
        part.text(0.5, 0.5, words, ha="center", va="center", fontsize=12, color=GREY)
        return
    shown = "" if count == len(panels) else f", of which {len(panels)} are shown"
    part.suptitle(f"{name}: {count}{shown}", fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes = part.subplots(1, columns, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()


def _draw_keys(figure: Figure, crosses: str = "true") -> None:
    keys = [_key("o", FOUND, "found, with score"), _key("+", TRUE, crosses)]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=11, frameon=False)


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
