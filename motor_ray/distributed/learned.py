"""What a checkpoint has learned after training, as detection uses it: a threshold, and a second look at candidates."""

import logging
from typing import Any, NamedTuple

from motor_ray.config import RunSettings
from motor_ray.detector.description import CALIBRATION, RESCORED_CALIBRATION, Ensemble, rescorer_hash
from motor_ray.motors.calibration import Calibration, calibration_at, origin_of
from motor_ray.motors.link import Rescore
from motor_ray.motors.neighbourhood import GEOMETRY, PRESENT, neighbourhoods
from motor_ray.storage import join

log = logging.getLogger(__name__)


class Learned(NamedTuple):
    """Of a checkpoint; None for what it has not learned."""

    calibration: dict[str, Any] | None
    rescorer_sha256: str | None
    rescore: Rescore | None

    def told(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"calibration": self.calibration, "rescorer_sha256": self.rescorer_sha256}

    def without_rescoring(self, models: Ensemble, out: str, settings: RunSettings) -> "Learned":
        """The same for the run under `out`, which was begun before the checkpoint had learned to re-score."""
        if self.rescore is None:
            return self
        log.warning(
            "%s: was begun without the features by which %s judges its candidates now, and goes on without; give "
            "another --out to have them re-scored",
            out,
            models.uris[0],
        )
        return Learned(_dumped(calibration_of(models, settings)), None, None)

    def settings_for(self, settings: RunSettings) -> RunSettings:
        """`settings` that keep the features by which candidates are judged."""
        if self.rescore is None:
            return settings
        return settings.model_copy(update={"detect": settings.detect.model_copy(update={"features": True})})


def learned_of(models: Ensemble, settings: RunSettings) -> Learned:
    """What a checkpoint at work with these settings has learned; of several together nothing is known.

    Raises CheckpointError or ConfigError if it is damaged.
    """
    if len(models.uris) > 1:
        log.info("%d models answer together: what each alone has learned after training is not used", len(models.uris))
        return Learned(None, None, None)
    [uri] = models.uris
    rescorer = rescorer_hash(uri)
    if rescorer is None:
        return Learned(_dumped(calibration_of(models, settings)), None, None)
    calibration = calibration_at(join(uri, RESCORED_CALIBRATION), origin_of(settings, models.sha256, rescorer))
    return Learned(_dumped(calibration), rescorer, rescoring(uri, models.sha256))


def calibration_of(models: Ensemble, settings: RunSettings) -> Calibration | None:
    """The calibration of the scores of a single checkpoint as it is, without re-scoring."""
    if len(models.uris) > 1:
        return None
    return calibration_at(join(models.uris[0], CALIBRATION), origin_of(settings, models.sha256))


def _dumped(calibration: Calibration | None) -> dict[str, Any] | None:
    return calibration.model_dump(mode="json") if calibration else None


def rescoring(model: str, model_sha256: str) -> Rescore:
    """What the head in the checkpoint `model` makes of the candidates of a tomogram. Raises CheckpointError."""
    # Not at the top: who starts a run without re-scoring would wait 3 s for torch.
    from motor_ray.detector.inference import FEATURES
    from motor_ray.detector.rescore import load_rescorer

    head = load_rescorer(model, model_sha256, (PRESENT + 2 * FEATURES, len(GEOMETRY)))
    return lambda linked: head.score(*neighbourhoods(linked)).tolist()
