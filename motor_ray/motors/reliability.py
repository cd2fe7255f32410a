"""How far a tomogram's score can be believed, as a picture."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from motor_ray.motors.calibrate import BINS, Platt, bins_of, zero_where_nothing
from motor_ray.motors.calibration import Calibration
from motor_ray.motors.picture import BLUE, GREY, ORANGE, VERMILION, write_picture

Z = 1.645
"""Of a normal distribution 90 % lie within so many standard deviations of the mean."""

Floats = NDArray[np.float64]


def reliability_figure(uri: str, best: pd.DataFrame, calibration: Calibration) -> None:
    """Write a PNG: above, the share of tomograms with a motor by their score; below, how many tomograms that are.

    `best` is the table of `best_motors` that the calibration was learned from. A score that is a probability lies on
    the diagonal. Raises StorageError if `uri` cannot be written.
    """
    figure = Figure(figsize=(6.6, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    scores, has_motor = zero_where_nothing(best), best["has_motor"].to_numpy(dtype=bool)
    _draw_shares(above, scores, has_motor, calibration)
    _draw_counts(below, scores, has_motor)
    keys = [*above.get_legend_handles_labels()[0], *_draw_threshold(above, calibration)]
    _draw_threshold(below, calibration)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(linewidth=0.5, alpha=0.35)
        axis.set_axisbelow(True)
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    write_picture(uri, figure)


def wilson(hits: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Lower and upper ends of 90 % intervals for shares of `hits` in `counts` ``(n,)``, all above 0 (Wilson 1927)."""
    share, room = hits / counts, Z**2 / counts
    centre = (share + room / 2) / (1 + room)
    half = Z / (1 + room) * np.sqrt(share * (1 - share) / counts + room / (4 * counts))
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)


def _draw_shares(axis: Axes, scores: Floats, has_motor: NDArray[np.bool_], calibration: Calibration) -> None:
    bins = bins_of(scores)
    ones = np.ones(len(scores))
    counts, hits, sums = (np.bincount(bins, of, BINS).astype(np.float64) for of in (ones, has_motor, scores))
    filled = counts > 0
    counts, hits, means = counts[filled], hits[filled], sums[filled] / counts[filled]
    low, high = wilson(hits, counts)
    shares = hits / counts
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.4, label="a score that is a probability")
    steps = np.linspace(0, 1, 201)
    curve = Platt(calibration.probability_slope, calibration.probability_intercept)
    axis.plot(steps, curve(steps), color=ORANGE, linewidth=2, label="fitted probability")
    look: dict[str, Any] = {"fmt": "o", "color": BLUE, "markersize": 7, "elinewidth": 1.4, "capsize": 3}
    errors = [shares - low, high - shares]
    axis.errorbar(means, shares, yerr=errors, label="tomograms of like score, 90 % interval", zorder=3, **look)
    axis.set(ylabel="share with a motor", ylim=(-0.03, 1.03), xlim=(-0.02, 1.02))
    axis.set_title(
        f"{calibration.n_tomograms} tomograms, {calibration.n_with_motor} with a motor\n"
        f"expected calibration error: {calibration.error_of_scores:.2f} of scores, "
        f"{calibration.error_of_probabilities:.2f} of fitted probabilities",
        fontsize=10.5,
    )


def _draw_counts(axis: Axes, scores: Floats, has_motor: NDArray[np.bool_]) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    kinds = [scores[has_motor], scores[~has_motor]]
    labels = ["with a motor", "without"]
    axis.hist(kinds, bins=edges.tolist(), stacked=True, color=[BLUE, GREY], label=labels, alpha=0.8, rwidth=0.92)
    for number, count in enumerate(np.bincount(bins_of(scores), minlength=BINS).tolist()):
        place = ((number + 0.5) / BINS, count)
        axis.annotate(str(count or ""), place, (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axis.set(ylabel="tomograms", xlabel="score of the best motor; 0 where none was found")
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.margins(y=0.3)
    axis.legend(loc="upper center", frameon=False, ncols=2)


def _draw_threshold(axis: Axes, calibration: Calibration) -> list[Artist]:
    words = f"threshold {calibration.threshold:.2f} ({calibration.method}), F2 {calibration.f2:.2f}"
    line = axis.axvline(calibration.threshold, color=VERMILION, linewidth=1.8, label=words)
    low, high = calibration.threshold_interval
    return [line, axis.axvspan(low, high, color=VERMILION, alpha=0.13, linewidth=0, label="its 90 % interval")]
