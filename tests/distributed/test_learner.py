"""Optimisation of one model on this process, without Ray."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import TrainSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.model import build_model
from motor_ray.distributed.learner import Learner
from motor_ray.distributed.optimisation import NotFiniteError, learning_rate, prepared
from motor_ray.distributed.samples import Batch
from motor_ray.errors import ConfigError
from motor_ray.slices.targets import Targets, draw_targets


def changed(settings, group="train", **values):
    return settings_from(settings.model_dump() | {group: getattr(settings, group).model_dump() | values})


def learner_of(settings, seed=0):
    torch.manual_seed(seed)
    model = build_model(settings.model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # blocks that start as the identity would have no gradient if frozen
    return Learner(prepared(model, settings.train), settings, torch.device("cpu"))


def batch_of(settings, seed, frames=4, edges=(32.0,)):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (frames, 1, 96, 96), dtype=np.uint8))
    boxes = [np.array([[*rng.uniform(20, 70, 2), *[edges[frame % len(edges)]] * 2]]) for frame in range(frames)]
    drawn = [draw_targets(box, 96, settings.targets, settings.model.levels) for box in boxes]
    return Batch(images, Targets(*map(torch.stack, zip(*drawn, strict=True))), [f"{seed}/{n}" for n in range(frames)])


def weights(learner):
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


@given(st.sampled_from(["no", "sqrt", "linear"]), st.integers(1, 64))
def test_the_learning_rate_falls_from_its_peak_to_zero(scale, frames):
    train = TrainSettings(scale_learning_rate=scale)
    curve = [learning_rate(train, step / 50, frames) for step in range(50)]
    growth = {"no": 1, "sqrt": (frames / 4) ** 0.5, "linear": frames / 4}[scale]
    assert curve[0] == pytest.approx(train.learning_rate * growth)
    assert curve == sorted(curve, reverse=True)
    assert 0 < curve[-1] < 0.01 * curve[0]


def test_for_the_recipes_batch_the_learning_rate_is_the_recipes():
    assert learning_rate(TrainSettings(), 0.0, 4) == 2e-4
    assert learning_rate(TrainSettings(), 0.5, 4) == pytest.approx(1e-4)


def test_a_cyclic_schedule_starts_anew_with_every_cycle():
    once, cyclic = TrainSettings(epochs=20), TrainSettings(epochs=20, schedule="cyclic", cycles=5)
    for cycle in range(5):
        for within in (0.0, 0.3, 0.9):
            assert learning_rate(cyclic, (cycle + within) / 5, 4) == pytest.approx(learning_rate(once, within, 4))


def test_batches_that_are_accumulated_give_the_step_of_one_large_batch(settings):
    """With statistics that do not depend on the batch, and a centre in every frame."""
    settings = changed(settings, batch_norm="frozen", start_from="another run", mixed_precision=False)
    large = batch_of(settings, 1, frames=8)
    halves = [
        Batch(large.images[part], Targets(*(tensor[part] for tensor in large.targets)), large.slice_ids[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    one, two = learner_of(settings), learner_of(settings)
    losses = [one.step([large], 0.0), two.step(halves, 0.0)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_slices(settings):
    learner = learner_of(settings)
    before = weights(learner)
    good, bad = batch_of(settings, 1), batch_of(settings, 2)
    bad.targets.size[:] = torch.nan
    with pytest.raises(NotFiniteError, match="2/0, 2/1, 2/2, 2/3") as failure:
        learner.step([good, bad], 0.0)
    assert failure.value.slice_ids == bad.slice_ids
    parameters = dict(learner.model.named_parameters())
    assert all((before[name] == parameter).all() for name, parameter in parameters.items())


@pytest.mark.parametrize(
    "network",
    [
        {"neck": "deconvolution"},
        {"levels": 2},
        {"levels": 3, "attention": "cbam"},
        {"neck": "light", "levels": 3, "attention": "cbam"},
    ],
    ids=str,
)
def test_every_kind_of_network_learns_with_all_its_weights(settings, network):
    """Workers that share gradients would wait for ever for a weight without one."""
    learner = learner_of(changed(changed(settings, "model", **network), learning_rate=3e-3))
    batch = batch_of(learner.settings, 1, edges=(32.0, 80.0, 150.0))
    losses = [learner.step([batch], 0.0)["total"] for _ in range(12)]
    assert losses[-1] < 0.85 * losses[0]
    assert all(parameter.grad is not None for parameter in learner.model.parameters())
    with torch.no_grad():
        assert learner.kept.eval()(torch.randn(2, 1, 96, 96)).heatmap.shape == (2, 1, 24, 24)


def test_frozen_statistics_stay_as_they_are_while_other_weights_learn(settings):
    learner = learner_of(changed(settings, batch_norm="frozen", start_from="another run"))
    before = weights(learner)
    learner.step([batch_of(settings, 1)], 0.0)
    after = weights(learner)
    assert all((before[name] != after[name]).any() for name in before if name.endswith("conv1.weight"))
    norms = {name for name in before if ".bn" in name or "downsample.1" in name}
    assert norms
    assert all((before[name] == after[name]).all() for name in norms)
    assert any((before[name] != after[name]).any() for name in before.keys() - norms)


def test_what_is_kept_of_averaged_weights_lies_between_the_first_and_the_last(settings):
    learner = learner_of(changed(settings, ema_decay=0.5))
    learner.step([batch_of(settings, 1)], 0.0)
    first = copy.deepcopy(dict(learner.model.named_parameters()))
    learner.step([batch_of(settings, 2)], 0.0)
    kept = dict(learner.kept.named_parameters())
    for name, last in learner.model.named_parameters():
        torch.testing.assert_close(kept[name], (first[name] + last) / 2, msg=name)


def test_without_an_average_the_model_itself_is_kept(settings):
    learner = learner_of(settings)
    assert learner.kept is learner.model


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_learner_that_is_restored_takes_the_same_steps_to_the_last_bit(settings, decay):
    settings = changed(settings, ema_decay=decay)
    whole = learner_of(settings)
    whole.step([batch_of(settings, 1)], 0.1)
    file = io.BytesIO()
    torch.save({"weights": whole.model.state_dict(), **whole.state()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = learner_of(settings, seed=1)
    again.model.load_state_dict(state["weights"])
    again.restore(state)
    for learner in (whole, again):
        learner.step([batch_of(settings, 2)], 0.2)
    ends = [learner.model.state_dict() | learner.kept.state_dict(prefix="kept.") for learner in (whole, again)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_statistics_cannot_be_frozen_where_there_are_none(settings):
    with pytest.raises(ConfigError, match=r"a network from random weights cannot learn so"):
        changed(settings, batch_norm="frozen")


def test_cycles_that_do_not_divide_the_epochs_are_refused():
    with pytest.raises(ValueError, match="cycles must divide epochs, got 3 and 10"):
        TrainSettings(epochs=10, schedule="cyclic", cycles=3)
