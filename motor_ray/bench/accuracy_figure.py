"""The picture of the accuracy benchmark: what F2 costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from motor_ray.bench.accuracy_rows import ROWS, Role
from motor_ray.bench.accuracy_table import Line
from motor_ray.motors.picture import BLACK, BLUE, GREEN, PURPLE, VERMILION, write_picture

KINDS: dict[Role, tuple[str, str, str]] = {
    "peer": ("other detectors", VERMILION, "s"),
    "seed": ("seed's model", BLACK, "D"),
    "single": ("+ one part, or all", BLUE, "o"),
    "light": ("light", GREEN, "v"),
    "ensemble": ("ensembles", PURPLE, "^"),
}
"""Of each role: what the legend calls it, colour and mark."""


def accuracy_figure(uri: str, lines: Sequence[Line]) -> None:
    """Write a PNG of F2 on the test against CPU time per slice, one point per row, its deviation over seeds as a bar.

    Rows that were not timed are left out. Raises StorageError if `uri` cannot be written.
    """
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axis = figure.subplots()
    shown = [line for line in lines if line.milliseconds and line.scores["f2"]]
    for role, (title, colour, mark) in KINDS.items():
        own = [line for line in shown if line.role == role]
        if own:
            _points(axis, own, title, colour, mark)
    axis.set_xscale("log")
    _label(axis, shown)
    _finish(axis, shown)
    write_picture(uri, figure)


def _points(axis: Axes, lines: Sequence[Line], title: str, colour: str, mark: str) -> None:
    means = [one.mean for line in lines if (one := line.scores["f2"])]
    deviations = [one.deviation or 0.0 for line in lines if (one := line.scores["f2"])]
    times = [line.milliseconds or np.nan for line in lines]
    axis.errorbar(
        times, means, deviations, fmt=mark, color=colour, markersize=7, elinewidth=1, capsize=2, alpha=0.9, label=title
    )


def _label(axis: Axes, lines: Sequence[Line]) -> None:
    """A name right of each point; names that would lie upon one another are moved apart, and a line leads back."""
    if not lines:
        return
    places = sorted(((line.scores["f2"].mean, line) for line in lines if line.scores["f2"]), key=lambda one: one[0])  # type: ignore[union-attr]
    low, high = axis.get_ylim()
    step = (high - low) / 26
    taken: list[tuple[float, float]] = []
    for value, line in places:
        time, height = line.milliseconds or np.nan, value
        while any(abs(height - other) < step and abs(np.log(time / where)) < 1.1 for where, other in taken):
            height += step / 4
        taken.append((time, height))
        axis.annotate(
            ROWS[line.name].title,
            (time, value),
            xytext=(time * 1.06, height),
            va="center",
            fontsize=8,
            color=KINDS[line.role][1],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#B0B0B0"} if height > value + step / 2 else None,
        )


def _finish(axis: Axes, lines: Sequence[Line]) -> None:
    times = [line.milliseconds for line in lines if line.milliseconds]
    if times:
        axis.set_xlim(min(times) / 1.25, max(times) * 2.0)  # room for the names
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("CPU time per slice on one thread, ms")
    axis.set_ylabel("F2 on the test tomograms")
    axis.set_title("Simulated tomograms; mean and standard deviation over seeds", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.5, alpha=0.35)
    if lines:
        axis.legend(loc="lower right", frameon=False, fontsize=8)
