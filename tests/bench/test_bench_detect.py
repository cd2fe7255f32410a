"""What the detection benchmark computes, and one small run of it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.archive.jpeg_stack import decode_image
from motor_ray.bench.children import run_contestant
from motor_ray.bench.contestants import Job
from motor_ray.bench.detect import PEERS, SETTINGS, Sizes, bench_detect, require_libraries
from motor_ray.bench.devices import StandIn
from motor_ray.bench.memory import memory_watched, name_of
from motor_ray.bench.notes import Note, Notebook, read_notes, steady_state
from motor_ray.bench.peers import slices_of
from motor_ray.bench.slices import jpeg_slices, manifest_of, quality_for
from motor_ray.bench.verdict import WANTED, highest, judge, memory_growth
from motor_ray.cli import main
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.loading import LoadSlab
from motor_ray.errors import RunError, UnfinishedError
from motor_ray.slab_plan import first_look
from motor_ray.tables import MANIFEST, SLABS

SMALL = settings_from(
    SETTINGS.model_dump(mode="json") | {"frame": {"size": 64}, "detect": {"exhaustive": True, "slab_slices": 4}}
)


@pytest.fixture
def stack(tmp_path: Path) -> pa.Table:
    """Two tomograms that share ten slices on this machine."""
    for z, jpeg in enumerate(jpeg_slices(10, (60, 50), 2000)[0]):
        (tmp_path / f"slice_{z:04d}.jpg").write_bytes(jpeg)
    return manifest_of(f"{tmp_path}/slice_{{z:04d}}.jpg", (10, 60, 50), 2)


def plan_of(manifest: pa.Table, settings: RunSettings = SMALL) -> pa.Table:
    return pa.concat_tables(first_look(manifest, settings))


def slab_notes(ends: list[float], took: float) -> list[Note]:
    return [Note(end - took, end, 10, 100) for end in ends]


def test_only_the_last_two_thirds_are_steady_state():
    # Three slow slabs, then six of a second each.
    notes = slab_notes([10, 20, 30, 31, 32, 33, 34, 35, 36], took=0.5)
    assert steady_state(notes) == (10.0, 0.5)


def test_work_that_began_before_the_steady_state_counts_from_its_start_only():
    notes = [Note(0, 1, 10, 1), Note(0, 2, 10, 1), Note(0, 3, 10, 1)]
    assert steady_state(notes).busy == pytest.approx((1 + 2) / 2)


def test_a_scorer_that_never_waits_is_busy_all_the_time():
    ends = np.arange(1.0, 31.0).tolist()
    steady = steady_state(slab_notes(ends, took=1.0))
    assert (steady.slices_per_second, steady.busy) == pytest.approx((10, 1))


@given(
    gaps=st.lists(st.floats(0.01, 10), min_size=6, max_size=40),
    start=st.floats(0, 1e6),
    slower=st.floats(0.1, 10),
)
def test_rates_do_not_depend_on_when_and_are_inverse_to_how_long_it_took(gaps, start, slower):
    ends = np.cumsum(gaps)
    before = steady_state(slab_notes(ends.tolist(), took=0.005))
    after = steady_state(slab_notes((start + slower * ends).tolist(), took=slower * 0.005))
    assert after.slices_per_second * slower == pytest.approx(before.slices_per_second, rel=1e-3)
    assert after.busy == pytest.approx(before.busy, rel=0.1)


def test_a_run_too_short_for_a_steady_state_is_refused():
    with pytest.raises(ValueError, match="measure more slices"):
        steady_state(slab_notes([1.0], took=0.5))


def test_notes_of_several_threads_are_all_kept_and_ordered_by_their_end(tmp_path):
    notebook = Notebook(str(tmp_path / "notes.txt"))

    def write(number: int) -> None:
        with notebook.noting(number, 7):
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(100)))
    notes = read_notes(tmp_path / "notes.txt")
    assert sorted(note.slices for note in notes) == list(range(100))
    assert [note.ended for note in notes] == sorted(note.ended for note in notes)
    assert all(note.began <= note.ended and note.row_bytes == 7 for note in notes)


@given(wanted=st.integers(0, 12000))
def test_the_quality_found_comes_nearest_to_the_wanted_size(wanted):
    def size_of(quality: int) -> int:
        return quality**2

    best = min(abs(size_of(quality) - wanted) for quality in range(1, 101))
    assert abs(size_of(quality_for(size_of, wanted)) - wanted) == best


def test_slices_differ_and_are_as_large_as_asked():
    slices, quality = jpeg_slices(8, (480, 464), 50_000)
    images = [decode_image(jpeg, "", (480, 464)) for jpeg in slices]
    assert len({image.tobytes() for image in images}) == 8
    assert all(abs(len(jpeg) - 50_000) < 5_000 for jpeg in slices)
    assert all(image.std() > 20 and 100 < image.mean() < 156 for image in images)
    assert 50 < quality < 100


def test_tomograms_are_many_and_their_slices_shared(stack):
    plan = plan_of(stack)
    assert stack.schema == MANIFEST
    assert len(set(stack["tomo_id"].to_pylist())) == 2
    slices = slices_of(plan)["uri"].to_pylist()
    assert len(slices) == 20
    assert all(Path(uri).exists() for uri in slices)
    assert len(set(slices)) == 10


def test_a_stand_in_scores_like_the_real_scorer_and_takes_its_time(stack, tmp_path, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("motor_ray.bench.devices.time.sleep", slept.append)
    plan = plan_of(stack)
    slabs = StandIn(str(tmp_path / "notes.txt"), SMALL, 0.01)(LoadSlab(SMALL)(plan))
    assert slabs.schema == SLABS
    assert slabs["slab_id"] == plan["slab_id"]
    assert [[one["status"] for one in slices] for slices in slabs["slices"].to_pylist()] == [
        ["ok"] * len(zs) for zs in plan["zs"].to_pylist()
    ]
    assert sum(slept) == pytest.approx(0.2)
    assert sum(note.slices for note in read_notes(tmp_path / "notes.txt")) == 20


def test_a_figure_at_its_limit_is_good_enough_and_one_beyond_is_not():
    for name, (relation, limit, meaning) in WANTED.items():
        worse = limit - 0.01 if relation == ">=" else limit + 0.01
        assert judge({name: limit})[name]["ok"] is True
        assert judge({name: worse})[name] == {
            "figure": pytest.approx(worse), "wanted": f"{relation} {limit:g}", "ok": False, "meaning": meaning
        }  # fmt: skip


def test_only_what_was_measured_is_judged():
    assert list(judge({"row_megabytes": 6.2})) == ["row_megabytes"]


def test_memory_has_grown_as_much_as_that_of_the_process_that_grew_most():
    few = highest([{"driver": 100, "LoadSlab": 50}, {"driver": 90, "LoadSlab": 60, "StandIn": 10, "other": 1}])
    assert few == {"driver": 100, "LoadSlab": 60, "StandIn": 10, "other": 1}
    many = {"driver": 101, "LoadSlab": 66, "StandIn": 9, "other": 1000}
    assert memory_growth(few, many) == pytest.approx(0.1)


def test_rays_processes_are_known_by_their_titles():
    assert name_of("ray::MapWorker(MapBatches(LoadSlab))") == "LoadSlab"
    assert name_of("ray::MapWorker(MapBatches(StandIn)).submit") == "StandIn"
    assert name_of("ray::Write") == name_of("ray::IDLE") == "ray task"
    assert name_of("/lib/ray/core/src/ray/raylet/raylet --store") == "ray server"
    assert name_of("weed mini") == "other"


def test_the_peak_of_a_process_is_seen_from_outside():
    pytest.importorskip("psutil")
    code = "import sys; held = b'1' * 50_000_000; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with memory_watched(child.pid) as peaks:
            while "driver" not in peaks:
                assert child.poll() is None
        child.communicate()
    assert 50 < peaks["driver"] < 150


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    require_libraries(["device", "model"])
    with pytest.raises(RunError, match=r"needs daft and psutil; pip install 'motor-ray\[bench\]'"):
        require_libraries(["peers", "growth"])


def test_parts_belong_to_the_bench_of_detection(capsys):
    assert main(["bench", "model", "--parts", "peers"]) == 2
    assert "leave it out here" in capsys.readouterr().err


def test_a_contestant_that_fails_says_why(stack, tmp_path):
    job = Job("nobody", str(tmp_path / "job"), SMALL.model_dump(mode="json"), 20)
    with pytest.raises(UnfinishedError, match=r"nobody: .*KeyError: 'nobody'"):
        run_contestant(job, stack, {})


@pytest.mark.slow
@pytest.mark.ray
def test_all_contestants_score_every_slice_and_the_report_says_how_fast():
    pytest.importorskip("daft")
    sizes = Sizes(shape=(48, 120, 116), jpeg_bytes=4000, tomograms=3, rounds=1)
    report = bench_detect(["peers"], SMALL, sizes)
    assert report["requirements"].keys() == {"slices_per_second", "times_as_fast_as_daft", "row_megabytes"}
    rates = report["peers"]["slices_per_second"]
    assert rates.keys() == set(PEERS)
    assert all(rate > 0 for rate in rates.values())
    judged = report["requirements"]
    assert judged["times_as_fast_as_daft"]["figure"] == pytest.approx(rates["motor_ray"] / rates["daft"], abs=1e-4)
    assert 4 * 64 * 64 < judged["row_megabytes"]["figure"] * 1e6 < 2 * 4 * 64 * 64
    assert report["peers"]["runs"]["motor_ray"][0]["retries"] == 0
