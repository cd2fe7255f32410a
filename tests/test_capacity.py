"""What `motor-ray plan` computes; nothing here starts Ray or takes the time of anything."""

import itertools
import json
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.bench.children import Run
from motor_ray.bench.detect import SETTINGS
from motor_ray.bench.notes import Steady
from motor_ray.bench.plan import CALIBRATION, CASES, SIZES, Calibration, Foretold, calibrate, compare, foretell
from motor_ray.bench.plan import line_of as line_of_case
from motor_ray.bench.slices import manifest_of
from motor_ray.capacity.forecast import Cluster, Prices, Rates, balance, forecast, line_of
from motor_ray.capacity.line import Line, Station
from motor_ray.capacity.simulation import BLOCK, MOST_SCORERS, run_line, service_factors, simulate
from motor_ray.capacity.workload import Look, Workload, alike, workload_of
from motor_ray.cli import main
from motor_ray.config import DetectSettings, FrameSettings, RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.estimate import Measured, Sample, Take
from motor_ray.distributed.preflight import Pools, Room
from motor_ray.errors import ConfigError
from motor_ray.planning import Asked, cluster_of, rates_of, score_seconds
from motor_ray.slab_plan import first_look
from motor_ray.tables import SLABS

NOTHING = Station(1, 0.0)
SLABS_ENOUGH = 640
GIVEN = ["plan", "--tomograms", "50", "--spacing", "13.1", "--gpus", "2", "--cpus", "64"]
RATES = ["--gpu-rate", "500", "--cpu-rate", "100"]


def line(
    scorers: int = 2,
    score: float = 0.1,
    cores: int = 8,
    prepare: float = 0.1,
    variation: float = 0.0,
    **changes: Any,
) -> Line:
    """A pipeline in which only scoring and preparing take time."""
    usual = Line(
        driver=NOTHING,
        storage=NOTHING,
        wait_seconds=0.0,
        cpus=Station(cores, prepare),
        network=NOTHING,
        scoring=Station(scorers, score),
        files=NOTHING,
        calls=4 * cores,
        ahead=8 * (scorers + cores),
        load_variation=variation,
        score_variation=variation,
    )
    return usual._replace(**changes)


stages = st.builds(
    line,
    scorers=st.integers(1, 8),
    score=st.floats(0.01, 1.0),
    cores=st.integers(1, 16),
    prepare=st.floats(0.01, 1.0),
    driver=st.builds(Station, st.integers(1, 3), st.floats(0.0001, 0.1)),
    storage=st.builds(Station, st.just(1), st.floats(0.0, 0.05)),
    wait_seconds=st.floats(0.0, 0.5),
    network=st.builds(Station, st.integers(1, 8), st.floats(0.0, 0.1)),
    files=st.builds(Station, st.integers(1, 3), st.floats(0.0, 2.0)),
    ahead=st.just(60),
    slabs_per_file=st.integers(1, 8),
)


@settings(max_examples=12, deadline=None)
@given(stages)
def test_without_variation_the_simulation_reaches_the_closed_form(one):
    assert simulate(one, SLABS_ENOUGH).rate == pytest.approx(min(one.limits().values()), rel=0.02)


@settings(max_examples=12, deadline=None)
@given(stages, st.floats(0.1, 1.0))
def test_with_variation_it_is_never_faster_than_the_closed_form(one, variation):
    varied = one._replace(load_variation=variation, score_variation=variation)
    assert simulate(varied, SLABS_ENOUGH).rate <= 1.02 * min(one.limits().values())


@pytest.mark.parametrize("ahead", [6, 20, 200])
def test_more_variation_never_makes_it_faster(ahead):
    rates = [
        run_line(line(scorers=4, cores=4, variation=variation, ahead=ahead), 10**6).rate
        for variation in (0.0, 0.3, 1.0, 2.0)
    ]
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(rates))


def test_room_between_stages_that_vary_makes_up_for_much_of_it():
    rates = [run_line(line(scorers=4, cores=4, variation=1.0, ahead=ahead), 10**6).rate for ahead in (6, 12, 200)]
    assert rates[0] < 0.9 * rates[2]
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] == pytest.approx(40, rel=0.05)


def with_more(what: str, one: Line) -> Line:
    """One more of a number, or twice the servers of a station."""
    now = getattr(one, what)
    more: dict[str, Any] = {what: Station(2 * now.servers, now.seconds) if isinstance(now, Station) else now + 1}
    return one._replace(**more)


@pytest.mark.parametrize("what", ["calls", "ahead", *line().stations()])
@settings(max_examples=5, deadline=None)
@given(stages, st.floats(0.0, 0.6))
def test_more_of_anything_never_makes_it_slower(what, one, variation):
    varied = one._replace(load_variation=variation, score_variation=variation)
    assert simulate(with_more(what, varied), 320).seconds <= 1.03 * simulate(varied, 320).seconds


@pytest.mark.parametrize("scorers", [1, 4, 40])
def test_twice_the_gpus_take_half_the_time_where_gpus_are_the_bottleneck(scorers):
    few, many = (line(scorers=n, cores=160, prepare=0.1, variation=0.3, ahead=400) for n in (scorers, 2 * scorers))
    assert few.bottleneck() == many.bottleneck() == "scoring"
    assert run_line(few, 10**6).seconds == pytest.approx(2 * run_line(many, 10**6).seconds, rel=0.01)


def test_more_gpus_do_not_help_where_cpus_are_the_bottleneck():
    few, many = (run_line(line(scorers=n, score=0.01, variation=0.3), 10**5) for n in (2, 4))
    assert many.seconds == pytest.approx(few.seconds, rel=0.01)
    assert few.busy["cpus"] > 0.98
    assert many.busy["scoring"] < 0.25


@pytest.mark.parametrize("scorers", [1, 8, 100])
def test_a_large_cluster_is_simulated_as_a_small_one_with_the_same_rate_of_a_scorer(scorers):
    one = run_line(line(scorers=scorers, cores=3 * scorers, driver=Station(1, 0.1 / (2 * scorers))), 10**6)
    assert one.rate == pytest.approx(10 * scorers, rel=0.01)
    assert one.busy["scoring"] > 0.99
    assert one.busy["driver"] == pytest.approx(0.5, abs=0.01)
    assert one.simulated_slabs < 10_000


def test_shrinking_keeps_the_rate_of_every_station():
    large = line(scorers=20, cores=333, driver=Station(3, 0.01), files=Station(7, 0.5))
    small = large.shrunk(20 / MOST_SCORERS)
    for name, station in small.stations().items():
        assert station.rate * 20 / MOST_SCORERS == pytest.approx(large.stations()[name].rate), name


@given(st.integers(1, 400), st.floats(0.0, 0.5), st.integers(0, 5))
def test_service_times_have_the_mean_and_about_the_variation_that_is_asked_for(blocks, variation, seed):
    factors = service_factors(blocks * BLOCK, variation, seed)
    assert factors.mean() == pytest.approx(1)
    assert factors.std() == pytest.approx(variation, rel=0.1, abs=1e-9)
    assert (factors > 0).all()


def test_a_course_is_the_same_each_time():
    assert simulate(line(variation=0.5), 500) == simulate(line(variation=0.5), 500)


def test_what_is_beyond_the_simulated_slabs_takes_as_long_as_the_rate_says():
    whole, cut = simulate(line(variation=0.3), 6400), run_line(line(variation=0.3), 6400)
    assert cut.simulated_slabs < 2000
    assert cut.seconds == pytest.approx(whole.seconds, rel=0.005)


def test_a_single_slab_passes_one_station_after_the_other():
    one = line(
        driver=Station(1, 1.0), storage=Station(1, 2.0), wait_seconds=4.0, prepare=8.0, network=Station(1, 16.0),
        score=32.0, files=Station(1, 64.0),
    )  # fmt: skip
    course = run_line(one, 1)
    assert course.first_result_seconds == 63.0
    assert course.seconds == 127.0


def test_slabs_that_wait_and_lie_about_are_bounded():
    assert run_line(line(scorers=1, score=1.0, ahead=5, cores=8), 100).rate == pytest.approx(1)
    assert run_line(line(scorers=8, cores=8, ahead=1), 1000).rate == pytest.approx(1 / 0.2, rel=0.01)


CLUSTER = Cluster(
    cpus=100, gpus=4, scorers=4, loaders=64, calls=4, slabs_ahead=500, tasks=3, writers=4, slabs_per_file=64,
    requests_per_second=None, network_gigabit=None, jobs=1, driver_slab_seconds=0.0001, driver_tomogram_seconds=0.0,
)  # fmt: skip
RATE = Rates(
    core_seconds=0.01, wait_seconds=0.01, score_seconds=0.001, requests=1.0, bytes=2e5, load_variation=0.3,
    score_variation=0.3, start_seconds=0.0,
)  # fmt: skip


def cluster(gpus: int, cpus: int) -> Cluster:
    """With a loader for each CPU that nothing else needs, and a driver that is quick."""
    loaders = cpus - gpus - CLUSTER.tasks
    ahead = 8 * (gpus + loaders)
    return CLUSTER._replace(
        gpus=gpus, cpus=cpus, scorers=gpus, writers=gpus, loaders=loaders, slabs_ahead=ahead, driver_slab_seconds=0.0
    )


WORK = Workload(1000, 300_000, Look(34_000, 2000), Look(34_000, 2000), 518_400.0)


@pytest.mark.parametrize(
    ("gpus", "gpu_rate", "cpu_rate"), [(1, 1500, 110), (3, 100, 90), (7, 333, 50), (30, 1500, 110)]
)
def test_at_the_balanced_ratio_both_kinds_are_busy(gpus, gpu_rate, cpu_rate):
    rates = RATE._replace(core_seconds=1 / cpu_rate, score_seconds=1 / gpu_rate)
    work = WORK._replace(first=Look(34_000_000, 2_000_000), second=Look(0, 0))
    some = cluster(gpus=gpus, cpus=100)
    wanted = balance(line_of(17, rates, some, 0), some)
    said = forecast(work, rates, cluster(gpus=gpus, cpus=wanted["cpus"]), Prices())
    loading = wanted["cpus"] - gpus - CLUSTER.tasks
    assert said["first_look"]["busy"]["scoring"] > 0.9
    # Of the last core less than all is needed.
    assert said["first_look"]["busy"]["cpus"] > 0.9 * (loading - 1) / loading
    assert gpus <= said["balance"]["gpus"] <= gpus + 1 / wanted["cpus_per_gpu"] + 0.01


def test_the_two_looks_follow_one_another_and_each_has_to_start():
    alone = forecast(WORK._replace(second=Look(0, 0)), RATE, CLUSTER, Prices())
    both = forecast(WORK, RATE, CLUSTER._replace(driver_tomogram_seconds=3.6), Prices())
    later = forecast(WORK, RATE._replace(start_seconds=1800.0), CLUSTER, Prices())
    assert alone["second_look"] | {"most_slices_per_second": 0} == {
        "slices": 0, "slabs": 0, "hours": 0.0, "slices_per_second": 0.0, "most_slices_per_second": 0, "busy": {},
        "simulated_slabs": 0,
    }  # fmt: skip
    assert both["first_look"]["hours"] == both["second_look"]["hours"] == alone["hours"]
    assert both["hours"] == pytest.approx(2 * alone["hours"] + 1, abs=0.002)
    assert later["hours"] == pytest.approx(2 * alone["hours"] + 1, abs=0.002)


def test_money_is_machines_for_hours_and_requests():
    said = forecast(
        WORK, RATE._replace(requests=2.0), CLUSTER._replace(driver_tomogram_seconds=36.0), Prices(2.0, 0.05, 0.4)
    )
    assert said["requests"] == 136_000
    assert said["bytes"] == 68_000 * 200_000
    assert said["cost"]["gpus"] == pytest.approx(4 * 2.0 * said["hours"], rel=1e-3)
    assert said["cost"]["cpus"] == pytest.approx(100 * 0.05 * said["hours"], rel=1e-3)
    assert said["cost"]["requests"] == 54.4
    assert said["cost"]["total"] == pytest.approx(sum(list(said["cost"].values())[:3]), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({}, "scoring"),
        ({"cpus": 20}, "cpus"),
        ({"driver_slab_seconds": 0.1}, "driver"),
        ({"requests_per_second": 100.0}, "storage"),
        ({"network_gigabit": 0.5}, "network"),
        ({"slabs_per_file": 1, "writers": 1}, "files"),
    ],
)
def test_the_bottleneck_is_what_is_short(changes, bottleneck):
    said = forecast(WORK, RATE, CLUSTER._replace(**changes), Prices())
    busy = said["first_look"]["busy"]
    assert said["bottleneck"] == bottleneck
    assert max(busy, key=lambda name: busy[name]) == bottleneck
    assert said["first_look"]["slices_per_second"] == pytest.approx(
        min(said["first_look"]["most_slices_per_second"].values()), rel=0.05
    )


def test_without_gpus_loading_and_scoring_share_the_cores():
    rates = RATE._replace(core_seconds=0.01, score_seconds=0.09)
    said = forecast(WORK, rates, CLUSTER._replace(gpus=0, scorers=1, cpus=8), Prices())
    assert said["first_look"]["slices_per_second"] == pytest.approx(8 / 0.1, rel=0.01)
    assert said["balance"] == {}
    assert said["bottleneck"] == "scoring"


def test_tomograms_alike_are_what_the_plan_of_as_many_would_be():
    manifest, usual = manifest_of("x/slice_{z:04d}.jpg", (300, 960, 928), 7), RunSettings()
    one, other = workload_of(manifest, usual, 1.1), alike(7, (300, 960, 928), 13.3, usual, 1.1)
    assert one == other
    plan = pa.concat_tables(first_look(manifest, usual))
    assert one.first == Look(sum(map(len, plan["zs"].to_pylist())), len(plan))
    assert one.second.slices == round(1.1 * one.first.slices)
    assert one.looked_at < one.slices / 4


def test_every_slice_is_looked_at_once_if_that_is_asked_for():
    every = alike(3, (50, 90, 80), 13.1, settings_from({"detect": {"exhaustive": True}}), 1.1)
    assert (every.first.slices, every.second) == (150, Look(0, 0))


def test_frames_weigh_what_they_are_sent_with():
    spacing = FrameSettings(mode="spacing", size=256, spacing_angstrom=16.0)
    one = alike(1, (10, 960, 928), 16.0, RunSettings(frame=spacing), 0.0)
    assert one.frame_bytes % 256**2 == 0
    assert one.frame_bytes > 960 * 928


def take(load: float, cores: float, score: float) -> Take:
    return Take(SLABS.empty_table(), 10, load, cores, score, 2 * score, requests=20, bytes=1000)


def measured(gpus: int) -> Measured:
    sample = Sample([take(9.0, 9.0, 9.0), take(0.2, 0.1, 0.3), take(0.4, 0.1, 0.3)], start_seconds=7.0)
    return Measured(Room(16, gpus, 10**11, 10**10), Pools(1, 4, gpus, 10**9), sample, again=0.7)


def test_a_sample_gives_the_rates_that_are_not_given():
    rates = rates_of(Asked(), RunSettings(), 5.0, measured(1), gpus=1)
    assert rates == pytest.approx(
        Rates(
            core_seconds=0.04 / 3,
            wait_seconds=0.02,
            score_seconds=0.03,
            requests=2.0,
            bytes=100.0,
            load_variation=1 / 3,
            score_variation=0.0,
            start_seconds=7.0,
        )
    )
    asked = Asked(cpu_rate=50.0, gpu_rate=20.0, variation=0.0, gets_per_slice=3.0, slice_bytes=7.0, start_seconds=0.0)
    given = rates_of(asked, RunSettings(), 5.0, measured(1), gpus=4)
    assert given == pytest.approx(Rates(0.02, 0.02, 0.05, 3.0, 7.0, 0.0, 0.0, 0.0))


def test_what_a_cpu_scores_says_nothing_of_gpus_and_the_reverse():
    assert score_seconds(Asked(), measured(0), gpus=0) == pytest.approx(0.06)
    assert score_seconds(Asked(gpu_rate=100.0), measured(0), gpus=8) == 0.01
    for there, wanted in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="says nothing of"):
            score_seconds(Asked(), measured(there), gpus=wanted)


def test_the_actors_are_those_that_detect_would_plan():
    planned = cluster_of(Room(256, 8, 10**12, 2 * 10**11), Asked(), settings_from({"detect": {"loaders": 50}}))
    assert (planned.scorers, planned.loaders, planned.gpus) == (8, 50, 8)
    assert planned.slabs_ahead == 8 * 58
    assert DetectSettings().slabs_per_loader == planned.calls


def test_a_plan_is_one_json_object_and_a_few_lines(capsys, caplog):
    assert main([*GIVEN, *RATES, "--gpu-price", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tomograms"], said["slices"], said["first_look"]["slices"]) == (50, 15_000, 1700)
    assert said["bytes"] == said["requests"] * round(0.225 * 960 * 928)
    assert said["cost"]["gpus"] == pytest.approx(4 * said["hours"], abs=0.01)
    assert set(said["memory_gigabytes"]) == {"loaders", "scorers", "object_store", "total"}
    assert len([line for line in caplog.messages if "bottleneck" in line or "hours" in line]) == 2


def test_a_manifest_is_planned_for_without_a_model(tmp_path, capsys):
    from motor_ray.storage import write_table

    write_table(manifest_of("x/slice_{z:04d}.jpg", (300, 960, 928), 9), str(tmp_path / "m.parquet"))
    command = ["plan", "--manifest", str(tmp_path / "m.parquet"), "--gpus", "1", "--cpus", "20", *RATES]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["tomograms"] == 9


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*GIVEN], "--gpu-rate: slices that a GPU looks at in a second|--cpu-rate: slices that a core"),
        ([*GIVEN, "--gpu-rate", "5"], "--cpu-rate: slices that a core prepares"),
        ([*GIVEN, "--gpu-rate", "0", "--cpu-rate", "5"], "--gpu-rate 0: expected more than 0"),
        ([*GIVEN, "--gpu-rate", "nan", "--cpu-rate", "5"], "--gpu-rate nan: expected more than 0"),
        ([*GIVEN, "--gpu-rate", "5", "--cpu-rate", "inf"], "--cpu-rate inf: expected more than 0"),
        ([*GIVEN, *RATES, "--gpu-price", "-1"], "--gpu-price -1: expected 0 or more"),
        ([*GIVEN, *RATES, "--price-per-1000-gets", "-1"], "--price-per-1000-gets -1: expected 0 or more"),
        ([*GIVEN, *RATES, "--slices", "0"], "--slices 0: expected more than 0"),
        ([*GIVEN, *RATES, "--shape", "0", "5"], "--shape 0: expected more than 0"),
        ([*GIVEN, *RATES, "--model", "m"], "--model is measured on tomograms that are there"),
        ([*GIVEN, *RATES, "--archive", "a"], "give one of --archive, --manifest and --tomograms"),
        (["plan", *RATES], "give one of --archive, --manifest and --tomograms"),
        (["plan", "--tomograms", "5", *RATES], "--cpus: not given"),
        (["plan", "--tomograms", "5", "--cpus", "16", "--cpu-rate", "5"], "no GPUs and no model"),
        (["plan", "--tomograms", "5", "--cpus", "16", *RATES], "the cluster has no GPU; give --gpus"),
        (["plan", "--tomograms", "5", "--gpus", "1", "--cpus", "4", *RATES], "the cluster has 4 CPUs"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_with_the_reason(arguments, complaint, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert any(one in captured.err for one in complaint.split("|"))
    assert "Traceback" not in captured.err


def test_an_empty_archive_is_refused(tmp_path, capsys):
    assert main(["plan", "--archive", str(tmp_path), "--gpus", "1", "--cpus", "16", *RATES]) == 2
    assert "holds no tomogram" in capsys.readouterr().err


def test_the_simulation_knows_neither_ray_nor_torch():
    code = "import sys, motor_ray.capacity.forecast; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_of(seconds: float, rate: float, scorers: int = 1) -> Run:
    return Run(Steady(rate, 0.9), 5.0, seconds - 7.0, seconds, 10, {}, {"scorers": scorers})


def test_the_bench_foretells_what_it_was_calibrated_with():
    runs = [run_of(20.0, 180.0), run_of(22.0, 220.0)]
    calibration = calibrate(runs, SIZES, SETTINGS)
    assert foretell(CALIBRATION, calibration, SIZES, SETTINGS).seconds == pytest.approx(21.0)
    line, slabs = line_of_case(CALIBRATION, calibration.core_seconds, SIZES, SETTINGS)
    rates = [run.steady.slices_per_second for run in runs]
    assert line.cpus.rate * SIZES.shape[0] * SIZES.tomograms * CALIBRATION.times / slabs == pytest.approx(
        1 / (sum(1 / rate for rate in rates) / 2)
    )
    said = compare(Foretold(24.2, 12.0), runs[1])
    assert (said["run_error"], said["scoring_error"]) == (0.1, -0.2)


def test_the_bench_foretells_a_device_that_is_always_busy_to_take_all_its_time():
    foretold = foretell(CASES["a device of 10 ms"], Calibration(0.0001, 9.0), SIZES, SETTINGS)
    slices = SIZES.shape[0] * SIZES.tomograms
    assert foretold.seconds == pytest.approx(9.0 + 0.01 * slices, rel=0.01)
    assert foretold.scoring_seconds == pytest.approx(0.01 * slices, rel=0.05)
