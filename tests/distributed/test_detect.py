"""The pipeline on a real Ray; what its operators do is tested without."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy

from motor_ray import storage
from motor_ray.archive.manifest import find_tomograms, make_manifest
from motor_ray.archive.plan import make_plan
from motor_ray.config import settings_from
from motor_ray.distributed.cluster import object_store_limit
from motor_ray.distributed.detect import detect, gather, loaders_for, score_slabs, scorer_arguments, settings_of_model
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.scoring import ScoreFrames
from motor_ray.errors import CheckpointError, ManifestError, RunError, UnfinishedError
from motor_ray.tables import FAILURES, MOTORS, PLAN, table_hash

NONE = FAILURES.empty_table()


def in_order(table):
    return sorted(table.to_pylist(), key=lambda row: row["slab_id"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_run_on_ray_writes_what_its_stages_say_row_for_row(archive, settings, checkpoint, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive)
    run = detect(manifest, NONE, checkpoint, str(tmp_path / "run"), settings)
    plan = storage.read_table(str(tmp_path / "run" / "plan.parquet"))
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
    with pytest.raises(RunError, match="another manifest_hash"):
        detect(manifest.slice(1), NONE, checkpoint, out, settings)


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
    plan = make_plan(manifest, 6)
    slabs = ScoreFrames(settings, checkpoint)(LoadSlab(settings)(plan))
    changed = {
        "lost": slabs.slice(1),
        "doubled": slabs.take([0, *range(len(slabs))]),
        "one for another": slabs.take([0, 0, *range(2, len(slabs))]),
    }
    for name, some in changed.items():
        storage.write_table(some, str(tmp_path / name / "slabs" / "0.parquet"))
        with pytest.raises(UnfinishedError, match="lost or doubled"):
            gather(str(tmp_path / name), manifest, plan, settings, NONE)


def test_a_model_keeps_the_frames_it_was_trained_on_and_takes_how_to_detect_from_the_run(settings):
    asked = settings_from({"detect": {"score_threshold": 0.7}, "frame": {"size": 512}})
    used = settings_of_model(settings, asked)
    assert (used.frame, used.detect) == (settings.frame, asked.detect)


def test_compilation_is_chosen_only_when_the_archive_pays_for_it(settings):
    def compiled(slices: int, scorers: int, frame: int) -> bool:
        sized = settings_from(settings.model_dump() | {"frame": {"size": frame}})
        return bool(scorer_arguments(slices, scorers, "model", sized, None)["compiled"] != "off")

    assert compiled(100_000, 1, 720)
    assert not compiled(100, 1, 720)
    assert not compiled(10_000, 100, 720)
    assert not compiled(10_000, 1, 96)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_more_than_the_cluster_holds_is_refused_instead_of_waited_for(archive, settings, checkpoint, tmp_path):
    greedy = settings_from(settings.model_dump() | {"detect": {"scorers": 500}})
    manifest = make_manifest(archive.uri, settings.archive)
    with pytest.raises(RunError, match=r"the cluster has \d+ CPUs, 500 scorers, a loader and tasks take 503"):
        detect(manifest, NONE, checkpoint, str(tmp_path / "run"), greedy)
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_loaders_are_as_many_as_asked_for_or_as_fit(settings):
    assert loaders_for(settings_from(settings.model_dump() | {"detect": {"loaders": 7}})) == 7
    assert loaders_for(settings) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_scorer_that_cannot_start_ends_the_run_with_its_reason(archive, settings, tmp_path):
    """Ray's own default is to try again for ever."""
    manifest = make_manifest(archive.uri, settings.archive).slice(0, 1)
    plan = make_plan(manifest, 6)
    storage.write_table(plan, str(tmp_path / "plan.parquet"))
    with pytest.raises(UnfinishedError, match=r"detection stopped: .*no-model"):
        score_slabs(str(tmp_path), plan, str(tmp_path / "no-model"), settings)


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

    with object_store_limit(30):
        rows = ray.data.from_arrow([pa.table({"id": [place]}) for place in range(60)])
        frames = rows.map_batches(make, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
        scored = frames.map_batches(Score, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(size=1))
        waiting = [row["waiting"] for row in scored.take_all()]
    assert len(waiting) == 60
    assert max(waiting) <= 20
