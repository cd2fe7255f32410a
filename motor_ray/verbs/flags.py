"""Groups of settings as flags of the verbs they concern."""

from typing import Any, ClassVar, Protocol

import tyro

from motor_ray.config import (
    ArchiveSettings,
    AugmentSettings,
    CareSettings,
    DetectSettings,
    EvaluateSettings,
    FrameSettings,
    LinkSettings,
    LossSettings,
    ModelSettings,
    PreprocessSettings,
    PretrainSettings,
    PseudoSettings,
    RunSettings,
    Settings,
    TargetSettings,
    TrainSettings,
)
from motor_ray.config_values import read_settings, settings_from

Result = tuple[dict[str, Any], int]
"""The JSON object of a verb, and its exit code."""


class Verb(Protocol):
    """A word of the command line: a dataclass of its options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self) -> Result:
        """Do it."""


class ArchiveFlags(Settings):
    """The settings that concern reading an archive."""

    archive: ArchiveSettings = ArchiveSettings()


class DetectFlags(ArchiveFlags):
    """The settings that concern detection with a trained model."""

    detect: DetectSettings = DetectSettings()
    link: LinkSettings = LinkSettings()


class FigureFlags(ArchiveFlags):
    """The settings that concern what the network is shown."""

    frame: FrameSettings = FrameSettings()
    preprocess: PreprocessSettings = PreprocessSettings()
    augment: AugmentSettings = AugmentSettings()
    targets: TargetSettings = TargetSettings()


class TrainFlags(FigureFlags):
    """The settings that concern training."""

    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    detect: DetectSettings = DetectSettings()
    link: LinkSettings = LinkSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


class PseudoFlags(TrainFlags):
    """The settings that concern pseudo-labels."""

    pseudo: PseudoSettings = PseudoSettings()


class PretrainFlags(FigureFlags):
    """The settings that concern pre-training."""

    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    pretrain: PretrainSettings = PretrainSettings()


class EvaluateFlags(Settings):
    """The settings that concern comparing with labels."""

    evaluate: EvaluateSettings = EvaluateSettings()


class CareFlags(ArchiveFlags):
    """The settings that concern the care of labels."""

    care: CareSettings = CareSettings()


Unprefixed = tyro.conf.arg(name="")
"""Groups of settings stand at the top: ``--detect.score-threshold``, not ``--settings.detect.score-threshold``."""


def all_settings(verb: Any) -> RunSettings:
    """Every setting of a run of `verb`: its flags', and its --config file's for groups that it has no flags for.

    Raises ConfigError if they contradict one another.
    """
    base = read_settings(verb.config) if verb.config else RunSettings()
    # Checked anew, for flags and file may be right by themselves and make no sense together.
    return settings_from(base.model_dump() | verb.settings.model_dump(), "flags")
