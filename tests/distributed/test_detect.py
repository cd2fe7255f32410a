"""The pipeline on a real Ray; what its operators do is tested without."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.data import ActorPoolStrategy

from motor_ray import storage
from motor_ray.archive.manifest import find_tomograms, make_manifest
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.description import RESCORER, describe_models, rescorer_hash
from motor_ray.detector.inference import FEATURES
from motor_ray.detector.model import build_model
from motor_ray.detector.rescore import Rescorer, rescorer_file
from motor_ray.distributed.cluster import object_store_limit
from motor_ray.distributed.detect import (
    LINKING,
    Tally,
    compilation,
    detect,
    dry_run,
    finished,
    settings_of_model,
    write_plan,
)
from motor_ray.distributed.ledger import gather
from motor_ray.distributed.loading import LoadSlab, loader_arguments
from motor_ray.distributed.pipeline import Places, Stage, run_pipeline
from motor_ray.distributed.preflight import Pools, plan_pools, room
from motor_ray.distributed.progress import News, Steady
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import CheckpointError, ManifestError, RunError, UnfinishedError
from motor_ray.motors.neighbourhood import GEOMETRY, PRESENT
from motor_ray.results import finished_run
from motor_ray.slab_plan import first_look
from motor_ray.tables import FAILURES, MANIFEST, MOTORS, PLAN, table_hash

NONE = FAILURES.empty_table()


def in_order(table):
    return sorted(table.to_pylist(), key=lambda row: row["slab_id"])


def planned(manifest, settings):
    return pa.concat_tables(first_look(manifest, settings))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_run_on_ray_writes_what_its_stages_say_row_for_row(archive, settings, checkpoint, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive)
    run = detect(manifest, NONE, checkpoint, str(tmp_path / "run"), settings)
    plan = storage.read_table(str(tmp_path / "run" / "plan.parquet"))
    assert storage.read_table(str(tmp_path / "run" / "tomograms.parquet")).cast(MANIFEST) == manifest
    slabs = storage.read_table(str(tmp_path / "run" / "slabs"))
    expected = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(plan))
    assert plan.schema == PLAN
    assert in_order(slabs) == in_order(expected)
    assert run["counts"] | {"motors": 0} == {
        "planned": 240, "ok": 240, "missing": 0, "corrupt": 0, "failures": 0, "motors": 0
    }  # fmt: skip
    assert storage.read_table(str(tmp_path / "run" / "motors.parquet")).schema == MOTORS
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_damaged_slices_are_counted_and_listed_and_the_rest_is_looked_at(damaged, settings, checkpoint, tmp_path):
    (Path(damaged) / "torn.mrc").write_bytes(b"\0" * 100)
    tomograms = find_tomograms(damaged, settings.archive)
    run = detect(*tomograms, checkpoint, str(tmp_path / "run"), settings)
    assert {name: run["counts"][name] for name in ("planned", "ok", "missing", "corrupt", "failures")} == {
        "planned": 60, "ok": 58, "missing": 1, "corrupt": 1, "failures": 3
    }  # fmt: skip
    failures = storage.read_table(str(tmp_path / "run" / "failures.parquet")).to_pylist()
    assert {(row["tomo_id"], row["z"]) for row in failures} >= {("torn", None)}
    assert {row["z"] for row in failures} == {None, 3, 4}
    assert all(row["error"] for row in failures)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_finished_run_is_not_repeated_and_another_models_is_not_overwritten(damaged, settings, checkpoint, tmp_path):
    out = str(tmp_path / "run")
    manifest = make_manifest(damaged, settings.archive)
    first = detect(manifest, NONE, checkpoint, out, settings)
    written = (tmp_path / "run" / "motors.parquet").stat().st_mtime_ns
    assert detect(manifest, NONE, checkpoint, out, settings) == first
    assert (tmp_path / "run" / "motors.parquet").stat().st_mtime_ns == written
    stricter = settings_from(settings.model_dump() | {"detect": {"score_threshold": 0.9}})
    with pytest.raises(RunError, match="another settings_hash; give --out another folder"):
        detect(manifest, NONE, checkpoint, out, stricter)
    with pytest.raises(RunError, match=r"another manifest_hash.*or --manifest .*tomograms\.parquet to go on"):
        detect(manifest.slice(1), NONE, checkpoint, out, settings)
    begun = storage.read_table(str(tmp_path / "run" / "tomograms.parquet"))
    assert detect(begun, NONE, checkpoint, out, settings) == first


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_finished_run_is_linked_again_when_its_model_has_learned_to_re_score(
    damaged, settings, checkpoint, tmp_path, monkeypatch
):
    model, out = tmp_path / "best", tmp_path / "run"
    shutil.copytree(checkpoint, model)
    manifest = make_manifest(damaged, settings.archive)
    seeing = settings_from(settings.model_dump() | {"detect": settings.detect.model_dump() | {"features": True}})
    before = detect(manifest, NONE, str(model), str(out), seeing)
    slabs = {path.name: path.stat().st_mtime_ns for path in (out / "slabs").iterdir()}
    plain = storage.read_table(str(out / "motors.parquet"))
    head = Rescorer(PRESENT + 2 * FEATURES, len(GEOMETRY))
    torch.nn.init.constant_(head.last.bias, 1.0)
    (model / RESCORER).write_bytes(rescorer_file(head, before["model_sha256"], {}, []))
    monkeypatch.setattr(ray, "init", None)  # nobody looks at a slice
    monkeypatch.setattr("motor_ray.distributed.detect.connected", None)
    after = detect(manifest, NONE, str(model), str(out), settings)  # which keeps features without being told to
    assert {path.name: path.stat().st_mtime_ns for path in (out / "slabs").iterdir()} == slabs
    assert after["rescorer_sha256"] == rescorer_hash(str(model))
    again = storage.read_table(str(out / "motors.parquet"))
    np.testing.assert_allclose(logits(again), logits(plain) + 1, rtol=1e-3, atol=1e-3)
    assert again.drop_columns("score") == plain.drop_columns("score")
    assert detect(manifest, NONE, str(model), str(out), settings) == after
    # As if it had been killed while it linked.
    storage.write_json(str(out / "run.json"), after | {"status": LINKING})
    with pytest.raises(RunError, match="has not finished; run the same motor-ray detect again"):
        finished_run(str(out))
    assert detect(manifest, NONE, str(model), str(out), settings) == after


def logits(motors):
    scores = motors["score"].to_numpy()
    return np.log(scores / (1 - scores))


def test_a_finished_run_takes_over_what_was_learned_of_its_model_since(tmp_path):
    out = str(tmp_path)
    done = {"status": "done", "counts": {"motors": 3}, "calibration": None}
    assert finished(out, done, None) == done
    assert not (tmp_path / "run.json").exists()
    learned = {"threshold": 0.2}
    assert finished(out, done, learned) == done | {"calibration": learned}
    assert json.loads((tmp_path / "run.json").read_text()) == done | {"calibration": learned}


def test_nothing_is_written_before_the_model_is_known_to_be_one(settings, tmp_path, archive):
    manifest = make_manifest(archive.uri, settings.archive)
    with pytest.raises(CheckpointError):
        detect(manifest, NONE, str(tmp_path / "no-model"), str(tmp_path / "run"), settings)
    assert not (tmp_path / "run").exists()


def test_an_archive_of_which_nothing_can_be_used_is_refused_with_the_reason(settings, checkpoint, tmp_path):
    (tmp_path / "torn.mrc").write_bytes(b"\0" * 100)
    with pytest.raises(ManifestError, match=r"no tomogram of the archive can be used: .*torn\.mrc"):
        detect(*find_tomograms(str(tmp_path), settings.archive), checkpoint, str(tmp_path / "run"), settings)
    assert not (tmp_path / "run").exists()


def test_lost_or_doubled_slabs_are_noticed(archive, settings, checkpoint, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 2)
    plan = planned(manifest, settings)
    slabs = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(plan))
    changed = {
        "lost": slabs.slice(1),
        "doubled": slabs.take([0, *range(len(slabs))]),
        "one for another": slabs.take([0, 0, *range(2, len(slabs))]),
    }
    storage.write_table(plan, str(tmp_path / "plan.parquet"))
    for name, some in changed.items():
        storage.write_table(some, str(tmp_path / name / "slabs" / "0.parquet"))
        with pytest.raises(UnfinishedError, match="run the same command again"):
            gather(str(tmp_path / name), [str(tmp_path / "plan.parquet")], manifest, settings, NONE)


def test_a_model_keeps_the_frames_it_was_trained_on_and_takes_how_to_detect_from_the_run(settings):
    asked = settings_from({"detect": {"score_threshold": 0.7}, "frame": {"size": 512}})
    used = settings_of_model(settings, asked)
    assert (used.frame, used.detect) == (settings.frame, asked.detect)


def test_compilation_is_chosen_only_when_the_archive_pays_for_it(settings):
    def compiled(slices: int, frame: int) -> bool:
        return compilation(slices, settings_from(settings.model_dump() | {"frame": {"size": frame}})) != "off"

    assert compiled(100_000, 720)
    assert not compiled(100, 720)
    assert not compiled(10_000, 96)
    full = settings_from(settings.model_dump() | {"frame": {"size": 720}, "detect": {"tta": "full"}})
    assert compilation(100, full) != "off"  # each of eight looks pays
    asked = settings_from(settings.model_dump() | {"detect": {"compile": "on"}})
    assert compilation(1, asked) == "on"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_run_that_broke_off_goes_on_where_it_was_and_ends_as_if_it_had_not(archive, settings, checkpoint, tmp_path):
    """Here files are taken away; the fault suite kills processes."""
    manifest = make_manifest(archive.uri, settings.archive)
    whole = detect(manifest, NONE, checkpoint, str(tmp_path / "whole"), settings)
    out = tmp_path / "broken"
    detect(manifest, NONE, checkpoint, str(out), settings)
    slabs, notes = (sorted(folder.iterdir()) for folder in (out / "slabs", *(out / "checkpoints").iterdir()))
    assert len(slabs) == len(notes) > 1  # so that a small archive, too, has something to go on from
    rows = storage.read_table(str(slabs[0]))
    for written in slabs[1:]:
        written.unlink()
    for note in notes:
        if storage.read_table(str(note))["slab_id"][0].as_py() not in rows["slab_id"].to_pylist():
            note.unlink()
    storage.write_json(str(out / "run.json"), whole | {"status": "running", "looks": {}})
    kept = slabs[0].read_bytes()
    run = detect(manifest, NONE, checkpoint, str(out), settings)
    kept_slices = sum(len(row["slices"]) for row in rows.to_pylist())
    assert run["looks"]["first look"]["done_before"] == kept_slices
    assert slabs[0].read_bytes() == kept  # what was done was not done again
    for table in ("slabs", "motors.parquet", "failures.parquet"):
        first, second = (storage.read_table(str(folder / table)) for folder in (tmp_path / "whole", out))
        key = "slab_id" if table == "slabs" else "tomo_id"
        assert first.sort_by(key).to_pylist() == second.sort_by(key).to_pylist()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_two_looks_together_score_what_an_exhaustive_one_scores_on_the_same_slices(
    archive, settings, checkpoint, tmp_path
):
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 4)
    runs = {}
    for name, detail in {"all": {"exhaustive": True}, "some": {"exhaustive": False, "candidate_score": 0.3}}.items():
        changed = settings_from(settings.model_dump() | {"detect": settings.detect.model_dump() | detail})
        runs[name] = detect(manifest, NONE, checkpoint, str(tmp_path / name), changed)
    scored = {
        name: {
            (row["tomo_id"], one["z"]): one
            for row in storage.read_table(str(tmp_path / name / "slabs")).to_pylist()
            for one in row["slices"]
        }
        for name in runs
    }
    assert 16 <= len(scored["some"]) <= len(scored["all"]) == 80
    for place, one in scored["some"].items():
        # the same up to the last bit, in which a slice may depend on its neighbours in memory
        values = [[found["y"], found["x"], found["score"]] for found in one["detections"]]
        assert np.ravel(values) == pytest.approx(
            np.ravel([[found["y"], found["x"], found["score"]] for found in scored["all"][place]["detections"]]),
            abs=1e-4,
        )
    looks = runs["some"]["looks"]
    assert looks["first look"]["slices"] + looks["second look"]["slices"] == len(scored["some"])
    assert runs["some"]["counts"]["planned"] == len(scored["some"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_several_models_in_several_views_are_one_run_that_says_who_they_were(archive, settings, checkpoint, tmp_path):
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "other", build_model(settings.model), settings, {})
    both = [checkpoint, str(tmp_path / "other")]
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 2)
    views = settings_from(settings.model_dump() | {"detect": settings.detect.model_dump() | {"tta": "full"}})
    run = detect(manifest, NONE, both, str(tmp_path / "run"), views)
    plan = storage.read_table(str(tmp_path / "run" / "plan.parquet"))
    expected = ScoreFrames(views, both)(LoadSlab(**loader_arguments(views))(plan))
    assert in_order(storage.read_table(str(tmp_path / "run" / "slabs"))) == in_order(expected)
    assert run["model_sha256"] == describe_models(both).sha256
    assert [one["model"] for one in run["models"]] == both
    assert run["settings"]["detect"]["tta"] == "full"
    assert detect(manifest, NONE, both, str(tmp_path / "run"), views) == run  # which is finished
    for other, asked in ((both[::-1], views), (checkpoint, views), (both, settings)):
        with pytest.raises(RunError, match="holds a run with another"):
            detect(manifest, NONE, other, str(tmp_path / "run"), asked)


def test_models_that_see_different_frames_are_refused_before_anything_is_done(archive, settings, checkpoint, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive)
    larger = settings_from(settings.model_dump() | {"frame": {"size": 128}})
    save_checkpoint(tmp_path / "larger", build_model(larger.model), larger, {})
    both = [checkpoint, str(tmp_path / "larger")]
    for run in (
        lambda: detect(manifest, NONE, both, str(tmp_path / "run"), settings),
        lambda: dry_run(manifest, NONE, both, settings),
    ):
        with pytest.raises(
            CheckpointError, match=r"larger: was trained with frame\.size 128, but .* with 96; .*leave one"
        ):
            run()
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(archive, settings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = dry_run(make_manifest(archive.uri, settings.archive), NONE, checkpoint, settings)
    assert (said["tomograms"], said["slices"], said["first_look"], said["second_look"]) == (12, 240, 240, 0)
    assert said["requests"] == 240
    assert said["bytes"] == pytest.approx(sum(f.stat().st_size for f in Path(archive.uri).rglob("*.jpg")), rel=0.1)
    assert said["hours"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_scorer_that_cannot_start_ends_the_run_with_its_reason(archive, settings, tmp_path):
    """Ray's own default is to try again for ever."""
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 1)
    places = Places(*(str(tmp_path / name) for name in ("plan.parquet", "slabs", "notes")))
    write_plan(first_look(manifest, settings), places.plan)
    loader = Stage(LoadSlab, {"settings": settings})
    scorer = Stage(ScoreFrames, {"settings": settings, "model": str(tmp_path / "no-model")})
    with pytest.raises(UnfinishedError, match=r"detection stopped: .*no-model"):
        run_pipeline(places, (), loader, scorer, plan_pools(room(), settings.detect), 2)


def test_progress_counts_tomograms_as_their_last_slice_is_done(archive, settings, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 3)
    names = manifest["tomo_id"].to_pylist()
    plan = str(tmp_path / "plan.parquet")
    write_plan(first_look(manifest, settings), plan)
    done = {row["slab_id"] for row in storage.read_table(plan).to_pylist() if row["tomo_id"] == names[0]}
    tally = Tally(manifest, plan, done)
    assert (tally.slices, tally.before, tally.left) == (60, 20, 40)
    assert tally.tell(News(12, "", None, {}, {names[1]: 12}, 1.0, None)) == (32, "1 of 3 tomograms")
    news = News(26, "", None, {}, {names[1]: 8, names[2]: 6}, 2.0, Steady(14, 1.0, 2.0))
    assert tally.tell(news) == (46, "2 of 3 tomograms, 7 slices/s")
    # an actor was lost and its slabs are looked at again
    assert tally.tell(News(52, "", None, {}, {names[2]: 20, names[1]: 6}, 3.0, Steady(40, 2.0, 4.0)))[0] == 60
    assert tally.finished == 3
    said = tally.summary(load_seconds=0.52, pools=Pools(2, 3, 0, 0))
    assert (said["slices_per_second"], said["load_seconds_per_slice"], said["scorers_busy"]) == (10.0, 0.01, 0.25)


def test_a_tables_hash_follows_its_rows_only(archive, settings):
    manifest = make_manifest(archive.uri, settings.archive)
    assert table_hash(manifest) == table_hash(manifest.replace_schema_metadata({"made": "today"}))
    assert table_hash(manifest) != table_hash(manifest.slice(1))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_loading_does_not_run_far_ahead_of_slow_scoring(tmp_path):
    """What bounds memory, whatever the archive's length: without the limit nearly all rows wait at once."""

    def make(table: pa.Table) -> pa.Table:
        (tmp_path / f"made {table['id'][0]}").touch()
        return table.append_column("frames", pa.array([b"0" * 5_000_000], pa.large_binary()))

    class Score:
        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.2)
            (tmp_path / f"scored {table['id'][0]}").touch()
            waiting = len(list(tmp_path.glob("made*"))) - len(list(tmp_path.glob("scored*")))
            return table.select(["id"]).append_column("waiting", pa.array([waiting]))

    with object_store_limit(30_000_000):
        rows = ray.data.from_arrow([pa.table({"id": [place]}) for place in range(60)])
        frames = rows.map_batches(make, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
        scored = frames.map_batches(Score, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(size=1))
        waiting = [row["waiting"] for row in scored.take_all()]
    assert len(waiting) == 60
    assert max(waiting) <= 20
