"""The contestants of the accuracy benchmark, as data: what differs from the seed's model, and what each needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from motor_ray.bench.accuracy_archives import Changes, Sizes, merged, short_hash
from motor_ray.errors import ConfigError

Training = Literal["ours", "retinanet", "fcos", "yolo"]

Role = Literal["seed", "peer", "single", "light", "ensemble"]

PEERS = ("retinanet", "fcos", "yolo")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    title: str
    role: Role
    what: str
    """For the reader: what it is."""

    training: Training = "ours"
    changes: Changes = field(default_factory=dict)
    """Settings that differ from the seed's model's."""


ROWS: dict[str, Row] = {
    "plain": Row(
        title="plain CenterNet",
        role="peer",
        what="heatmap with focal loss, L1 for size and offset; no GIoU, no CLAHE, no noise and blur",
        changes={
            "preprocess": {"clahe": False},
            "augment": {"poisson_probability": 0.0, "blur_sigma_max": 0.0},
            "loss": {"giou_weight": 0.0, "presence_weight": 0.0},
        },
    ),
    "retinanet": Row(
        title="RetinaNet",
        role="peer",
        training="retinanet",
        what="torchvision's, on the same backbone",
        changes={"train": {"learning_rate": 3e-4}},
    ),
    "fcos": Row(
        title="FCOS",
        role="peer",
        training="fcos",
        what="torchvision's, on the same backbone",
        changes={"train": {"learning_rate": 3e-4}},
    ),
    "yolo": Row(title="YOLOv8s", role="peer", training="yolo", what="ultralytics' network and loss"),
    "seed": Row(title="seed's model", role="seed", what="the repository's own settings"),
}
"""In the order of the table."""


def key_of(name: str, seed: int, sizes: Sizes) -> str:
    """Equal for a row and seed of which the result is the same."""
    row = ROWS[name]
    return short_hash([sizes.key, name, row.training, merged({}, row.changes), seed])


def chosen(names: tuple[str, ...]) -> tuple[str, ...]:
    """The rows of these names in the table's order, all without any. Raises ConfigError for an unknown one."""
    if unknown := sorted(set(names) - set(ROWS)):
        raise ConfigError(f"--parts {unknown[0]}: bench accuracy has the rows {', '.join(ROWS)}")
    return tuple(name for name in ROWS if name in names or not names)


def as_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What the rows are, for the report."""
    return {name: {"title": row.title, "role": row.role, "what": row.what} for name, row in rows.items()}
