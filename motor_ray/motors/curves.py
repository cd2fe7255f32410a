"""How a training went, as a picture: its losses, its scores on held-out slices and its learning rate."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from motor_ray.motors.picture import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, write_picture
from motor_ray.motors.slice_metrics import MAP_IOUS

Line = Mapping[str, Any]
"""What a validation wrote down; a value that is not defined is None."""

PARTS = {"heatmap": VERMILION, "offset": SKY, "size": GREEN, "giou": PURPLE, "presence": ORANGE}
"""Parts of the loss, and their colours."""

SCORES = dict(zip([f"mAP@{iou:g}" for iou in MAP_IOUS], (1.0, 0.6, 0.35), strict=True))
"""Scores of slices, first the one that the best model is chosen by, and how strongly each is drawn."""

MANY = 40
"""With more points than this their line says enough."""


def training_curve(uri: str, lines: Sequence[Line], tomograms: Sequence[Line] = ()) -> None:
    """Write a PNG of how losses, scores and learning rate went.

    Parameters
    ----------
    uri
        Where to.
    lines
        Those of metrics.jsonl, at least one: ``epoch`` (from 0), ``step``, ``loss_total`` and the other losses,
        ``mAP@0.5`` and so on, ``learning_rate``. What is None or absent is not drawn.
    tomograms
        Scores of whole tomograms after some epochs: ``epoch`` and ``f2``.

    Raises ValueError without lines, StorageError if `uri` cannot be written.
    """
    if not lines:
        raise ValueError("the curve of a training needs at least one line of metrics")
    figure = Figure(figsize=(8.4, 8.6), layout="constrained")
    losses, scores, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.3))
    epochs = epochs_of(lines)
    _draw_losses(losses, epochs, lines)
    _draw_scores(scores, epochs, lines, tomograms)
    rates.plot(epochs, _values(lines, "learning_rate"), color=GREY, linewidth=1.8, marker=_marker(lines))
    room = 0.03 * np.ptp(epochs) or 0.5
    rates.set(ylabel="learning rate", xlabel="epochs", xlim=(epochs[0] - room, epochs[-1] + room))
    rates.set_ylim(0, 1.1 * np.nanmax(_values(lines, "learning_rate"), initial=1e-6))
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    rates.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for axis in (losses, scores, rates):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(linewidth=0.5, alpha=0.35)
    write_picture(uri, figure)


def epochs_of(lines: Sequence[Line]) -> NDArray[np.float64]:
    """How many epochs, not always whole, were done at each of `lines`; the last line of an epoch is its end."""
    ends = {line["epoch"]: line["step"] for line in lines}
    steps = [line["step"] for line in lines]
    return np.asarray(np.interp(steps, [0, *ends.values()], [0, *(epoch + 1 for epoch in ends)]))


def _draw_losses(axis: Axes, epochs: NDArray[np.float64], lines: Sequence[Line]) -> None:
    marker = _marker(lines)
    axis.plot(epochs, _values(lines, "loss_total"), color=BLACK, linewidth=2.4, marker=marker, label="total, weighted")
    for name, colour in PARTS.items():
        values = _values(lines, f"loss_{name}")
        axis.plot(epochs, values, color=colour, linewidth=1, marker=marker, markersize=4, label=name)
    # Some parts are hundreds of times as large as others.
    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel("training loss")
    _explain(axis)


def _draw_scores(axis: Axes, epochs: NDArray[np.float64], lines: Sequence[Line], tomograms: Sequence[Line]) -> None:
    for name, strength in SCORES.items():
        values = _values(lines, name)
        axis.plot(epochs, values, color=BLUE, alpha=strength, linewidth=1.8, marker=_marker(lines), label=name)
    if tomograms:
        ends = [line["epoch"] + 1 for line in tomograms]
        look: dict[str, Any] = {"color": ORANGE, "markersize": 7, "markeredgecolor": BLACK, "markeredgewidth": 0.6}
        axis.plot(ends, _values(tomograms, "f2"), "D", label="F2 of tomograms", clip_on=False, zorder=3, **look)
    _mark_best(axis, epochs, lines)
    axis.set(ylabel="validation", ylim=(0, 1.02))
    _explain(axis)


def _mark_best(axis: Axes, epochs: NDArray[np.float64], lines: Sequence[Line]) -> None:
    first = next(iter(SCORES))
    best = max(range(len(lines)), key=lambda number: [lines[number].get(name) or 0.0 for name in SCORES])
    score = lines[best].get(first)
    if score is None:
        axis.text(0.5, 0.5, "the validation slices show no motor", transform=axis.transAxes, ha="center", color=GREY)
        return
    ring: dict[str, Any] = {
        "markersize": 14,
        "markerfacecolor": "none",
        "markeredgecolor": VERMILION,
        "markeredgewidth": 2,
    }
    label = f"best: {score:.3f},\nepoch {lines[best]['epoch'] + 1}"
    axis.plot(epochs[best], score, "o", linestyle="", label=label, clip_on=False, zorder=4, **ring)


def _explain(axis: Axes) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, borderaxespad=0)


def _values(lines: Sequence[Line], name: str) -> NDArray[np.float64]:
    return np.array([line.get(name) for line in lines], dtype=np.float64)  # None becomes NaN


def _marker(lines: Sequence[Line]) -> str:
    return "o" if len(lines) <= MANY else ""
