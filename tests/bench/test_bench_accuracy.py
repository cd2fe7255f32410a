"""The accuracy benchmark: what it compares, by which threshold, and what it does not do twice."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.bench import accuracy, accuracy_run
from motor_ray.bench.accuracy_archives import SEEDS, Sizes, archive, settings_of
from motor_ray.bench.accuracy_figure import accuracy_figure
from motor_ray.bench.accuracy_job import Job, as_json, from_json
from motor_ray.bench.accuracy_peers import MARGIN, _Unclipped, build_peer, from_corners, narrow, to_corners
from motor_ray.bench.accuracy_rows import ROWS, changes_of, chosen, keys_of, settings_of_row
from motor_ray.bench.accuracy_scores import ALARMS, false_positives
from motor_ray.bench.accuracy_table import lines_of, markdown, requirements
from motor_ray.cli import main
from motor_ray.errors import UnfinishedError

TINY = Sizes(
    shape=(24, 96, 96),
    tomograms=(4, 4, 4, 8, 4),
    seen_spacings=(16.0,),
    unseen_spacings=(19.7,),
    signal_to_noise=3.0,
    clutter=0.5,
    frame=64,
    box_angstrom=600.0,
    neck_channels=32,
    head_channels=8,
    epochs=3,
)


def result_of(name, seed, f2, calibration=None, **scores):
    usual = dict.fromkeys(("mAP@0.5", "mAP@0.7", "mAP@0.9", "precision", "recall", "f2_unseen_spacings"), 0.5)
    usual |= {"f2": f2, "localisation_error_angstrom": 40.0, "false_positives_at_recall": 0.25}
    return {
        "row": name,
        "seed": seed,
        "scores": usual | scores,
        "calibration": {"mAP@0.5": f2 if calibration is None else calibration} | {ALARMS: scores.pop("alarms", 0.2)},
        "parameters": 2_500_000,
        "training_images": 4096,
    }


def best_of(rows):
    """A table as `best_motors` gives it, of (has a motor, score, distance)."""
    return pd.DataFrame(
        [(f"tomo_{place}", *row) for place, row in enumerate(rows)],
        columns=["tomo_id", "has_motor", "score", "distance_angstrom"],
    )


def test_false_positives_are_counted_where_nine_in_ten_tomograms_are_found():
    found = [(True, 0.9 - 0.05 * place, 10.0) for place in range(10)]  # the ninth scores 0.5, the tenth 0.45
    best = best_of([*found, (False, 0.6, np.nan), (False, 0.47, np.nan), (False, np.nan, np.nan), (False, 0.2, np.nan)])
    motors = pd.DataFrame({"tomo_id": ["tomo_10", "tomo_10", "tomo_11", "tomo_0"], "score": [0.6, 0.55, 0.47, 0.3]})
    assert false_positives(motors, best, 0.9, 1000.0) == 2 / 4
    assert false_positives(motors, best, 1.0, 1000.0) == 3 / 4


def test_a_recall_that_is_never_reached_has_no_false_positives():
    best = best_of([(True, 0.9, 10.0), (True, 0.8, 5000.0), (False, 0.1, np.nan)])
    assert false_positives(pd.DataFrame({"tomo_id": [], "score": []}), best, 0.9, 1000.0) is None


@given(st.lists(st.tuples(*[st.floats(1, 100)] * 4), max_size=5))
def test_boxes_come_back_from_corners(boxes):
    boxes = np.array(boxes).reshape(-1, 4)
    np.testing.assert_allclose(from_corners(to_corners(boxes)), boxes, atol=1e-4)


def test_a_pixels_edges_lie_half_a_pixel_from_its_index():
    assert to_corners(np.array([[0.0, 2.0, 1.0, 1.0]])).tolist() == [[2.0, 0.0, 3.0, 1.0]]


@pytest.mark.parametrize("name", ["retinanet", "fcos", "yolo"])
def test_all_of_a_peer_learns_from_a_batch_in_which_a_frame_shows_nothing(name):
    if name == "yolo":
        pytest.importorskip("ultralytics")
    peer: Any = build_peer(name, settings_of(TINY, 1, {})).train()
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    truth = [to_corners(np.array([[30.0, 40.0, 24.0, 24.0]])), to_corners(np.empty((0, 4)))]
    with narrow():
        loss = peer.loss(images, truth)
    loss.backward()
    assert loss.isfinite()
    learned = [parameter.grad for parameter in peer.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in learned)
    with torch.no_grad():
        found = peer.eval().find(images, 0.0, 3)
    assert [len(one.scores) <= 3 and one.corners.shape == (len(one.scores), 4) for one in found] == [True, True]


def test_boxes_of_peers_may_reach_beyond_the_frame():
    class Cut:
        def postprocess_detections(self, _, anchors, shapes):
            height, width = shapes[0]
            boxes = anchors[0][0].clone()
            boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
            boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
            return [{"boxes": boxes}]

    class Peer(_Unclipped, Cut):
        pass

    beyond = torch.tensor([[-20.0, -5.0, 30.0, 90.0]])
    [found] = Peer().postprocess_detections({}, [[beyond]], [(64, 64)])
    torch.testing.assert_close(found["boxes"], beyond, atol=1e-3, rtol=0)
    assert MARGIN > 64


def test_the_table_says_mean_and_deviation_and_that_it_is_simulated():
    results = [result_of("seed", 420, 0.8), result_of("seed", 421, 0.9), result_of("fcos", 420, 0.7, recall=None)]
    table = markdown(lines_of(results, {"seed": 20.0, "fcos": 50.0}))
    fcos, seed = table.splitlines()[2:4]
    assert seed.startswith("| seed's model |")
    assert "| 0.850 ± 0.071 |" in seed
    assert seed.endswith("| 20.0 | 1.00 | 2.5 M | 4,096 | 2 |")
    assert "| 0.700 |" in fcos
    assert "| - |" in fcos
    assert "| 50.0 | 2.50 |" in fcos
    assert "Simulated" in table


PEER_ROWS = [name for name, row in ROWS.items() if row.role == "peer"]


def peers(seeds, f2=0.7):
    return [result_of(name, seed, f2) for name in PEER_ROWS for seed in seeds]


def test_our_best_model_is_compared_with_the_best_peer_over_the_seeds_of_all():
    ours = [result_of("seed", seed, f2) for seed, f2 in [(1, 0.8), (2, 0.82), (3, 0.2)]]
    asked = requirements(lines_of([*ours, *peers([1, 2]), result_of("fcos", 2, 0.72)], {"seed": 1.0}))
    said = asked["single_over_peers_f2"]
    assert said["figure"] == pytest.approx((0.81 - 0.71) / np.std([0.8, 0.82], ddof=1), abs=1e-3)
    assert said["ok"]
    assert said["of"] == "seed's model (seeds 1, 2) and FCOS (seeds 1, 2)"
    assert not asked["false_positives"]["ok"]
    assert "ensemble_gain" not in asked


def test_the_best_of_ours_is_chosen_by_calibration_tomograms():
    three = [("seed", 0.6, 0.5), ("levels", 0.5, 0.7), ("cbam", 0.8, 0.6)]
    results = [result_of(name, seed, f2, ranked) for name, f2, ranked in three for seed in (1, 2)]
    results += [result_of("tta", seed, 0.9, 0.9) for seed in (1, 2)]
    assert requirements(lines_of(results, {}))["ensemble_gain"]["of"].endswith("and + multi-scale (seeds 1, 2)")


def test_the_one_with_the_fewest_false_positives_is_chosen_by_calibration_tomograms():
    few, many = {"alarms": 0.1, ALARMS: 0.4}, {"alarms": 0.3, ALARMS: 0.0}
    results = [result_of("seed", 1, 0.6, **many), result_of("rescored", 1, 0.6, **few)]
    results += [result_of("levels", 1, 0.6, **many | {"alarms": None}), *peers([1])]
    said = requirements(lines_of(results, {}))["false_positives"]
    assert (said["of"], said["figure"], said["ok"]) == ("+ re-scoring (seeds 1)", 0.4, False)


def test_what_cannot_be_told_is_not_met():
    results = [result_of("seed", 1, 0.8, false_positives_at_recall=0.0)]
    results += [result_of("seed", 2, 0.8, false_positives_at_recall=None)]
    undefined = {"figure": None, "ok": False}
    asked = requirements(lines_of(results, {}))
    assert asked["false_positives"] == asked["false_positives"] | undefined
    assert "single_over_peers_f2" not in requirements(lines_of([*results, *peers([1, 2])[:-2]], {}))
    asked = requirements(lines_of([*results, *peers([1])], {}))
    assert asked["single_over_peers_f2"] == asked["single_over_peers_f2"] | undefined


def test_seeds_that_agree_by_chance_do_not_hide_a_difference():
    results = [*[result_of("seed", seed, 0.8) for seed in (1, 2)], *peers([1, 2])]
    said = requirements(lines_of(results, {}))["single_over_peers_f2"]
    assert said["ok"]
    assert said["figure"] == pytest.approx(100)


@pytest.mark.parametrize("seed", range(420, 424))
def test_every_edge_of_fcos_boxes_can_be_learned_from_the_start(seed):
    peer: Any = build_peer("fcos", settings_of(Sizes(), seed, {})).train()
    images = torch.randn(2, 1, 160, 160, generator=torch.Generator().manual_seed(seed))
    heads: list[Any] = []
    peer.network.head.regression_head.register_forward_hook(lambda *said: heads.append(said[-1][0]))
    truth = [to_corners(np.array([[70.0, 80.0, 70.0, 70.0]]))] * 2
    peer.loss(images, truth)
    assert (heads[0] > 0).float().mean(dim=(0, 1)).min() > 0.5


def test_a_picture_is_drawn_of_what_there_is(tmp_path):
    results = [result_of("seed", 420, 0.8), result_of("seed", 421, 0.9), result_of("fcos", 420, 0.7)]
    accuracy_figure(str(tmp_path / "a.png"), lines_of(results, {"seed": 20.0, "fcos": 21.0}))
    accuracy_figure(str(tmp_path / "b.png"), lines_of(results, {}))
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0


def test_what_a_row_needs_stands_before_it_and_is_run_with_it():
    for name, row in ROWS.items():
        assert set(row.of) <= set(list(ROWS)[: list(ROWS).index(name)])
        assert set(row.of) <= set(chosen((name,)))
    assert chosen(("soup",)) == ("snapshot", "soup")


def test_a_row_of_another_has_its_settings():
    assert changes_of("soup") == changes_of("snapshot")
    assert changes_of("tta") == {"detect": {"tta": "fast"}}


def test_every_row_starts_from_random_weights_and_has_the_same_budget_but_one():
    usual = settings_of(Sizes(), 420, {}).train
    for name in ROWS:
        settings = settings_of_row(name, 420, Sizes())
        assert settings.model.pretrained == "none"
        for same in ("batch_size", "slices_per_motor", "negatives_per_positive", "empty_share"):
            assert getattr(settings.train, same) == getattr(usual, same)
        assert settings.train.epochs == usual.epochs * (2 if name == "longer" else 1)


def test_results_of_other_seeds_rows_and_sizes_have_other_keys():
    keys = {keys_of(name, seed, sizes).scored for name in ROWS for seed in (1, 2) for sizes in (Sizes(), TINY)}
    assert len(keys) == len(ROWS) * 4
    assert keys_of("seed", 1, Sizes()) == keys_of("seed", 1, Sizes())


def test_what_is_learned_stays_when_only_the_judging_changes(monkeypatch):
    def keys(name, sizes=TINY):
        return keys_of(name, 1, sizes)

    tested, calibrated = (replace(TINY, tomograms=counts) for counts in ((4, 4, 4, 16, 4), (4, 4, 8, 8, 4)))
    for more in (tested, calibrated, replace(TINY, unseen_spacings=(22.0,))):
        assert keys("seed", more).trained == keys("seed").trained
        assert keys("seed", more).looked != keys("seed").looked
    assert keys("seed", replace(TINY, epochs=4)).trained != keys("seed").trained
    assert keys("pseudo", tested).trained == keys("pseudo").trained
    assert keys("pseudo", calibrated).trained != keys("pseudo").trained  # they say which scores are sure
    before = {name: keys(name) for name in ("seed", "soup")}
    monkeypatch.setitem(ROWS, "seed", replace(ROWS["seed"], changes={"care": {"missing_score": 0.9}}))
    assert keys("seed") == before["seed"]
    monkeypatch.setitem(ROWS, "seed", replace(ROWS["seed"], changes={"link": {"min_slices": 3}}))
    assert keys("seed").looked == before["seed"].looked
    assert keys("seed").scored != before["seed"].scored
    monkeypatch.setitem(ROWS, "snapshot", replace(ROWS["snapshot"], version=2))
    assert keys("soup").trained != before["soup"].trained


@pytest.mark.parametrize("name", ROWS)
def test_a_new_version_of_a_row_is_done_anew(monkeypatch, name):
    before = keys_of(name, 1, TINY)
    monkeypatch.setitem(ROWS, name, replace(ROWS[name], version=ROWS[name].version + 1))
    assert not set(before) & set(keys_of(name, 1, TINY))


def test_a_step_is_taken_once_and_what_it_spoils_is_not_believed(tmp_path, monkeypatch):
    taken = []

    def step(name, said):
        def take(_):
            taken.append(name)
            return said

        monkeypatch.setattr(accuracy_run, f"{name}_row", take)

    step("train", {"images": 1})
    step("look", {"parameters": 1})
    step("score", {"scores": {}})
    job = Job(tmp_path, "seed", 1, TINY)
    job.folder.mkdir(parents=True)
    accuracy_run.run_row(job)
    accuracy_run.run_row(job)
    assert taken == ["train", "look", "score"]
    more = job._replace(sizes=replace(TINY, tomograms=(4, 4, 8, 8, 4)))
    accuracy_run.run_row(more)
    assert taken[3:] == ["look", "score"]

    def break_off(_):
        raise UnfinishedError("killed")

    monkeypatch.setattr(accuracy_run, "look_row", break_off)
    with pytest.raises(UnfinishedError):
        accuracy_run.run_row(job)
    assert more.result is None


def test_a_row_that_differs_in_its_threshold_alone_sees_what_the_other_saw(tmp_path):
    assert Job(tmp_path, "uncalibrated", 1, TINY).seen_by == Job(tmp_path, "seed", 1, TINY)
    for name in set(ROWS) - {"uncalibrated"}:
        job = Job(tmp_path, name, 1, TINY)
        assert job.seen_by is job


def test_jobs_survive_json(tmp_path):
    jobs = [Job(tmp_path, "seed", 420, TINY), Job(tmp_path, "fcos", 421, TINY)]
    assert from_json(json.loads(json.dumps(as_json(jobs, "row")))) == jobs


def test_unknown_rows_are_refused_and_none_means_all(capsys):
    assert chosen(()) == tuple(ROWS)
    assert chosen(("seed", "plain")) == ("plain", "seed")
    assert main(["bench", "accuracy", "--parts", "seeds"]) == 2
    assert "--parts seeds: bench accuracy has the rows plain, retinanet" in capsys.readouterr().err
    assert main(["bench", "model", "--seeds", "2"]) == 2


def test_what_is_done_is_not_done_again_and_what_fails_stops_no_other(tmp_path, monkeypatch):
    asked, shown = [], []

    def run(_, said, folder, title):
        asked.append(title)
        if "FCOS" in title:
            raise UnfinishedError("no memory")
        [job] = from_json(said)
        text = json.dumps(result_of(job.name, job.seed, 0.5) | {"key": job.keys.scored})
        (folder / "result.json").write_text(text)

    def report(work, sizes):
        shown.append(accuracy.done_jobs(work, sizes))
        return {"table": "a table"}

    monkeypatch.setattr(accuracy.Crew, "run", run)
    monkeypatch.setattr(accuracy, "archive", lambda *_: None)
    monkeypatch.setattr(accuracy, "report", report)
    with pytest.raises(UnfinishedError, match=r"1 of 3 could not be done: no memory\. What could is in a table"):
        accuracy.bench_accuracy(("seed", "plain", "fcos"), str(tmp_path), seeds=1, sizes=TINY)
    assert len(asked) == 3
    accuracy.bench_accuracy(("seed", "plain"), str(tmp_path), seeds=2, sizes=TINY)
    assert len(asked) == len(set(asked)) == 5
    assert {(job.name, job.seed) for job in shown[-1]} == {(n, s) for n in ("plain", "seed") for s in (420, 421)}


def test_a_row_does_not_begin_without_what_it_needs(tmp_path, monkeypatch):
    asked = []

    def run(_, said, folder, title):  # noqa: ARG001
        asked.append(title)
        raise UnfinishedError(f"{title}: no memory")

    monkeypatch.setattr(accuracy.Crew, "run", run)
    failed = accuracy.run_all([Job(tmp_path, name, 420, TINY) for name in chosen(("soup",))], processes=2)
    assert asked == ["+ snapshots, seed 420"]
    assert failed == ["+ snapshots, seed 420: no memory", "+ soup, seed 420: needs what failed"]


def test_the_test_has_spacings_that_training_has_not_and_no_tomogram_is_in_two_parts(tmp_path):
    small = Sizes(shape=(12, 48, 48), tomograms=(3, 3, 3, 5, 3), clutter=0.0, train_counts=(1, 0), motor_counts=(1, 0))
    parts = {part: archive(tmp_path, part, small) for part in SEEDS}
    names = [name for one in parts.values() for name in one.manifest["tomo_id"].to_pylist()]
    assert len(names) == len(set(names)) == 17
    assert set(parts["train"].manifest["voxel_spacing_angstrom"].to_pylist()) == set(small.seen_spacings)
    assert set(parts["test"].labels.tomograms["voxel_spacing_angstrom"]) == {
        *small.seen_spacings,
        *small.unseen_spacings,
    }
    again = archive(tmp_path, "test", small)
    assert again.manifest.equals(parts["test"].manifest)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_rows_are_trained_scored_timed_and_drawn(tmp_path):
    said = accuracy.bench_accuracy(("seed", "retinanet"), str(tmp_path), seeds=1, processes=2, sizes=TINY)
    assert [row["name"] for row in said["rows"]] == ["retinanet", "seed"]
    assert all(row["milliseconds"] > 0 for row in said["rows"])
    assert "imulated" in said["simulated"]
    for name in ("accuracy.json", "accuracy.md", "accuracy.png"):
        assert (tmp_path / name).stat().st_size > 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("rows/*/*/result.json")}
    accuracy.bench_accuracy(("seed",), str(tmp_path), seeds=1, sizes=TINY)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("rows/*/*/result.json")}
