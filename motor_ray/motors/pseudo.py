"""Which findings of a model it may be taught as if they were labels, and what changed from one choice to the next.

Self-training (Lee 2013, "Pseudo-Label"; Xie et al. 2020, "Noisy Student", arXiv 1911.04252). Knows tables of motors.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from motor_ray.config import PseudoSettings
from motor_ray.motors.matching import match_motors

PLACE = ["z", "y", "x"]


class Limits(NamedTuple):
    """How many tomograms may be pseudo-labelled."""

    with_motor: int
    in_all: int


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


def choose(
    motors: pd.DataFrame,
    tomo_ids: Collection[str],
    unreadable: Collection[str],
    limits: Limits,
    settings: PseudoSettings,
    seed: int,
) -> Choice:
    """The surest findings, within the limits.

    `motors` are those found in the tomograms `tomo_ids`, ``tomo_id, z, y, x, score, n_slices``. Tomograms with the
    highest scores come first; of those without a motor the ones with the lowest best score, and of equal ones whichever
    come first when shuffled with `seed`, so that they are not all of one data set.
    """
    best: dict[str, float] = dict.fromkeys(sorted(tomo_ids), 0.0)
    best |= {str(name): float(score) for name, score in motors.groupby("tomo_id")["score"].max().items()}
    is_sure = (motors["score"] >= settings.positive_score) & (motors["n_slices"] >= settings.min_slices)
    sure = motors[is_sure]
    positives = list(sure.sort_values(["score", "tomo_id"], ascending=[False, True])["tomo_id"].drop_duplicates())
    shuffled = np.random.default_rng(seed).permutation(np.array(list(best), dtype=object)).tolist()
    decided = set(positives) | set(unreadable)
    empty = [name for name in shuffled if best[name] < settings.negative_score and name not in decided]
    empty.sort(key=best.__getitem__)
    taken = set(positives[: limits.with_motor])
    negatives = empty[: max(limits.in_all - len(taken), 0)]
    doubtful = ~is_sure & (motors["score"] >= settings.negative_score) & motors["tomo_id"].isin(taken)
    columns = ["tomo_id", *PLACE, "score"]
    counts = {
        "looked_at": len(best),
        "sure_of_motors": len(positives),
        "sure_of_none": len(empty),
        "undecided": len(best) - len(positives) - len(empty) - len(set(unreadable) - set(positives)),
        "unreadable": len(set(unreadable)),
    }
    return Choice(
        _sorted(sure.loc[sure["tomo_id"].isin(taken), columns]),
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
