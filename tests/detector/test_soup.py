from collections.abc import Callable

import torch
from torch import nn

from motor_ray.detector.model import Detector, standardise
from motor_ray.detector.soup import average_weights, take_statistics

SmallModel = Callable[..., Detector]


def test_floats_are_averaged_and_integers_are_the_firsts() -> None:
    states = [{"w": torch.tensor([value, -value]), "n": torch.tensor(count)} for value, count in ((1.0, 7), (4.0, 9))]
    mixed = average_weights(states)
    torch.testing.assert_close(mixed, {"w": torch.tensor([2.5, -2.5]), "n": torch.tensor(7)})


def test_many_small_weights_do_not_drown_in_rounding() -> None:
    weights = [{"w": torch.tensor([1.0])}, *({"w": torch.tensor([2.0**-24])} for _ in range(4096))]
    expected = (1.0 + 4096 * 2.0**-24) / 4097
    assert average_weights(weights)["w"].item() == torch.tensor(expected, dtype=torch.float32).item()


def test_a_network_averaged_with_itself_stays_as_it_is_to_the_last_bit(small_model: SmallModel) -> None:
    state = small_model().state_dict()
    mixed = average_weights([state] * 3)
    assert mixed.keys() == state.keys()
    assert all(torch.equal(mixed[name], tensor) and mixed[name].dtype == tensor.dtype for name, tensor in state.items())


def test_what_is_averaged_is_left_as_it_was(small_model: SmallModel) -> None:
    state = small_model().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    average_weights(iter([state, {name: tensor + 1 for name, tensor in state.items()}]))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_statistics_are_those_of_the_frames(small_model: SmallModel) -> None:
    model, frames = small_model(), torch.randint(0, 256, (6, 1, 32, 32), generator=torch.manual_seed(1)).to(torch.uint8)
    take_statistics(model, frames, 6)
    conv, norm = (
        next(module for module in model.backbone.modules() if isinstance(module, kind))
        for kind in (nn.Conv2d, nn.BatchNorm2d)
    )
    with torch.no_grad():
        seen = conv(standardise(frames).expand(-1, 3, -1, -1))
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not model.training
    assert not norm.training


def test_a_batch_that_is_not_full_does_not_count(small_model: SmallModel) -> None:
    model, frames = small_model(), torch.randint(0, 256, (5, 1, 32, 32), generator=torch.manual_seed(1)).to(torch.uint8)
    take_statistics(model, frames, 2)
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_statistics(model, frames[:4], 2)
    torch.testing.assert_close(model.state_dict(), found)
