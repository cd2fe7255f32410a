from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from motor_ray.detector import device, inference
from motor_ray.detector.inference import prepare
from motor_ray.detector.model import Detector, standardise
from motor_ray.errors import RunError

SmallModel = Callable[..., Detector]

OTHERS = [
    {"levels": 2},
    {"levels": 3, "attention": "cbam"},
    {"neck": "light", "levels": 3, "attention": "cbam"},
    {"neck": "deconvolution", "attention": "cbam"},
]
"""Networks that are not the default one."""

CPU = torch.device("cpu")


def frames_for(model: Detector, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, model.in_slices, 32, 64), generator=torch.manual_seed(3)).to(torch.uint8)


@pytest.mark.parametrize(
    ("backbone", "in_slices"), [("resnet18", 1), ("resnet18", 3), ("resnet50", 1), ("efficientnet_b3", 1)]
)
def test_folded_inference_equals_the_evaluated_model(small_model: SmallModel, backbone: str, in_slices: int) -> None:
    model = small_model(backbone, in_slices=in_slices)
    frames = frames_for(model)
    with torch.no_grad():
        expected = model(standardise(frames))
    found = prepare(model, CPU, mixed_precision=False)(frames)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def with_gates(model: Detector) -> Detector:
    """`model` with attention that is no longer the identity."""
    for name, parameter in model.named_parameters():
        if "attend" in name or "attention" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_folded_inference_equals_every_kind_of_network(small_model: SmallModel, changes: dict[str, Any]) -> None:
    model = with_gates(small_model(**changes))
    frames = torch.randint(0, 256, (2, 1, 80, 144), generator=torch.manual_seed(3)).to(torch.uint8)
    with torch.no_grad():
        expected = model(standardise(frames))
    found = prepare(model, CPU, mixed_precision=False)(frames)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    mixed = prepare(model, CPU)(frames)
    assert all(part.dtype == torch.float32 for part in mixed)
    torch.testing.assert_close(mixed.heatmap.sigmoid(), expected.heatmap.sigmoid(), atol=0.02, rtol=0)
    assert [part.shape[1:] for part in prepare(model, CPU)(frames[:0])] == [part.shape[1:] for part in mixed]


def test_features_are_a_projection_of_the_finest_cells_and_change_no_prediction(small_model: SmallModel) -> None:
    model = small_model()
    frames = frames_for(model, count=3)
    plain, seeing = (prepare(model, CPU, mixed_precision=False, features=asked) for asked in (False, True))
    [prediction], features = seeing.seen(frames)
    assert all(torch.equal(a, b) for a, b in zip(prediction, plain(frames), strict=True))
    assert features.shape == (3, inference.FEATURES, *prediction.heatmap.shape[2:])
    assert features.dtype == torch.float32
    assert plain.seen(frames).features.shape == (3, 0, *prediction.heatmap.shape[2:])
    again = prepare(model, CPU, mixed_precision=False, features=True).seen(frames).features
    assert torch.equal(features, again)  # what is trained on them holds for every process


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_every_kind_of_network_has_features(small_model: SmallModel, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    levels, features = prepare(model, CPU, features=True).seen(frames_for(model))
    assert features.shape[1:] == (inference.FEATURES, *levels[0].heatmap.shape[2:])


def test_a_random_projection_nearly_keeps_distances() -> None:
    points = torch.randn(40, 256, 1, 1, generator=torch.Generator().manual_seed(0))
    near = inference.random_projection(256)(points).flatten(1)
    far = torch.pdist(points.flatten(1))
    ratio = torch.pdist(near) / far / (inference.FEATURES / 256) ** 0.5
    assert 0.95 < float(ratio.mean()) < 1.05
    assert float(ratio.std()) < 0.2


def test_no_batch_normalisation_is_left(small_model: SmallModel) -> None:
    for backbone, neck in (("resnet18", "deconvolution"), ("efficientnet_b3", "pyramid")):
        folded = inference.FoldedDetector(small_model(backbone, neck=neck))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_mixed_precision_changes_scores_by_less_than_a_hundredth(small_model: SmallModel) -> None:
    model = small_model()
    frames = frames_for(model)
    exact = prepare(model, CPU, mixed_precision=False)(frames)
    mixed = prepare(model, CPU)(frames)
    assert all(part.dtype == torch.float32 for part in mixed)
    torch.testing.assert_close(mixed.heatmap.sigmoid(), exact.heatmap.sigmoid(), atol=0.01, rtol=0)
    torch.testing.assert_close(mixed.presence.sigmoid(), exact.presence.sigmoid(), atol=0.01, rtol=0)


def test_the_model_is_left_as_it_was(small_model: SmallModel) -> None:
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare(model, CPU)(frames_for(model))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frame_is_scored_alike_alone_and_in_company(small_model: SmallModel) -> None:
    model = small_model()
    predict, frames = prepare(model, CPU), frames_for(model, count=3)
    together = predict(frames)
    for number in range(3):
        alone = predict(frames[number : number + 1])
        assert all(torch.equal(a[0], t[number]) for a, t in zip(alone, together, strict=True))


def test_passes_of_several_frames_give_what_passes_of_one_give(
    small_model: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    frames = frames_for(model, count=5)
    one_by_one = prepare(model, CPU, mixed_precision=False)(frames)
    monkeypatch.setattr(inference, "frames_per_pass", lambda *_: 2)
    torch.testing.assert_close(prepare(model, CPU, mixed_precision=False)(frames), one_by_one, rtol=1e-4, atol=1e-4)


def test_no_frames_give_an_empty_prediction_of_the_usual_shape(small_model: SmallModel) -> None:
    model = small_model()
    empty = prepare(model, CPU)(torch.zeros(0, 1, 32, 64, dtype=torch.uint8))
    some = prepare(model, CPU)(frames_for(model))
    assert [part.shape[1:] for part in empty] == [part.shape[1:] for part in some]
    assert len(empty.presence) == 0


def test_compiling_without_a_compiler_is_refused(small_model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RunError, match=r"no compiler for the cpu.*--detect.compile off"):
        prepare(small_model(), CPU, compiled=True)


def test_the_cpu_talks_gloo_and_pins_nothing() -> None:
    assert device.ddp_backend(CPU) == "gloo"
    assert device.ddp_backend(torch.device("cuda")) == "nccl"
    assert not device.pins_memory(CPU)
    assert device.autocast_dtype(CPU) in (torch.bfloat16, torch.float32)
    assert device.pick_device().type in ("cpu", "cuda")


@pytest.mark.slow
@pytest.mark.skipif(not device.can_compile(CPU), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is its own affair
@pytest.mark.parametrize("changes", [{}, *OTHERS], ids=str)
def test_compiled_inference_equals_the_evaluated_model(small_model: SmallModel, changes: dict[str, Any]) -> None:
    model = with_gates(small_model(**changes))
    frames = frames_for(model, count=3)
    with torch.no_grad():
        expected = model(standardise(frames))
    predict = prepare(model, CPU, mixed_precision=False, compiled=True)
    torch.testing.assert_close(predict(frames), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predict(frames[:1]).presence, expected.presence[:1], rtol=1e-3, atol=1e-3)
