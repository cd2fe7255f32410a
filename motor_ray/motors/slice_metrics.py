"""How good boxes on slices are: mAP, and precision, recall and F1 at one threshold.

Knows boxes, not where they come from. Boxes are ``(n, 4)`` arrays of centre y, x, height and width in pixels; a
value that is not defined is None.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from motor_ray.errors import MetricError
from motor_ray.motors.metrics import Counts

MAP_IOUS = (0.5, 0.7, 0.9)
"""Overlaps at which mAP is reported."""

Floats = NDArray[np.floating]


def mean_average_precision(found: Sequence[tuple[Floats, Floats]], truth: Sequence[Floats]) -> dict[str, float | None]:
    """``{"mAP@0.5": ..., "mAP@0.7": ..., "mAP@0.9": ...}``, as COCO defines it (101 recalls, 100 boxes per slice).

    `found` holds boxes and their ``(n,)`` scores per slice, `truth` the boxes of the same slices. All values are
    None when no slice has a true box. Raises MetricError if the two differ in length.
    """
    _check_lengths(found, truth)
    names = [f"mAP@{iou:g}" for iou in MAP_IOUS]
    if not any(len(boxes) for boxes in truth):
        return dict.fromkeys(names)  # torchmetrics would say -1
    # Imported here: it takes seconds, and nothing else in this room needs torch.
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    def tensors(boxes: Floats, **scores: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        return {"boxes": torch.from_numpy(corners(boxes).astype(np.float32)), "labels": labels, **scores}

    metric = MeanAveragePrecision(
        box_format="xyxy", backend="faster_coco_eval", iou_thresholds=list(MAP_IOUS), extended_summary=True
    )
    for (boxes, scores), true in zip(found, truth, strict=True):
        if len(boxes) or len(true):  # a slice with neither changes nothing
            metric.update([tensors(boxes, scores=torch.tensor(scores, dtype=torch.float32))], [tensors(true)])
    precisions = metric.compute()["precision"][:, :, 0, 0, -1]  # (ious, recalls) of the one class, any size
    return dict(zip(names, precisions.mean(dim=1).tolist(), strict=True))


def slice_scores(
    found: Sequence[tuple[Floats, Floats]], truth: Sequence[Floats], threshold: float, iou: float = 0.5
) -> dict[str, float | int | None]:
    """mAP, and precision, recall and F1 of the boxes with a score from `threshold` on; arguments as for mAP.

    A box is right if it overlaps a true box by at least `iou` that no better box has taken.
    """
    _check_lengths(found, truth)
    hits = n_found = n_true = 0
    for (boxes, scores), true in zip(found, truth, strict=True):
        order = np.argsort(-scores, kind="stable")
        kept = boxes[order[scores[order] >= threshold]]
        hits += count_hits(kept, true, iou)
        n_found += len(kept)
        n_true += len(true)
    counts = Counts(hits, n_found - hits, n_true - hits).as_dict()
    del counts["f2"]  # the official metric's, of tomograms
    sizes = {"n_slices": len(truth), "n_boxes": n_true}
    return {**sizes, **mean_average_precision(found, truth), "threshold": threshold, **counts}


def count_hits(boxes: Floats, truth: Floats, iou: float) -> int:
    """How many of `boxes`, best first, each find a true box of their own with at least this overlap."""
    overlaps = box_iou(boxes, truth)
    hits = 0
    for row in range(len(boxes)):
        if len(truth) and overlaps[row].max() >= iou:
            overlaps[:, overlaps[row].argmax()] = -1
            hits += 1
    return hits


def box_iou(a: Floats, b: Floats) -> Floats:
    """``(n, m)`` intersection over union of ``(n, 4)`` and ``(m, 4)`` boxes; 0 for boxes without area."""
    a, b = corners(a)[:, None], corners(b)[None]
    edges = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = edges.clip(min=0).prod(axis=-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b)) - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


def corners(boxes: Floats) -> Floats:
    """``(n, 4)`` centre y, x, height, width to x and y of the first corner, then of the last."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    centre, half = boxes[:, [1, 0]], boxes[:, [3, 2]] / 2
    return np.hstack([centre - half, centre + half])


def _check_lengths(found: Sequence[object], truth: Sequence[object]) -> None:
    if len(found) != len(truth):
        raise MetricError(f"detections of {len(found)} slices and truth of {len(truth)}; expected the same slices")
