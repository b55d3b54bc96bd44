"""A square table that stays readable in a narrow terminal. It loads rich: import it where used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

__all__ = ["Matrix"]


def _widest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


@dataclass(frozen=True, repr=False)
class Matrix(JupyterMixin):
    """A table with a row and a column for each of n things, laid out when its width is known.

    Columns that do not fit follow below. Names that are wider than the cells, and so keep columns
    from fitting, give way to numbers, which the rows then have too.

    Attributes:
        title: A line above.
        rows: [n] what each is called, in full.
        columns: [n] the same, in short.
        entries: [n] the first column: entries of each.
        cells: [n][n] as they are written.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    entries: Sequence[str]
    cells: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        n, rows, columns = len(self.rows), self.rows, self.columns
        cell = _widest(text for row in self.cells for text in row)
        beside = self._fitting(options.max_width, rows, max(cell, _widest(columns)))
        if beside < n and _widest(columns) > cell:
            columns = [str(i) for i in range(1, n + 1)]
            digits = len(columns[-1])
            rows = [f"{i:>{digits}} {row}" for i, row in zip(columns, rows, strict=True)]
            beside = self._fitting(options.max_width, rows, max(cell, digits))
        # Not the table's own title, which would be wrapped to the width of its columns.
        yield Text(self.title)
        for first in range(0, n, beside):
            part = slice(first, first + beside)
            table = Table(box=SIMPLE_HEAD, padding=0)
            table.add_column(overflow="fold")
            table.add_column("entries", justify="right", no_wrap=True)
            for column in columns[part]:
                table.add_column(Text(column), justify="right", no_wrap=True)
            for row, entries, cells in zip(rows, self.entries, self.cells, strict=True):
                table.add_row(Text(row), entries, *cells[part])
            yield table

    def _fitting(self, width: int, rows: Sequence[str], column: int) -> int:
        """How many columns of a width stand beside each other, at least one."""
        # A space before each column and one at the end; a long name may fold to half the width.
        names = 1 + min(_widest(rows), width // 2)
        entries = 1 + _widest(["entries", *self.entries])
        return max(1, (width - names - entries - 1) // (1 + column))
