"""What a device's scorer writes down while a contestant runs, and what rates follow from it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

WARM_UP = 1 / 3
"""Share of the slices that is not steady state yet."""


class Note(NamedTuple):
    """A slab, or a batch of another contestant's, that was scored."""

    began: float
    """When the device got it: ``time.monotonic()``, which is one clock for all processes of a machine."""

    ended: float
    slices: int
    row_bytes: int
    """What it weighed on its way to the scorer."""


class Steady(NamedTuple):
    """A contestant's steady state."""

    slices_per_second: float
    busy: float
    """Share of the time in which the device had something in hand."""


class Notebook:
    """A file of notes; every process appends whole lines to it."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @contextmanager
    def noting(self, slices: int, row_bytes: int) -> Iterator[None]:
        """Note that `slices` are scored while the block runs."""
        began = time.monotonic()
        yield
        note = Note(began, time.monotonic(), slices, row_bytes)
        with self._path.open("a") as file:
            file.write(" ".join(map(repr, note)) + "\n")


def read_notes(path: str | Path) -> list[Note]:
    """The notes in a file, in the order in which they ended."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    notes = [Note(float(began), float(ended), int(slices), int(size)) for began, ended, slices, size in lines]
    return sorted(notes, key=lambda note: note.ended)


def steady_state(notes: Sequence[Note]) -> Steady:
    """Rates from the end of the note with which the first third of the slices is done to the end of the last.

    `notes` are in the order in which they ended, of one scorer or of several at a time. Raises ValueError if none is
    left for the steady state.
    """
    total, done, first = sum(note.slices for note in notes), 0, 0
    while done < WARM_UP * total:
        done += notes[first].slices
        first += 1
    rest = notes[first:]
    if not rest:
        raise ValueError(f"{len(notes)} notes of {total} slices leave none for the steady state; measure more slices")
    start = notes[first - 1].ended
    span = rest[-1].ended - start
    busy = sum(note.ended - max(note.began, start) for note in rest)
    return Steady(sum(note.slices for note in rest) / span, busy / span)
