"""From which score on a tomogram has a motor: learned from a run on labelled tomograms.

Knows tables of motors and labels. What is judged is one answer per tomogram, its best motor, as in the official metric.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from motor_ray.config import USUAL_THRESHOLD
from motor_ray.errors import MetricError
from motor_ray.motors.calibration import FEW, Calibration, Method, Origin, quantile_threshold
from motor_ray.motors.metrics import Counts, count_tomograms, hits_and_alarms

Floats = NDArray[np.float64]

Rule = Callable[[pd.DataFrame], float]
"""The threshold that the table of `best_motors` gives."""

RESAMPLINGS = 1000
"""Sets of tomograms drawn with replacement from those at hand, to see how far a threshold depends on them."""

INTERVAL = (0.05, 0.95)

BINS = 10
"""Of scores from 0 to 1, in the expected calibration error and its picture."""

log = logging.getLogger(__name__)


class Platt(NamedTuple):
    """A logistic curve from score to probability."""

    slope: float
    intercept: float

    def __call__(self, scores: Floats) -> Floats:
        """``(n,)`` probabilities."""
        return np.asarray(expit(self.slope * scores + self.intercept))


def calibrate(
    best: pd.DataFrame,
    method: Method,
    radius_angstrom: float,
    *,
    origin: Origin,
    threshold: float = USUAL_THRESHOLD,
    quantile: float = 0.5,
    seed: int = 420,
) -> Calibration:
    """What the table of `best_motors` teaches; `threshold` counts with the method `fixed`, `quantile` with its own.

    `origin` says where the scores come from.

    Raises MetricError if all tomograms have a motor, or none has, or if no motor was found where one is.
    """
    _check(best, radius_angstrom)
    rules: dict[Method, Rule] = {
        "fixed": lambda _: threshold,
        "quantile": lambda drawn: quantile_threshold(_scores(drawn), quantile),
        "fitted": lambda drawn: best_threshold(drawn, radius_angstrom),
    }
    chosen = rules[method](best)
    draws = resample(best, rules[method], chosen if method == "fitted" else None, radius_angstrom, seed)
    counts = count_tomograms(best, chosen, radius_angstrom)
    curve = fit_platt(best)
    scores, has_motor = zero_where_nothing(best), best["has_motor"].to_numpy(dtype=bool)
    f2 = counts.f_beta(2) or 0.0
    return Calibration(
        method=method,
        threshold=chosen,
        quantile=quantile if method == "quantile" else None,
        threshold_interval=_interval(draws.thresholds),
        f2=f2,
        f2_interval=_interval(draws.f2),
        f2_out_of_bag=draws.left_out.f_beta(2),
        precision=counts.precision,
        recall=counts.recall,
        true_positives=counts.true_positives,
        false_positives=counts.false_positives,
        false_negatives=counts.false_negatives,
        n_tomograms=len(best),
        n_with_motor=int(has_motor.sum()),
        radius_angstrom=radius_angstrom,
        probability_slope=curve.slope,
        probability_intercept=curve.intercept,
        threshold_by_probability=_score_at(curve, f2 / 5),
        error_of_scores=expected_error(scores, has_motor),
        error_of_probabilities=expected_error(curve(scores), has_motor),
        **origin._asdict(),
    )


def best_threshold(best: pd.DataFrame, radius_angstrom: float) -> float:
    """The threshold with the best F2 in the table of `best_motors`, of equally good ones the highest.

    Every threshold between two answers scores the same; this is the one halfway between them, so that neither
    depends on a digit. Below the lowest answer there is 0.
    """
    hits, alarms = hits_and_alarms(best, radius_angstrom)
    answers = np.unique(np.concatenate([[0.0], hits, alarms]))
    right, wrong = (len(some) - np.searchsorted(np.sort(some), answers) for some in (hits, alarms))
    f2 = 5 * right / np.maximum(right + wrong + 4 * best["has_motor"].sum(), 1)
    at = len(answers) - 1 - int(np.argmax(f2[::-1]))
    middle = float(answers[max(at - 1, 0)] + answers[at]) / 2
    return middle if at and middle > answers[at - 1] else float(answers[at])


class Draws(NamedTuple):
    """What other draws of the tomograms would have given."""

    thresholds: Floats
    f2: Floats

    left_out: Counts
    """Of each draw's threshold on the tomograms that it left out, all draws together."""


def resample(best: pd.DataFrame, rule: Rule, chosen: float | None, radius_angstrom: float, seed: int) -> Draws:
    """The bootstrap over tomograms (Efron 1979): thresholds by `rule`, and F2 at `chosen` or else at those.

    A draw without motors, or of nothing else, teaches nothing and is made again.
    """
    rng = np.random.default_rng(seed)
    has_motor = best["has_motor"].to_numpy(dtype=bool)
    thresholds: list[float] = []
    f2: list[float] = []
    left_out = np.zeros(3, dtype=np.int64)
    while len(f2) < RESAMPLINGS:
        rows = rng.integers(len(best), size=len(best))
        if has_motor[rows].all() or not has_motor[rows].any():
            continue
        drawn = best.iloc[rows]
        thresholds.append(rule(drawn))
        counts = count_tomograms(drawn, thresholds[-1] if chosen is None else chosen, radius_angstrom)
        f2.append(counts.f_beta(2) or 0.0)
        others = best.iloc[np.setdiff1d(np.arange(len(best)), rows)]
        missed = count_tomograms(others, thresholds[-1], radius_angstrom)
        left_out += (missed.true_positives, missed.false_positives, missed.false_negatives)
    return Draws(np.array(thresholds), np.array(f2), Counts(*left_out.tolist()))


def fit_platt(best: pd.DataFrame) -> Platt:
    """The rising logistic curve from tomogram score to the probability of a motor (Platt 1999).

    Two parameters, because validation sets are small: isotonic regression would answer 0 and 1 there. Platt's own
    targets, a little off 0 and 1, keep it finite when the score tells the two kinds apart without error.
    """
    scores, has_motor = zero_where_nothing(best), best["has_motor"].to_numpy(dtype=bool)
    positive = int(has_motor.sum())
    target = np.where(has_motor, (positive + 1) / (positive + 2), 1 / (len(best) - positive + 2))

    def loss(curve: Floats) -> float:
        exponent = curve[0] * scores + curve[1]
        return float((np.logaddexp(0, exponent) - target * exponent).mean())

    found = minimize(loss, x0=[1.0, 0.0], method="L-BFGS-B", bounds=[(0, None), (None, None)])
    return Platt(*found.x.tolist())


def expected_error(predicted: Floats, happened: NDArray[np.bool_]) -> float:
    """By how much ``(n,)`` probabilities differ from what happened, on average over BINS (Guo et al. 2017)."""
    bins = bins_of(predicted)
    gap = np.bincount(bins, weights=predicted - happened, minlength=BINS)
    return float(np.abs(gap).sum() / len(predicted))


def bins_of(values: Floats) -> NDArray[np.int64]:
    """Which of BINS equal parts of 0 to 1 each value lies in."""
    return np.minimum((values * BINS).astype(np.int64), BINS - 1)


def zero_where_nothing(best: pd.DataFrame) -> Floats:
    """``(n,)`` scores, 0 where no motor was found."""
    return np.nan_to_num(_scores(best))


def _scores(best: pd.DataFrame) -> Floats:
    return best["score"].to_numpy(dtype=np.float64)


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, INTERVAL).tolist()
    return low, high


def _score_at(curve: Platt, probability: float) -> float | None:
    if not curve.slope or not 0 < probability < 1:
        return None
    return float(np.clip((logit(probability) - curve.intercept) / curve.slope, 0, 1))


def _check(best: pd.DataFrame, radius_angstrom: float) -> None:
    with_motor = int(best["has_motor"].sum())
    if with_motor in (0, len(best)):
        which = "all of them have a motor" if with_motor else "none of them has a motor"
        raise MetricError(
            f"{len(best)} labelled tomograms were looked at, and {which}: where to draw the line can only be learned "
            "from both kinds; detect in tomograms with and without motors"
        )
    if not len(hits_and_alarms(best, radius_angstrom)[0]):
        raise MetricError(
            f"in none of the {with_motor} tomograms with a motor the best detection lies within {radius_angstrom:g} "
            "angstrom of it, so every threshold is as bad; check that labels and tomograms belong together, or train on"
        )
    if len(best) < FEW:
        log.warning("only %d tomograms: look at the intervals before you rely on this threshold", len(best))
