"""One look for all progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
    """A bar on standard error, gone when done; nothing is drawn where nobody watches (not a terminal).

    Yields:
        `advance(count=1, status="")`: adds to the bar and shows a short status beside it.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, status="")

        def advance(count: int = 1, status: str = "") -> None:
            if status:
                progress.update(task, status=status)
            progress.advance(task, count)

        yield advance
