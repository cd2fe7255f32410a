"""A bar on stderr while long work runs on this machine; results go to stdout."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Show(Protocol):
    """Sets how much is done, and a text beside the bar."""

    def __call__(self, done: int, text: str = "") -> None:
        """Draw it."""


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Show]:
    """A bar that is drawn while the block runs; where stderr is a file, one line when it ends."""
    console = Console(stderr=True)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, text="")

        def show(done: int, text: str = "") -> None:
            bar.update(task, completed=done, text=text)

        yield show
    if not console.is_terminal:
        console.print(f"{title}: {total} {unit}, done", highlight=False)
