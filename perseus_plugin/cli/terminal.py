"""What commands print: to a terminal as wide as it is, else whole; progress only to a terminal that watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

_WHOLE = 4096  # columns, more than any table has

Tell = Callable[[float, str], None]
"""How much has been done, of the total, and what is said of it."""


def console(*, stderr: bool = False) -> Console:
    """Standard output or error for text and tables; nothing is cut or wrapped where it is no terminal."""
    made = Console(stderr=stderr, highlight=False, markup=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=_WHOLE)


def say(text: str, to: Console | None = None) -> None:
    """A line, which the terminal itself may wrap; nothing where there is no text."""
    if not text:
        return
    (to or console()).print(text, soft_wrap=True)


def columns(*names: str) -> Table:
    """A table of these columns, without lines."""
    from rich.table import Table

    return Table(*names, box=None, pad_edge=False)


def fits(table: Table, to: Console) -> bool:
    """Whether a table is no wider than what it is printed to."""
    return to.measure(table, options=to.options.update(width=_WHOLE)).maximum <= to.width


@contextmanager
def progress(what: str, total: float) -> Iterator[Tell]:
    """A bar on standard error, gone at the end; none where that is no terminal.

    Args:
        what: is done.
        total: of what `Tell` is told.
    """
    to = console(stderr=True)
    if not to.is_terminal:
        yield lambda done, said: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=to, transient=True) as bar:
        to.show_cursor()  # a command may be ended at any time, and nobody shows it then
        task = bar.add_task(what, total=total)
        yield lambda done, said: bar.update(task, completed=min(done, total), description=said or what)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Something moves on standard error while that is done; nothing is there where that is no terminal."""
    to = console(stderr=True)
    if not to.is_terminal:
        yield
        return
    with to.status(what, spinner="line"):
        to.show_cursor()
        yield
