"""How well the endpoint uses a machine, and what it does beyond its limits: real requests over loopback, in one run.

    latency     a request of one client against the direct call of the same model on the same image, in turn
    throughput  sixteen clients against direct calls on as many images as the endpoint looks at together, in turn
    device      sixteen clients of a stand-in that takes 10 ms a slice: is it ever kept waiting?
    overload    four times as many requests as such a device can take
    kill        detectors killed under load
    memory      what the upload of a large tomogram takes

The endpoint runs in processes of its own, as `motor-ray serve` starts it. What is asked of each figure stands beside
it.
"""

import asyncio
import importlib.util
import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from motor_ray.bench.load import (
    ANSWERED,
    REFUSED,
    Clients,
    Picture,
    closed_loop,
    fates,
    percentile,
    rate_of,
    send_at_rate,
    spread,
)
from motor_ray.bench.serve_stand import USUAL, Sizes, Stand, direct_answer, write_sparse
from motor_ray.bench.served import Shares, memory_sampled, wait_for
from motor_ray.bench.timing import machine
from motor_ray.bench.verdict import Wanted, judge, rounded
from motor_ray.client import Client
from motor_ray.detector.device import pick_device
from motor_ray.distributed.answering import Answerer
from motor_ray.errors import RunError
from motor_ray.service.settings import ServeSettings

Part = Literal["latency", "throughput", "device", "overload", "kill", "memory"]
PARTS: tuple[Part, ...] = get_args(Part)

ALLOWED_SECONDS = 0.008
"""What a request may take besides its share of the direct call."""

WANTED: Wanted = {
    "latency": ("<=", 1.15, "median seconds of a request, less 8 ms, over those of the direct call"),
    "throughput": (">=", 0.95, "slices/s of sixteen clients, over those of direct calls on whole batches"),
    "device_share": (">=", 0.95, "slices/s of sixteen clients, of what a device of 10 ms a slice can take"),
    "overload_lost": ("<=", 0, "requests neither answered rightly nor refused with 429 or 503, of all"),
    "overload_answered": (">=", 0.9, "slices/s answered meanwhile, of what the device can take"),
    "overload_p99": (
        "<=",
        3.0,
        "99th percentile of the answered, over the time that the device takes for a full queue",
    ),
    "overload_memory": ("<=", 0.10, "growth of all processes from the first third of the overload to the last"),
    "recovery_seconds": ("<=", 5.0, "from the overload's end until a single request is as fast as before"),
    "kill_wrong": ("<=", 0, "wrong answers while detectors are killed"),
    "kill_failed": ("<=", 0, "requests that failed meanwhile although the client sent them again"),
    "upload_megabytes": ("<=", 300.0, "growth of the ingress and HAProxy together while a tomogram is uploaded"),
}
"""What is asked of each figure, and what it is."""

log = logging.getLogger(__name__)


def bench_serve(parts: Sequence[Part] = PARTS, sizes: Sizes = USUAL) -> dict[str, Any]:
    """Measure the `parts`; returns what is asked and found, and beside it all that was measured.

    Raises RunError if something that it needs is not installed, UnfinishedError if an endpoint does not get ready.
    """
    if importlib.util.find_spec("psutil") is None:
        raise RunError("bench serve needs psutil; pip install 'motor-ray[bench]'")
    started = machine(pick_device())
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="motor-ray-bench-") as folder:
        stand = Stand(Path(folder), sizes, count())
        for part in (one for one in PARTS if one in parts):
            load = os.getloadavg()[0]
            measured[part] = MEASURES[part](stand) | {"load_average_before": round(load, 2)}
            log.info("%s: %s", part, {name: round(value, 4) for name, value in measured[part]["figures"].items()})
    figures = {name: figure for part in measured.values() for name, figure in part.pop("figures").items()}
    return {
        "requirements": judge(figures, WANTED),
        "machine": started | {"load_average_at_the_end": machine(pick_device())["load_average"]},
        "sizes": sizes._asdict(),
        **measured,
    }


def measure_latency(stand: Stand) -> dict[str, Any]:
    """Part latency: the two take turns, so that a slow spell strikes both."""
    seconds: dict[str, list[float]] = {"direct": [], "request": []}
    with stand.real() as (endpoint, direct, pictures), Client(endpoint.url, retries=0) as client:
        data = pictures[0].data
        contestants: dict[str, Callable[[], dict[str, Any]]] = {
            "direct": lambda: direct_answer(direct, data),
            "request": lambda: client.slice(data),
        }
        said = {name: ask() for name, ask in contestants.items()}
        parts = []
        for _ in range(stand.sizes.requests):
            for name, ask in contestants.items():
                started = time.perf_counter()
                said[name] = ask()
                seconds[name].append(time.perf_counter() - started)
            parts.append(said["request"]["seconds"])
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    own = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    return {
        "figures": {"latency": (medians["request"] - ALLOWED_SECONDS) / medians["direct"]},
        "median_seconds": medians,
        "overhead_milliseconds": 1000 * (medians["request"] - medians["direct"]),
        "median_seconds_the_endpoint_tells": own,
        "overhead_milliseconds_besides_the_network": 1000 * (medians["request"] - own["model"] - own["prepare"]),
        "presence": {name: one["presence"] for name, one in said.items()},
        "detections": len(said["request"]["detections"]),
        "seconds": seconds,
    }


def measure_throughput(stand: Stand) -> dict[str, Any]:
    """Part throughput: direct calls prepare their images, too; what they do on prepared ones is told beside."""
    sizes, batch = stand.sizes, ServeSettings().batch_images
    rates: dict[str, list[float]] = {"direct": [], "direct_on_prepared": [], "clients": []}
    with stand.real() as (endpoint, direct, pictures):
        calls = max(sizes.images // 2 // batch, 1)
        direct_rates(direct, pictures, batch, 1)
        for _ in range(sizes.rounds):
            whole, prepared = direct_rates(direct, pictures, batch, calls)
            rates["direct"].append(whole)
            rates["direct_on_prepared"].append(prepared)
            rates["clients"].append(rate_of(closed_loop(endpoint.url, pictures, sizes.clients, sizes.images)))
        whole, prepared = direct_rates(direct, pictures, batch, calls)
        rates["direct"].append(whole)
        rates["direct_on_prepared"].append(prepared)
    medians = {name: statistics.median(of) for name, of in rates.items()}
    return {
        "figures": {"throughput": medians["clients"] / medians["direct"]},
        "over_direct_on_prepared": medians["clients"] / medians["direct_on_prepared"],
        "slices_per_second": rates,
        "images_together": batch,
    }


def measure_device(stand: Stand) -> dict[str, Any]:
    """Part device."""
    sizes = stand.sizes
    with stand.stand_in(sizes.frame, sizes.shape, sizes.jpeg_bytes) as (endpoint, pictures, _, _):
        before = endpoint.cpu()
        done = closed_loop(endpoint.url, pictures, sizes.clients, sizes.device_images)
        taken = endpoint.cpu_since(before)
    rate = rate_of(done)
    return {
        "figures": {"device_share": rate * sizes.device_seconds},
        "slices_per_second": rate,
        "cpu_milliseconds_per_request": per_request(taken, len(done) + sizes.clients),
        "seconds": spread([one.seconds for one in done]),
        "requests": fates(done),
    }


def measure_overload(stand: Stand) -> dict[str, Any]:
    """Part overload: requests come when they are due, whatever becomes of those before them."""
    sizes = stand.sizes
    with stand.stand_in(sizes.small_frame, sizes.small_shape, 4000) as (endpoint, pictures, limits, _):
        rate = sizes.overload / sizes.device_seconds
        with memory_sampled(endpoint) as samples:
            started, before = time.monotonic(), endpoint.cpu()
            done, recovery = asyncio.run(send_at_rate(endpoint.url, pictures, rate, sizes.overload_seconds))
        taken = endpoint.cpu_since(before)
    answered = [one for one in done if one.status == ANSWERED]
    lost = [one for one in done if one.status not in REFUSED and not one.right]
    first, last = thirds(samples, started, started + sizes.overload_seconds)
    full_queue = limits.queue * sizes.device_seconds
    return {
        "figures": {
            "overload_lost": len(lost),
            "overload_answered": rate_of(answered) * sizes.device_seconds,
            "overload_p99": percentile([one.seconds for one in answered], 99) / full_queue,
            "overload_memory": sum(last.values()) / sum(first.values()) - 1,
            "recovery_seconds": recovery,
        },
        "requests": fates(done),
        "due_per_second": rate,
        "cpu_milliseconds_per_request": per_request(taken, len(done)),
        "full_queue_seconds": full_queue,
        "seconds_of_the_answered": spread([one.seconds for one in answered]),
        "seconds_of_the_refused": spread([one.seconds for one in done if one.status in REFUSED]),
        "seconds_that_they_were_sent_late": spread([one.sent - one.due for one in done]),
        "megabytes": {"first_third": rounded(first), "last_third": rounded(last)},
    }


def measure_kill(stand: Stand) -> dict[str, Any]:
    """Part kill: one of several detectors each time, when all are ready."""
    from motor_ray.bench.serve_device import StandIn, ready_here

    sizes = stand.sizes
    killed: list[float] = []
    with stand.stand_in(sizes.small_frame, sizes.small_shape, 4000, sizes.detectors) as unreal:
        endpoint = unreal.endpoint

        def ready() -> set[int]:
            return ready_here(unreal.ready) & endpoint.processes(StandIn.__name__)

        clients = Clients(endpoint.url, unreal.pictures, retries=8)
        with clients.asking(sizes.kill_clients):
            for number in range(sizes.kills):
                wait_for(lambda: len(ready()) >= sizes.detectors, 120, "no new detector was ready")
                time.sleep(1.0)  # until requests come to it, too
                os.kill(min(ready()), signal.SIGKILL)
                killed.append(time.monotonic())
                log.info("killed detector %d of %d", number + 1, sizes.kills)
            time.sleep(2.0)
    done = clients.done
    return {
        "figures": {
            "kill_wrong": sum(one.status == ANSWERED and not one.right for one in done),
            "kill_failed": sum(one.status != ANSWERED for one in done),
        },
        "requests": fates(done),
        "sent_again_by_the_client": clients.client.retried,
        "seconds_between_kills": [round(later - one, 1) for one, later in pairwise(killed)],
        "seconds": spread([one.seconds for one in done]),
        "under_way_when_killed": [sum(one.sent < when < one.ended for one in done) for when in killed],
    }


def measure_memory(stand: Stand) -> dict[str, Any]:
    """Part memory: the tomogram is forgotten again once it is there."""
    sizes, path = stand.sizes, stand.new_folder() / "large.mrc"
    size = write_sparse(path, sizes.upload_shape)
    with stand.stand_in(sizes.small_frame, sizes.small_shape, 4000) as unreal, Client(unreal.endpoint.url) as client:
        for picture in unreal.pictures:
            client.slice(picture.data)
        before = unreal.endpoint.memory()
        with memory_sampled(unreal.endpoint) as samples:
            started = time.monotonic()
            record = client.tomogram(path, wait=False)
            seconds = time.monotonic() - started
        client.forget(record["id"])
    path.unlink()
    highest = {name: max(taken.get(name, 0.0) for _, taken in samples) for name in before}
    return {
        "figures": {"upload_megabytes": sum(highest[name] - before[name] for name in ("Ingress", "haproxy"))},
        "megabytes_sent": size / 1e6,
        "seconds": seconds,
        "megabytes": {"before": rounded(before), "highest": rounded(highest)},
    }


MEASURES: dict[Part, Callable[[Stand], dict[str, Any]]] = {
    "latency": measure_latency,
    "throughput": measure_throughput,
    "device": measure_device,
    "overload": measure_overload,
    "kill": measure_kill,
    "memory": measure_memory,
}


def direct_rates(direct: Answerer, pictures: Sequence[Picture], batch: int, calls: int) -> tuple[float, float]:
    """Slices a second of `calls` on `batch` images each: with preparing them, and without."""
    most, looking, started = ServeSettings().image_pixels, 0.0, time.perf_counter()
    for call in range(calls):
        chosen = [pictures[(call * batch + place) % len(pictures)] for place in range(batch)]
        prepared = [direct.prepare_picture(picture.data, None, most) for picture in chosen]
        began = time.perf_counter()
        direct.look(prepared)
        looking += time.perf_counter() - began
    return calls * batch / (time.perf_counter() - started), calls * batch / looking


def thirds(samples: Sequence[tuple[float, Shares]], start: float, end: float) -> tuple[Shares, Shares]:
    """Medians of the first third of the time and of the last, by name."""
    third = (end - start) / 3

    def median_of(low: float, high: float) -> Shares:
        within = [taken for when, taken in samples if low <= when <= high] or [taken for _, taken in samples]
        names = {name for taken in within for name in taken}
        return {name: statistics.median(taken.get(name, 0.0) for taken in within) for name in names}

    return median_of(start, start + third), median_of(end - third, end)


def per_request(seconds: Shares, requests: int) -> Shares:
    """Milliseconds a request, by name."""
    return {name: round(1000 * taken / requests, 2) for name, taken in sorted(seconds.items())}
