"""How wide the table of some rows is."""

from collections.abc import Sequence as Seq


def width(rows: Seq[dict[str, str]]) -> int:
    """Columns of a terminal, three between two of the table among them."""
    columns = [[name, *(line for row in rows for line in row[name].split("\n"))] for name in rows[0]]
    return sum(max(map(len, column)) + 3 for column in columns)
