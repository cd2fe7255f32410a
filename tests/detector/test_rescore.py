from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from motor_ray.detector.description import RESCORER, rescorer_hash
from motor_ray.detector.rescore import Rescorer, learned_from, load_rescorer, rescorer_file, train_rescorer
from motor_ray.errors import CheckpointError

SHA = "a" * 64


def problem(count: int, seed: int, *, told: bool = True) -> tuple[Any, Any, Any]:
    """Candidates whose linked scores say nothing; if `told`, the second channel in the middle of z says all."""
    rng = np.random.default_rng(seed)
    is_motor = rng.uniform(size=count) < 0.3
    along_z = rng.normal(size=(count, 6, 9)).astype(np.float32)
    if told:
        along_z[:, 1, 3:6] += np.where(is_motor, 2.0, -2.0)[:, None]
    return along_z, rng.uniform(0.2, 0.8, size=(count, 4)).astype(np.float32), is_motor


def test_an_untrained_head_leaves_the_linked_score_as_it_is() -> None:
    along_z, geometry, _ = problem(20, 0)
    np.testing.assert_allclose(Rescorer(6, 4).eval().score(along_z, geometry), geometry[:, 0], atol=1e-6)


def test_a_trained_head_tells_motors_it_has_not_seen_by_what_surrounds_them() -> None:
    head = train_rescorer(*problem(200, 0), seed=1)
    along_z, geometry, is_motor = problem(100, 1)
    scores = head.score(along_z, geometry)
    assert (scores[is_motor][:, None] > scores[~is_motor]).mean() > 0.95
    assert (geometry[is_motor, 0][:, None] > geometry[~is_motor, 0]).mean() < 0.6
    assert ((scores >= 0) & (scores <= 1)).all()


def test_scores_stay_as_rare_as_motors_are_among_candidates() -> None:
    along_z, geometry, is_motor = problem(400, 0)
    rare = ~is_motor | (np.cumsum(is_motor) % 6 == 0)
    head = train_rescorer(along_z[rare], geometry[rare], is_motor[rare], seed=1)
    scores = head.score(along_z[rare], geometry[rare])
    assert scores.mean() == pytest.approx(is_motor[rare].mean(), abs=0.06)
    assert is_motor[rare].mean() < 0.1


def test_a_head_that_has_nothing_to_learn_from_moves_scores_but_little() -> None:
    head = train_rescorer(*problem(300, 0, told=False), seed=1)
    along_z, geometry, _ = problem(100, 1, told=False)
    assert np.corrcoef(head.score(along_z, geometry), geometry[:, 0])[0, 1] > 0.8


def test_a_candidate_that_is_turned_upside_down_has_the_same_score() -> None:
    head = train_rescorer(*problem(100, 0), seed=1)
    along_z, geometry, _ = problem(10, 1)
    turned = np.ascontiguousarray(along_z[:, :, ::-1])
    np.testing.assert_allclose(head.score(along_z, geometry), head.score(turned, geometry), atol=1e-6)


def test_the_same_candidates_and_seed_give_the_same_head_and_no_random_number_is_taken() -> None:
    state = torch.get_rng_state()
    one, two = (train_rescorer(*problem(50, 0), seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train_rescorer(*problem(50, 0), seed=4).state_dict()
    assert not torch.equal(one["together.1.weight"], other["together.1.weight"])


def test_a_head_is_read_again_bit_for_bit_and_only_for_its_model(tmp_path: Path) -> None:
    head = train_rescorer(*problem(50, 0), seed=3)
    assert rescorer_hash(str(tmp_path)) is None
    (tmp_path / RESCORER).write_bytes(rescorer_file(head, SHA, {"f2": 0.5}, ["t2", "t1"]))
    assert learned_from(str(tmp_path)) == {"t1", "t2"}
    along_z, geometry, _ = problem(10, 1)
    again = load_rescorer(str(tmp_path), SHA, (along_z.shape[1], geometry.shape[1]))
    np.testing.assert_array_equal(again.score(along_z, geometry), head.score(along_z, geometry))
    assert len(rescorer_hash(str(tmp_path)) or "") == 64
    with pytest.raises(CheckpointError, match=r"learned with the model aaaaaaaaaaaa, and .* is bbb.*rescore again"):
        load_rescorer(str(tmp_path), "b" * 64, (6, 4))


def test_a_damaged_or_foreign_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESCORER).write_bytes(rescorer_file(Rescorer(6, 4), SHA, {}, []))
    whole = (tmp_path / RESCORER).read_bytes()
    (tmp_path / RESCORER).write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"rescorer\.safetensors: is damaged"):
        load_rescorer(str(tmp_path), SHA, (6, 4))
    (tmp_path / RESCORER).write_bytes(whole)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        load_rescorer(str(tmp_path), SHA, (7, 4))
    mean = {"channel_mean": Rescorer(6, 4).state_dict()["channel_mean"]}
    (tmp_path / RESCORER).write_bytes(safetensors.torch.save(mean, {"model_sha256": SHA}))
    with pytest.raises(CheckpointError, match="do not fit the network"):
        load_rescorer(str(tmp_path), SHA, (6, 4))
