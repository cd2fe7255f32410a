import asyncio
import resource
import struct

import numpy as np
import pytest

from motor_ray.archive.mrc import HEADER_BYTES, parse_header
from motor_ray.errors import BusyError, MotorRayError, SliceCorruptError, TomogramError
from motor_ray.service.intake import MOST_SLICES, SPACINGS, Room, aside, check_volume, undisturbed
from motor_ray.service.jobs import Jobs
from motor_ray.service.problems import ProblemError
from motor_ray.storage import DEFAULTS
from tests.service.asking import ask
from tests.service.stand_ins import app_of, mrc

RNG = np.random.default_rng(0)
MOST = 10_000


def test_room_is_given_back_whatever_happens():
    room = Room(10)

    def fail() -> None:
        with room.for_bytes(4):
            raise KeyError

    with room.for_bytes(6):
        with pytest.raises(KeyError):
            fail()
        with pytest.raises(BusyError), room.for_bytes(5):
            pass
        with pytest.raises(ProblemError), room.for_bytes(11):
            pass
        assert room.taken == 6
    assert room.taken == 0


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((1, 100, 100), None), ((MOST_SLICES, 16, 16), SPACINGS[0]), ((5, 50, 200), SPACINGS[1]), ((5, 50, 50), 13.3)],
)
def test_a_tomogram_within_reason_is_taken(shape, spacing):
    check_volume(shape, spacing, MOST)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        *(((1, 100, 101), None), ((MOST_SLICES + 1, 16, 16), None), ((5, 15, 100), None), ((5, 100, 1), None)),
        *(((5, 50, 50), spacing) for spacing in (1e-30, 0.099, 1001.0, 1e30, float("inf"), float("nan"))),
    ],
)
def test_one_beyond_reason_is_not(shape, spacing):
    with pytest.raises((TomogramError, SliceCorruptError)):
        check_volume(shape, spacing, MOST)


def test_who_is_cancelled_waits_for_what_is_under_way():
    told: list[object] = []

    class Slow:
        def __enter__(self):
            told.append("in")
            return self

        def __exit__(self, kind, error, trace):
            told.append(kind)

        def write(self, gate, loop):
            told.append("begun")
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
            told.append("written")
            raise OSError

    async def cancelled() -> None:
        gate, loop = asyncio.Event(), asyncio.get_running_loop()

        async def use() -> None:
            async with aside(Slow()) as file:
                await undisturbed(file.write, gate, loop)

        task = asyncio.create_task(use())
        while "begun" not in told:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert told == ["in", "begun", "written", asyncio.CancelledError]


def headers() -> list[bytes]:
    """MRC files of several kinds."""
    shapes = [(3, 20, 24), (1, 16, 16), (7, 30, 17)]
    files = [
        mrc(RNG.integers(-9, 9, shape).astype(kind)) for shape in shapes for kind in ("i1", "i2", "f4", "u2", "f2")
    ]
    big = bytearray(files[1])
    big[:96] = struct.pack(">24i", *struct.unpack("<24i", bytes(big[:96])))
    big[212:216] = b"\x11\x11\x00\x00"
    return [*files, bytes(big), mrc(np.zeros((2, 20, 20), np.int8), 0)]


WORDS = [0, 1, -1, 2, 255, 1024, 2**20, 2**20 + 1, 2**31 - 1, -(2**31), 0x7F800000, 0x7FC00000, 0x00000001, 0x7F7FFFFF]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with words of its header, or any bytes, changed, or a part of it gone."""
    made = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        match rng.integers(5):
            case 0 | 1:
                word = WORDS[rng.integers(len(WORDS))]
                struct.pack_into("<>"[rng.integers(2)] + "i", made, 4 * int(rng.integers(56)), word)
            case 2:
                made[rng.integers(224)] = rng.integers(256)
            case 3:
                made[rng.integers(len(made))] ^= 1 << int(rng.integers(8))
            case _:
                if rng.random() < 0.2:
                    del made[rng.integers(230, len(made)) :]
    return bytes(made)


def test_4000_damaged_headers_are_understood_or_refused_and_nothing_else():
    rng, seeds, understood = np.random.default_rng(1), headers(), 0
    messages: list[str] = []
    for number in range(4000):
        data = mutated(seeds[number % len(seeds)], rng)
        size = len(data) if rng.random() < 0.7 else int(rng.integers(0, 2**40))
        given = [None, 13.0][rng.integers(2)]
        try:
            header = parse_header(data[:HEADER_BYTES], size, "The tomogram", given)
            check_volume(header.shape, header.voxel_spacing_angstrom, MOST)
        except MotorRayError as error:
            messages.append(str(error))
            continue
        understood += 1
        assert min(header.shape) >= 1
        assert header.slice_bytes <= 4 * MOST
        assert HEADER_BYTES <= header.data_offset <= size
        assert header.voxel_spacing_angstrom is None or 0.1 <= header.voxel_spacing_angstrom <= 1000
    assert 200 < understood < 3800
    assert "\n" not in "".join(messages)


class Nowhere(Jobs):
    """Keeps voxels, and forgets all else."""

    def submit(self, record):
        pass


def test_2000_damaged_tomograms_are_taken_or_refused_and_nothing_else(backend, tmp_path):
    rng, seeds = np.random.default_rng(2), headers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jobs = Nowhere(str(tmp_path), DEFAULTS)
    app = app_of(backend, str(tmp_path), jobs=jobs, tomogram_bytes=10**6, image_pixels=MOST)
    damaged = (mutated(seeds[number % len(seeds)], rng) for number in range(2000))
    statuses = {ask(app, "POST", "/v1/tomograms", data).status for data in damaged}
    assert statuses == {202, 422}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
