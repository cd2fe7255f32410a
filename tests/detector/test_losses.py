from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss

from motor_ray.config import LossSettings
from motor_ray.detector.losses import Targets, box_loss, centre_cross_entropy, centre_focal_loss, detection_loss
from motor_ray.detector.model import Prediction

HeatmapLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def targets_of(centres: list[tuple[int, int, int]], frames: int = 2, edge: int = 8) -> Targets:
    """Targets with a centre at each (frame, row, column)."""
    generator = torch.Generator().manual_seed(1)
    heatmap = torch.rand(frames, 1, edge, edge, generator=generator) * 0.9
    mask = torch.zeros(frames, 1, edge, edge)
    size, offset = torch.zeros(2, frames, 2, edge, edge)
    for frame, row, column in centres:
        heatmap[frame, 0, row, column] = mask[frame, 0, row, column] = 1
        size[frame, :, row, column] = 1 + 5 * torch.rand(2, generator=generator)
        offset[frame, :, row, column] = torch.rand(2, generator=generator)
    presence = mask.amax(dim=(1, 2, 3))
    return SimpleNamespace(heatmap=heatmap, mask=mask, size=size, offset=offset, presence=presence)


def prediction_for(targets: Targets, dtype: torch.dtype = torch.float32) -> Prediction:
    generator = torch.Generator().manual_seed(2)
    shapes = (targets.heatmap.shape, targets.size.shape, targets.offset.shape, targets.presence.shape)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return Prediction(*(part.requires_grad_() for part in parts))


def test_focal_loss_is_its_formula() -> None:
    targets = targets_of([(0, 1, 2), (0, 5, 5), (1, 3, 3)])
    logits = torch.randn_like(targets.heatmap)
    total = 0.0
    for logit, y in zip(logits.flatten().tolist(), targets.heatmap.flatten().tolist(), strict=True):
        p = torch.tensor(logit, dtype=torch.float64).sigmoid()
        term = p.log() * (1 - p) ** 2 if y == 1 else (1 - p).log() * p**2 * (1 - y) ** 4
        total -= float(term)
    assert centre_focal_loss(logits, targets.heatmap, targets.mask).item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("loss", [centre_focal_loss, centre_cross_entropy])
def test_without_a_centre_heatmap_losses_are_not_divided(loss: HeatmapLoss) -> None:
    logits, nothing = torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    p = logits.sigmoid()
    focus = p**2 if loss is centre_focal_loss else 1
    torch.testing.assert_close(loss(logits, nothing, nothing), -((1 - p).log() * focus).sum())


def test_a_faded_centre_is_that_share_of_a_hit_and_of_a_centre() -> None:
    target, mask = torch.tensor([1.0, 1.0, 0.3, 0.2]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    logits = torch.randn(4, dtype=torch.float64)
    p = logits.sigmoid()
    hits = -(p.log() * (1 - p) ** 2)
    misses = -((1 - p).log() * p**2)
    expected = (hits[0] + hits[1] + 0.3 * hits[2] + 0.7**4 * misses[2] + 0.8**4 * misses[3]) / 2.3
    torch.testing.assert_close(centre_focal_loss(logits, target, mask), expected, check_dtype=False)
    total = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="sum")
    torch.testing.assert_close(centre_cross_entropy(logits, target, mask), total / 2.3, check_dtype=False)


@pytest.mark.parametrize("loss", [centre_focal_loss, centre_cross_entropy])
def test_a_centre_that_has_all_but_faded_is_no_centre(loss: HeatmapLoss) -> None:
    logits, nothing = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask, faint = nothing.clone(), nothing.clone()
    mask[0, 0, 1, 2], faint[0, 0, 1, 2] = 1, 1e-9
    torch.testing.assert_close(loss(logits, faint, mask), loss(logits, nothing, nothing))


def test_the_fainter_a_centre_the_lower_the_probability_that_costs_least() -> None:
    logits = torch.linspace(-6, 6, 481)
    best = []
    for peak in (1.0, 0.6, 0.3, 0.1):
        costs = [float(centre_focal_loss(logit, torch.tensor([peak]), torch.ones(1))) for logit in logits[:, None]]
        best.append(float(logits[costs.index(min(costs))]))
    assert best == sorted(best, reverse=True)
    assert len(set(best)) == 4


def test_no_focus_and_hard_labels_give_plain_cross_entropy() -> None:
    logits = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    target = (torch.rand_like(logits) > 0.8).double()
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / target.sum()
    torch.testing.assert_close(centre_focal_loss(logits, target, target, alpha=0, beta=0), expected)
    torch.testing.assert_close(centre_cross_entropy(logits, target, target), expected)


def test_focal_loss_stays_finite_at_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = centre_focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_heatmaps_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        centre_focal_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 4, 4))


def test_box_loss_is_torchvisions_giou_of_the_boxes_in_frame_pixels() -> None:
    cells = torch.tensor([[3.0, 4.0], [10.0, 2.0], [6.0, 6.0]])
    size, true_size = 1 + 9 * torch.rand(3, 2), 1 + 9 * torch.rand(3, 2)
    offset, true_offset = 8 * torch.rand(3, 2), torch.rand(3, 2)

    def corners(size: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        y, x = (4 * (cells + offset)).T
        height, width = (4 * size).T
        return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)

    expected = generalized_box_iou_loss(corners(size, offset), corners(true_size, true_offset)).mean()
    torch.testing.assert_close(box_loss(size, offset, true_size, true_offset), expected)


def test_boxes_on_top_of_the_true_ones_cost_nothing_and_negative_sizes_cost_finitely() -> None:
    size, offset = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.2, 0.9]])
    assert box_loss(size, offset, size, offset).item() == pytest.approx(0, abs=1e-5)
    negative = torch.tensor([[-3.0, -4.0]], requires_grad=True)
    loss = box_loss(negative, offset, size, offset)
    loss.backward()
    assert loss.isfinite()
    assert negative.grad is not None
    assert negative.grad.isfinite().all()


@pytest.mark.parametrize("heatmap", ["focal", "bce"])
def test_gradients_of_the_whole_loss_are_those_of_finite_differences(heatmap: str) -> None:
    targets = targets_of([(0, 1, 2), (1, 0, 0), (1, 2, 1)], edge=3)
    exact = SimpleNamespace(**{name: part.double() for name, part in vars(targets).items()})
    settings = LossSettings.model_validate({"heatmap": heatmap})
    prediction = prediction_for(exact, torch.float64)
    with torch.no_grad():
        prediction.size.abs_().add_(0.5)

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        return detection_loss(Prediction(*parts), exact, settings)["total"]

    assert torch.autograd.gradcheck(loss, tuple(prediction))


def test_offset_and_size_are_compared_at_centres_only() -> None:
    targets = targets_of([(0, 1, 2), (1, 5, 4)])
    prediction = prediction_for(targets)
    parts = detection_loss(prediction, targets, LossSettings())
    for name in ("size", "offset"):
        predicted, true = getattr(prediction, name), getattr(targets, name)
        expected = ((predicted - true).abs() * targets.mask).sum() / (2 * targets.mask.sum())
        torch.testing.assert_close(parts[name], expected)
    with torch.no_grad():
        prediction.size[0, :, 7, 7] = torch.nan
    assert detection_loss(prediction, targets, LossSettings())["total"].isfinite()


def test_the_total_is_the_weighted_sum() -> None:
    weights = {"heatmap": 2.0, "offset": 3.0, "size": 0.5, "giou": 0.25, "presence": 7.0}
    targets = targets_of([(0, 1, 2)])
    parts = detection_loss(
        prediction_for(targets), targets, LossSettings(**{f"{name}_weight": weight for name, weight in weights.items()})
    )
    torch.testing.assert_close(parts["total"], sum((weights[name] * parts[name] for name in weights), torch.zeros(())))


@pytest.mark.parametrize("heatmap", ["focal", "bce"])
@pytest.mark.parametrize("frames", [1, 3])
def test_frames_without_motors_give_zero_box_losses_and_finite_gradients(heatmap: str, frames: int) -> None:
    targets = targets_of([], frames=frames)
    prediction = prediction_for(targets)
    parts = detection_loss(prediction, targets, LossSettings.model_validate({"heatmap": heatmap}))
    assert parts["size"] == parts["offset"] == parts["giou"] == 0
    parts["total"].backward()
    for part in prediction:
        assert part.grad is not None
        assert part.grad.isfinite().all()
    assert prediction.size.grad is not None
    assert (prediction.size.grad == 0).all()


def test_sixteen_bit_predictions_are_judged_in_float32() -> None:
    targets = targets_of([(0, 1, 2), (1, 5, 4)])
    coarse = prediction_for(targets, torch.bfloat16)
    exact = Prediction(*(part.detach().float() for part in coarse))
    with torch.autocast("cpu", torch.bfloat16):
        parts = detection_loss(coarse, targets, LossSettings())
    assert all(part.dtype == torch.float32 for part in parts.values())
    torch.testing.assert_close(parts, detection_loss(exact, targets, LossSettings()))
