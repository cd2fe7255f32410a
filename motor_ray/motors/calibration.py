"""From which score on a tomogram has a motor, as a model's checkpoint and its runs say it.

Knows the file of it, but nothing else of a checkpoint; how it is learned is in `motor_ray.motors.calibrate`.
"""

import logging
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from motor_ray.config import RunSettings, Settings
from motor_ray.config_values import checked, flat
from motor_ray.storage import exists, read_json

Floats = NDArray[np.float64]

Method = Literal["fixed", "quantile", "fitted"]
"""How a threshold comes about: it is given; a share of a run's tomograms has no motor; it scored the best F2."""

FEW = 10
"""Tomograms of which scores say little about others."""

log = logging.getLogger(__name__)


BEARING_ON_SCORES = (
    "archive.repair",
    "archive.zarr_level",
    "detect.tta",
    "detect.ensemble",  # of views, too
    "detect.score_threshold",  # a slice without a detection counts 0
    "detect.exhaustive",  # a motor that is faint on all its slices may be missed from afar
    "detect.z_stride",
    "detect.candidate_score",
    "link.",
)
"""Beginnings of the settings that change the scores of motors."""


class Origin(NamedTuple):
    """What scores of tomograms come from."""

    model_sha256: str

    rescorer_sha256: str | None
    """Of the head that judged the model's candidates, if one did."""

    settings: dict[str, Any]
    """By their whole names, those that change the scores of a model's motors the most."""


def origin_of(settings: RunSettings, model_sha256: str, rescorer_sha256: str | None = None) -> Origin:
    """The origin of the scores of a model at work with these settings."""
    every = flat(settings.model_dump(mode="json"))
    return Origin(
        model_sha256, rescorer_sha256, {name: every[name] for name in every if name.startswith(BEARING_ON_SCORES)}
    )


class Calibration(Settings):
    """A threshold, and what it was worth on the tomograms that it was learned from."""

    method: Method

    threshold: float = Field(ge=0, le=1)
    """Tomogram score from which there is a motor; with `quantile` that of the tomograms it was learned from."""

    quantile: float | None = Field(ge=0, lt=1)
    """Share of a run's tomograms that has no motor; with `quantile` the threshold follows from each run's scores,
    unless these are so FEW that a share of them says nothing."""

    threshold_interval: tuple[float, float]
    """90 % of the thresholds that other draws of the tomograms gave."""

    f2: float
    """At the threshold, on the very tomograms that it was learned from: it flatters."""

    f2_interval: tuple[float, float]
    """90 % of F2 at this threshold on other draws; with `quantile` at each draw's own."""

    f2_out_of_bag: float | None
    """F2, all draws together, on the tomograms that were not drawn when the threshold was learned."""

    precision: float | None
    recall: float | None
    true_positives: int
    false_positives: int
    false_negatives: int
    n_tomograms: int
    n_with_motor: int

    radius_angstrom: float = Field(gt=0)
    """Within which an answer was right."""

    probability_slope: float = Field(ge=0)
    probability_intercept: float
    """A score s is a probability of 1 / (1 + exp(-(slope s + intercept))) that the tomogram has a motor."""

    threshold_by_probability: float | None
    """Score at which that probability is F2 / 5, where probabilities that are true ought to be cut (see
    `EvaluateSettings.threshold`): a second opinion, from a curve of two parameters. None if the curve is flat."""

    error_of_scores: float
    """Expected calibration error, if scores are taken for probabilities."""

    error_of_probabilities: float
    """The same of the probabilities."""

    model_sha256: str
    rescorer_sha256: str | None
    settings: dict[str, Any]
    """What the scores come from, see Origin."""

    def threshold_of(self, scores: Floats) -> float:
        """The threshold for a run with these ``(n,)`` scores of its tomograms, NaN where no motor was found."""
        few = len(scores) < FEW
        return self.threshold if self.quantile is None or few else quantile_threshold(scores, self.quantile)


def calibration_at(uri: str, origin: Origin) -> Calibration | None:
    """The calibration in the file `uri`, None if there is none or it is of another model's or head's scores.

    If it was learned with other settings it is taken, with a warning. Raises ConfigError if the file is not ours,
    StorageError if it cannot be read.
    """
    if not exists(uri):
        return None
    there = read_json(uri)
    found = checked(Calibration, there if isinstance(there, dict) else {}, uri)
    if (found.model_sha256, found.rescorer_sha256) != origin[:2]:
        log.warning("%s: is of another model or re-scoring, and not used; run motor-ray calibrate again", uri)
        return None
    differing = [
        f"{name} was {found.settings.get(name)}, is {value}"
        for name, value in origin.settings.items()
        if found.settings.get(name) != value
    ]
    if differing:
        log.warning("%s: was learned with other settings (%s); calibrate for these, too", uri, "; ".join(differing))
    return found


def quantile_threshold(scores: Floats, share: float) -> float:
    """The threshold below which `share` of the tomograms lie, whose ``(n,)`` scores are NaN where nothing was found."""
    ranked = np.sort(np.nan_to_num(scores))
    return float(ranked[min(round(share * len(ranked)), len(ranked) - 1)]) if len(ranked) else 0.0
