"""The picture of the accuracy benchmark: what F2 costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from motor_ray.bench.accuracy_rows import ROWS, Role
from motor_ray.bench.accuracy_table import Line, mean
from motor_ray.motors.picture import BLACK, BLUE, GREEN, PURPLE, SKY, VERMILION, write_picture

KINDS: dict[Role, tuple[str, str, str]] = {
    "peer": ("other detectors", VERMILION, "s"),
    "seed": ("seed's model", BLACK, "D"),
    "single": ("+ one part, or all", BLUE, "o"),
    "more data": ("+ further tomograms", SKY, "P"),
    "light": ("light", GREEN, "v"),
    "ensemble": ("ensembles", PURPLE, "^"),
}
"""Of each role: what the legend calls it, colour and mark."""


NEAR = 1.3
"""Times that differ by a smaller factor share a column of names."""


def accuracy_figure(uri: str, lines: Sequence[Line]) -> None:
    """Write a PNG of F2 on the test against time per slice, one point per row, its deviation over seeds as a bar.

    Rows that were not timed are left out. Raises StorageError if `uri` cannot be written.
    """
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axis = figure.subplots()
    shown = [line for line in lines if line.milliseconds and line.score("f2")]
    for role, (title, colour, mark) in KINDS.items():
        own = [line for line in shown if line.role == role]
        if own:
            _points(axis, own, title, colour, mark)
    axis.set_xscale("log")
    axis.margins(y=0.1)  # names of the lowest may stand below them
    _label(axis, shown)
    _finish(axis, shown)
    write_picture(uri, figure)


def _points(axis: Axes, lines: Sequence[Line], title: str, colour: str, mark: str) -> None:
    means = [one.mean for line in lines if (one := line.score("f2"))]
    deviations = [one.deviation or 0.0 for line in lines if (one := line.score("f2"))]
    times = [line.milliseconds or np.nan for line in lines]
    axis.errorbar(
        times, means, deviations, fmt=mark, color=colour, markersize=7, elinewidth=1, capsize=2, alpha=0.9, label=title
    )


def _label(axis: Axes, lines: Sequence[Line]) -> None:
    """Names beside their points: of points that cost about the same in a column, a line leading back.

    The first column stands left of its points, where nothing else is; the others right of theirs.
    """
    low, high = axis.get_ylim()
    for number, group in enumerate(groups_of(lines)):
        times = [line.milliseconds or 0.0 for line in group]
        beside, side, end = (max(times) * 1.09, "left", 0.0) if number else (min(times) / 1.09, "right", 1.0)
        values = [mean(line, "f2") for line in group]
        for line, value, height in zip(group, values, spread(values, (high - low) / 27), strict=True):
            time = line.milliseconds or np.nan
            axis.annotate(
                ROWS[line.name].title,
                (time, value),
                xytext=(beside, height),
                va="center",
                ha=side,
                fontsize=8,
                color=KINDS[line.role][1],
                arrowprops={
                    "arrowstyle": "-",
                    "linewidth": 0.5,
                    "color": "#A0A0A0",
                    "shrinkA": 0,
                    "shrinkB": 4,
                    "relpos": (end, 0.5),
                },
            )


def groups_of(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines whose times are near one another, each group by F2."""
    groups: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.milliseconds or 0.0):
        if groups and (line.milliseconds or 0.0) < NEAR * (groups[-1][-1].milliseconds or 0.0):
            groups[-1].append(line)
        else:
            groups.append([line])
    return [sorted(group, key=lambda line: mean(line, "f2")) for group in groups]


def spread(values: Sequence[float], step: float) -> list[float]:
    """Heights in the order of `values`, ascending, at least `step` apart, and on average as high."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] + step) if heights else value)
    excess = float(np.mean(np.subtract(heights, values)))
    return [height - excess for height in heights]


def _finish(axis: Axes, lines: Sequence[Line]) -> None:
    times = [line.milliseconds for line in lines if line.milliseconds]
    if times:
        axis.set_xlim(min(times) / 2.4, max(times) * 2.2)  # room for the names
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("time per slice on one thread, ms")
    axis.set_ylabel("F2 on the test tomograms")
    axis.set_title("Simulated tomograms; mean and standard deviation over seeds", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.5, alpha=0.35)
    if lines:
        axis.legend(loc="lower right", frameon=False, fontsize=8)
