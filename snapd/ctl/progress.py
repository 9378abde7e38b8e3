"""The progress bar: on standard error, and only where somebody watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar that lives as long as the context; does nothing unless standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    figures = (DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(
        TextColumn("{task.description}"), BarColumn(), *figures, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
