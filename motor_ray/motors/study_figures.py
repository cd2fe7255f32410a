"""Pictures of studies: what each part of the recipe is worth, and how the score depends on each searched setting."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from motor_ray.motors.picture import BLUE, GREY, ORANGE, write_picture

ROOM = 0.04
"""Share of its width that a panel has left and right of the range that was searched."""


class VariantScores(NamedTuple):
    """What the trials of a variant scored."""

    title: str
    seeds: list[int]
    scores: list[float]


class Searched(NamedTuple):
    """A searched setting: its value in each trial, and the score."""

    title: str
    values: list[float]
    scores: list[float]
    done: list[bool]
    """False for trials that were stopped early."""

    range: tuple[float, float]
    logarithmic: bool

    given: float
    """The value that the search began with."""


def ablation_figure(uri: str, variants: Sequence[VariantScores], score: str) -> None:
    """Write a PNG with a bar for the mean of each variant and a point for each seed; a line joins those of a seed.

    Raises ValueError without variants, StorageError if `uri` cannot be written.
    """
    if not variants:
        raise ValueError("the figure of an ablation needs at least one variant")
    figure = Figure(figsize=(1.9 * len(variants) + 1.4, 3.8), layout="constrained")
    axis = figure.subplots()
    seeds = sorted({seed for variant in variants for seed in variant.seeds})
    for place, variant in enumerate(variants):
        if variant.scores:
            mean = float(np.mean(variant.scores))
            axis.bar(place, mean, width=0.55, color=BLUE, alpha=0.3)
            axis.annotate(f"{mean:.3f}", (place, 0), (0, 4), textcoords="offset points", ha="center", color=BLUE)
    for seed in seeds:
        own = [dict(zip(variant.seeds, variant.scores, strict=True)).get(seed, math.nan) for variant in variants]
        axis.plot(range(len(variants)), own, "o-", color=BLUE, markersize=5, linewidth=0.8, alpha=0.8)
    axis.set_xticks(range(len(variants)), [variant.title for variant in variants])
    axis.set_xlim(-0.6, len(variants) - 0.4)
    _finish(axis, score)
    axis.set_ylim(bottom=0)
    write_picture(uri, figure)


def tuning_figure(uri: str, settings: Sequence[Searched], score: str, columns: int = 3) -> None:
    """Write a PNG with a panel for each setting: the score of each trial over its value.

    Raises ValueError without settings, StorageError if `uri` cannot be written.
    """
    if not settings:
        raise ValueError("the figure of a search needs at least one setting")
    lines = math.ceil(len(settings) / columns)
    columns = math.ceil(len(settings) / lines)
    figure = Figure(figsize=(3.3 * columns, 2.8 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axis, setting in zip(axes, settings, strict=False):  # the last line may have room to spare
        _draw_setting(axis, setting)
    for axis in axes[len(settings) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        _finish(axis, score)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write_picture(uri, figure)


def _draw_setting(axis: Axes, setting: Searched) -> None:
    values, scores, done = np.array(setting.values), np.array(setting.scores), np.array(setting.done, dtype=bool)
    low, high = setting.range
    if setting.logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())  # in a range below a decade they run into one another
        room = (high / low) ** ROOM
        axis.set_xlim(low / room, high * room)
    else:
        room = (high - low) * ROOM
        axis.set_xlim(low - room, high + room)
    axis.axvline(setting.given, color=ORANGE, linewidth=1.2, label="as given")
    axis.plot(values[~done], scores[~done], "o", color=GREY, markersize=5, label="stopped early")
    axis.plot(values[done], scores[done], "o", color=BLUE, markersize=6, label="trained to the end")
    if done.any():
        best = int(np.argmax(np.where(done, scores, -np.inf)))
        axis.plot(
            values[best],
            scores[best],
            "o",
            color=BLUE,
            markersize=13,
            markerfacecolor="none",
            label="best",
        )
    axis.set_xlabel(setting.title)
    _finish(axis, "")


def _finish(axis: Axes, score: str) -> None:
    axis.set_ylabel(score)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.5, alpha=0.4)
