"""The contestants of the accuracy benchmark, as data: what differs from the seed's model, and what each needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from motor_ray.bench.accuracy_archives import Changes, Sizes, archive_name, merged, settings_of, short_hash
from motor_ray.config import USUAL_THRESHOLD, RunSettings
from motor_ray.errors import ConfigError

Training = Literal["ours", "retinanet", "fcos", "yolo", "pretrained", "pseudo", "soup", "rescored", "none"]
"""Who learns what: 'soup' averages weights, 'rescored' looks twice, 'none' only looks, with models of other rows."""

LEARNED_BEFORE: tuple[Training, ...] = ("none", "rescored")
"""With models of other rows."""

Role = Literal["seed", "peer", "single", "more data", "light", "ensemble"]
"""'more data' learns from tomograms that others do not learn from, or for longer: no equal of theirs."""

PEERS = ("retinanet", "fcos", "yolo")

THREE_SLICES = {"in_slices": 3, "slice_step_angstrom": 40.0}
"""Settings of the network that sees 2.5-D."""

SCORING = 1
"""One more whenever linking or scoring changes what comes of the same looks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    title: str
    role: Role
    what: str
    """For the reader: what it is."""

    training: Training = "ours"
    changes: Changes = field(default_factory=dict)
    """Settings that differ from the seed's model's, or from those of the first of `of`."""

    of: tuple[str, ...] = ()
    """Rows that are done before, with the same seed, because their models are used."""

    times_longer: int = 1
    """So many times the epochs of the others."""

    version: int = 1
    """One more whenever the row's code changes what comes of it: results before are no longer any."""


ROWS: dict[str, Row] = {
    "plain": Row(
        title="plain CenterNet",
        role="peer",
        what="one transposed-convolution neck of stride 4, focal loss, L1 for size and offset, and nothing else: no "
        "GIoU, no presence; the same frames",
        changes={"model": {"neck": "deconvolution"}, "loss": {"giou_weight": 0.0, "presence_weight": 0.0}},
    ),
    "retinanet": Row(
        title="RetinaNet",
        role="peer",
        training="retinanet",
        what="torchvision's second version, on the same backbone",
        version=2,
    ),
    "fcos": Row(
        title="FCOS",
        role="peer",
        training="fcos",
        what="torchvision's, on the same backbone",
        version=2,
    ),
    "yolo": Row(
        title="YOLOv8s",
        role="peer",
        training="yolo",
        what="ultralytics' network and loss",
        changes={"detect": {"score_threshold": 0.001}},  # it scores low, and ultralytics' own validation begins there
    ),
    "seed": Row(title="seed's model", role="seed", what="the repository's defaults, on the backbone of all rows"),
    "seed-101": Row(
        title="seed's model, ResNet-101",
        role="seed",
        what="the repository's defaults, backbone included: what the light one is measured by",
        changes={"model": {"backbone": "resnet101"}},
    ),
    "uncalibrated": Row(
        title=f"seed's model, threshold {USUAL_THRESHOLD:g}",
        role="seed",
        training="none",
        of=("seed",),
        what="the usual threshold, where every other row's was learned on calibration tomograms",
        changes={"evaluate": {"threshold": USUAL_THRESHOLD}},
    ),
    "light": Row(
        title="light",
        role="light",
        what="a separable neck and heads of half the channels",
        changes={"model": {"neck": "light"}},
    ),
    "slices": Row(
        title="+ 2.5-D",
        role="single",
        what="sees the slices about 40 angstrom below and above, too",
        changes={"model": THREE_SLICES},
    ),
    "levels": Row(
        title="+ multi-scale",
        role="single",
        what="heads on P2, and on P3 for boxes of 64 pixels and more, which are those of the finer voxel spacings",
        changes={"model": {"levels": 2}},
    ),
    "cbam": Row(title="+ CBAM", role="single", what="attention", changes={"model": {"attention": "cbam"}}),
    "slices-cbam": Row(
        title="2.5-D, CBAM",
        role="single",
        what="the two together",
        changes={"model": {**THREE_SLICES, "attention": "cbam"}},
    ),
    "all": Row(
        title="2.5-D, multi-scale, CBAM",
        role="single",
        what="the three together",
        changes={"model": {**THREE_SLICES, "levels": 2, "attention": "cbam"}},
    ),
    "pretrained": Row(
        title="+ self-supervised start",
        role="more data",
        training="pretrained",
        what="the backbone has first learned, from as many frames without labels, to say what hidden parts show",
    ),
    "pseudo": Row(
        title="+ pseudo-labels",
        role="more data",
        training="pseudo",
        of=("seed",),
        what="the seed's model goes on with what it is sure of on unlabelled tomograms, for as many frames again",
        changes={"pseudo": {"min_slices": 2}},  # of every third slice, of which the usual 4 would be a whole motor's
    ),
    "longer": Row(
        title="2.5-D, twice as long",
        role="more data",
        what="2.5-D on the same tomograms, for about as many frames as the two rows above were shown",
        changes={"model": THREE_SLICES},
        times_longer=2,
    ),
    "rescored": Row(
        title="+ re-scoring",
        role="more data",
        training="rescored",
        of=("seed",),
        what="a small head, learned on calibration tomograms, judges what the seed's model linked",
        changes={"detect": {"features": True}},
    ),
    "slices-rescored": Row(
        title="2.5-D, re-scoring",
        role="more data",
        training="rescored",
        of=("slices",),
        what="the same of what 2.5-D linked",
        changes={"detect": {"features": True}},
    ),
    "tta": Row(
        title="+ TTA",
        role="ensemble",
        training="none",
        of=("seed",),
        what="the seed's model looks at each frame twice, as it is and mirrored",
        changes={"detect": {"tta": "fast"}},
    ),
    "snapshot": Row(
        title="+ snapshots",
        role="ensemble",
        what="three moments of one training with a cyclic learning rate answer together",
        changes={"train": {"schedule": "cyclic", "cycles": 3}},
    ),
    "soup": Row(title="+ soup", role="single", training="soup", of=("snapshot",), what="their weights, averaged"),
    "ensemble": Row(
        title="+ model ensemble",
        role="ensemble",
        training="none",
        of=("seed", "seed-101", "cbam"),
        what="the seed's model, the same on a ResNet-101, and CBAM answer together",
    ),
    "ensemble-all": Row(
        title="2.5-D ensemble, TTA",
        role="ensemble",
        training="none",
        of=("slices", "slices-cbam", "all"),
        what="2.5-D alone, with CBAM, and with all three parts answer together, each looking twice",
        changes={"detect": {"tta": "fast"}},
    ),
}
"""In the order of the table."""


class Keys(NamedTuple):
    """Short names of what comes of the steps of a row with a seed: equal if it is the same."""

    trained: str
    looked: str
    scored: str


AFTER_LOOKING = ("link", "evaluate")
"""Groups of settings that bear on neither training nor looking, in archives of known spacings and slices of one frame;
but on what pseudo-labels are."""


def keys_of(name: str, seed: int, sizes: Sizes) -> Keys:
    """The keys of a row with a seed; those of a step change with all that the steps before depend on."""
    row, settings = ROWS[name], _dumped(name, seed, sizes)
    before: list[Any] = [keys_of(one, seed, sizes).trained for one in row.of]
    asked = {group: own for group, own in settings.items() if group not in AFTER_LOOKING}
    if row.training == "pseudo":
        linked = [_dumped(one, seed, sizes) for one in row.of]
        before += [archive_name(sizes, "calibration"), linked, settings, SCORING]
    trained = short_hash([sizes.training, row.version, row.training, asked, before])
    looked = short_hash([trained, sizes.judging])
    return Keys(trained, looked, short_hash([looked, name, settings, SCORING]))


def _dumped(name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The settings of a row as JSON, but for those of verbs that the benchmark has no use for."""
    return settings_of_row(name, seed, sizes).model_dump(mode="json", exclude={"care"})


def settings_of_row(name: str, seed: int, sizes: Sizes) -> RunSettings:
    """All settings of a row with a seed: of its training, and of how it looks."""
    longer = {"train": {"epochs": ROWS[name].times_longer * sizes.epochs}}
    return settings_of(sizes, seed, merged(changes_of(name), longer))


def changes_of(name: str) -> Changes:
    """All settings in which a row differs from the seed's model."""
    row = ROWS[name]
    return merged(changes_of(row.of[0]) if row.of else {}, row.changes)


def chosen(names: tuple[str, ...]) -> tuple[str, ...]:
    """The rows of these names and those that they need, in the table's order; all without any.

    Raises ConfigError for an unknown one.
    """
    if unknown := sorted(set(names) - set(ROWS)):
        raise ConfigError(f"--parts {unknown[0]}: bench accuracy has the rows {', '.join(ROWS)}")
    wanted = set(names or ROWS)
    for name in reversed(ROWS):  # what a row needs stands before it
        wanted |= set(ROWS[name].of) if name in wanted else set()
    return tuple(name for name in ROWS if name in wanted)


def as_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What the rows are, for the report."""
    return {name: {"title": row.title, "role": row.role, "what": row.what} for name, row in rows.items()}
