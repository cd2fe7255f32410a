"""Which findings of a model it may be taught as if they were labels, and what changed from one choice to the next.

Self-training (Lee 2013, "Pseudo-Label"; Xie et al. 2020, "Noisy Student", arXiv 1911.04252). Knows tables of motors.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from motor_ray.config import PseudoSettings
from motor_ray.motors.matching import match_all, match_motors, spacings_of

PLACE = ["z", "y", "x"]


class Limits(NamedTuple):
    """How many tomograms may be pseudo-labelled."""

    with_motor: int
    in_all: int


class Sure(NamedTuple):
    """From which scores on a model is believed."""

    positive: float
    """A motor that scores this much is one."""

    negative: float
    """A tomogram whose best motor scores less has none."""


class Choice(NamedTuple):
    """What is taken for true."""

    motors: pd.DataFrame
    """Motors that are believed: ``tomo_id, z, y, x, score``, in voxels."""

    doubtful: pd.DataFrame
    """Others of the same tomograms, of which nobody knows: the same columns."""

    negatives: tuple[str, ...]
    """Tomograms that are believed to hold no motor."""

    counts: dict[str, int]
    """Tomograms: ``looked_at``; ``sure_of_motors`` and ``sure_of_none`` before the limits; ``undecided``; and
    ``unreadable``, which are never believed to hold none."""

    best: dict[str, float]
    """Best score of each tomogram that was looked at, 0 without any motor."""

    @property
    def with_motor(self) -> list[str]:
        """Tomograms that are believed to hold a motor."""
        return sorted(set(self.motors["tomo_id"]))


class Changes(NamedTuple):
    """How a choice differs from the one before; tomograms, and motors of all tomograms."""

    tomograms_added: int
    tomograms_dropped: int
    tomograms_changed: int
    """Chosen both times, but with other motors, or with motors now and without then, or the other way round."""

    motors_added: int
    motors_dropped: int


def sure_scores(
    motors: pd.DataFrame,
    truth_motors: pd.DataFrame,
    truth_tomograms: pd.DataFrame,
    settings: PseudoSettings,
    radius_angstrom: float,
) -> Sure:
    """The scores of `settings`; those that it does not give are learned from labelled tomograms.

    `motors` are those found there, as for `choose`; one within the radius of a true one is true. If a model is never
    right often enough, the scores are such that nothing is believed.
    """
    seen = motors[motors["n_slices"] >= settings.min_slices].sort_values("score", ascending=False, ignore_index=True)
    is_true = np.zeros(len(seen), dtype=bool)
    is_true[match_all(seen, truth_motors, spacings_of(truth_tomograms), radius_angstrom).found] = True
    good = np.flatnonzero(np.cumsum(is_true) >= settings.precision * np.arange(1, len(seen) + 1))
    positive = settings.positive_score
    if positive is None:
        positive = float(seen["score"].iloc[good[-1]]) if len(good) else np.inf
    negative = settings.negative_score
    if negative is None:
        best = motors.groupby("tomo_id")["score"].max().reindex(truth_motors["tomo_id"].unique(), fill_value=0.0)
        lowest = math.floor(round((1 - settings.precision) * len(best), 6))  # 0.1 * 10 is less than 1 in binary
        negative = float(np.sort(best)[lowest]) if len(best) else 0.0
    return Sure(positive, min(negative, positive))


def choose(
    motors: pd.DataFrame,
    tomo_ids: Collection[str],
    unreadable: Collection[str],
    limits: Limits,
    sure: Sure,
    min_slices: int,
    seed: int,
) -> Choice:
    """The surest findings, within the limits; a motor must be seen on `min_slices`.

    `motors` are those found in the tomograms `tomo_ids`, ``tomo_id, z, y, x, score, n_slices``. Tomograms with the
    highest scores come first; of those without a motor the ones with the lowest best score, and of equal ones whichever
    come first when shuffled with `seed`, so that they are not all of one data set.
    """
    best: dict[str, float] = dict.fromkeys(sorted(tomo_ids), 0.0)
    best |= {str(name): float(score) for name, score in motors.groupby("tomo_id")["score"].max().items()}
    is_sure = (motors["score"] >= sure.positive) & (motors["n_slices"] >= min_slices)
    believed = motors[is_sure]
    positives = list(believed.sort_values(["score", "tomo_id"], ascending=[False, True])["tomo_id"].drop_duplicates())
    shuffled = np.random.default_rng(seed).permutation(np.array(list(best), dtype=object)).tolist()
    decided = set(positives) | set(unreadable)
    empty = [name for name in shuffled if best[name] < sure.negative and name not in decided]
    empty.sort(key=best.__getitem__)
    taken = set(positives[: limits.with_motor])
    negatives = empty[: max(limits.in_all - len(taken), 0)]
    doubtful = ~is_sure & (motors["score"] >= sure.negative) & motors["tomo_id"].isin(taken)
    columns = ["tomo_id", *PLACE, "score"]
    counts = {
        "looked_at": len(best),
        "sure_of_motors": len(positives),
        "sure_of_none": len(empty),
        "undecided": len(best) - len(positives) - len(empty) - len(set(unreadable) - set(positives)),
        "unreadable": len(set(unreadable)),
    }
    return Choice(
        _sorted(believed.loc[believed["tomo_id"].isin(taken), columns]),
        _sorted(motors.loc[doubtful, columns]),
        tuple(sorted(negatives)),
        counts,
        best,
    )


def compare_choices(
    before: Choice | None, now: Choice, spacings: Mapping[str, float], radius_angstrom: float
) -> Changes:
    """How `now` differs from `before`, None for nothing; motors within the radius of one another are the same."""
    if before is None:
        return Changes(len(now.with_motor) + len(now.negatives), 0, 0, len(now.motors), 0)
    was, is_now = ({*one.with_motor, *one.negatives} for one in (before, now))
    added = dropped = changed = 0
    for tomo_id in sorted(was | is_now):
        old, new = (_places(one.motors, tomo_id) * spacings[tomo_id] for one in (before, now))
        same = len(match_motors(new, old, radius_angstrom).found)
        added, dropped = added + len(new) - same, dropped + len(old) - same
        changed += tomo_id in was & is_now and max(len(old), len(new)) > same
    return Changes(len(is_now - was), len(was - is_now), changed, added, dropped)


def _places(motors: pd.DataFrame, tomo_id: str) -> NDArray[np.float64]:
    return motors.loc[motors["tomo_id"] == tomo_id, PLACE].to_numpy(np.float64)


def _sorted(motors: pd.DataFrame) -> pd.DataFrame:
    return motors.sort_values(["tomo_id", *PLACE], ignore_index=True)
