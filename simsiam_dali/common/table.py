"""Tables for a terminal, aligned by the columns that each character takes there (CJK takes two)."""

from collections.abc import Sequence

from rich.cells import cell_len


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The head and the rows as lines, each column as wide as its widest cell."""
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
