"""Verbs that teach a trained detector more, from what it found in labelled tomograms."""

from dataclasses import dataclass
from typing import Annotated, Literal

from motor_ray.errors import ConfigError
from motor_ray.verbs.flags import EvaluateFlags, Result, Unprefixed, all_settings

QUANTILE = 0.55
"""Share of the tomograms that the best of the Kaggle challenge left out."""


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Learn from which score on a tomogram has a motor, for evaluate and export to go by."""

    detections: str
    """The --out of a finished `motor-ray detect` on labelled tomograms that the detector was not trained on, such as
    STORAGE/NAME/validation/best."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    model: str | None = None
    """Checkpoint folder that the run was made with; what is learned is kept there. Without it, it is only told."""

    method: Literal["fixed", "quantile", "fitted"] = "fitted"
    """The threshold with the best F2; or --evaluate.threshold; or the score that a share of each run's tomograms do not
    reach."""

    quantile: float | None = None
    """Of the method quantile: the share of a run's tomograms that has no motor; 0.55 when not given."""

    out: str | None = None
    """PNG file of the reliability plot; DETECTIONS/calibration.png when not given."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[EvaluateFlags, Unprefixed] = EvaluateFlags()

    def run(self) -> Result:
        """Calibrate."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.refining import calibrate_run
        from motor_ray.storage import join

        settings = all_settings(self).evaluate
        if settings.threshold is not None and self.method != "fixed":
            raise ConfigError(f"--evaluate.threshold is of --method fixed; {self.method} finds its own, leave it out")
        if self.quantile is not None and self.method != "quantile":
            raise ConfigError(f"--quantile is of --method quantile; leave it out with {self.method}")
        quantile = QUANTILE if self.quantile is None else self.quantile
        if not 0 <= quantile < 1:
            raise ConfigError(f"--quantile {quantile:g}: expected a share from 0 to below 1, such as {QUANTILE}")
        picture = self.out or join(self.detections, "calibration.png")
        labels = read_labels(self.labels)
        told = calibrate_run(
            self.detections, labels, settings, self.method, quantile, model=self.model, picture=picture
        )
        return told, 0


@dataclass(frozen=True, kw_only=True)
class Rescore:
    """Learn to tell motors from beads, vesicles and edges that were taken for one."""

    detections: str
    """The --out of a finished `motor-ray detect --detect.features` on labelled tomograms that the detector was not
    trained on."""

    labels: str
    """CSV file of motors in the columns of the Kaggle challenge."""

    model: str
    """Checkpoint folder that the run was made with; what is learned is kept there."""

    force: bool = False
    """Keep it even if it is no better on tomograms that it was not learned from."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[EvaluateFlags, Unprefixed] = EvaluateFlags()

    def run(self) -> Result:
        """Learn."""
        from motor_ray.archive.labels import read_labels
        from motor_ray.refining import rescore_run

        settings = all_settings(self).evaluate
        labels = read_labels(self.labels)
        return rescore_run(self.detections, labels, settings, model=self.model, force=self.force), 0
