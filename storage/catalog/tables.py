"""Rows for tables that a terminal of 120 columns has room for.

Enters: rows of words. Leaves: rows of words that fit. Costs: nothing.
"""

import re
import textwrap
from collections.abc import Sequence as Seq

from stillroom.storage.files import open_files

#: Columns of a terminal, and how many of them stand between two of a table (and half of them at each end).
_WIDTH, _BETWEEN = 120, 3

#: Columns that a wrapped column keeps, however little room there is.
_NARROWEST = 24

#: Columns that a path may take before the others give way, and those that it keeps when they cannot.
_PATH, _SHORTEST_PATH = 40, 16


def fitted(
    rows: list[dict[str, str]], elastic: Seq[str], wrapped: str | None = None, *, path: str = "store", fold: bool
) -> list[dict[str, str]]:
    """Rows whose table fits: the widest of the columns that may gives way.

    elastic: columns whose values are shortened. wrapped: one whose values are kept whole, over several lines, broken
    between words. path: one whose values are to be copied. fold: break these where they are too long, as a terminal
    would; else they stay on their line, and the table is as much wider.
    """
    if not rows:
        return rows
    longest = _widths(rows)[path]
    others = _narrowed([_without(row, path) for row in rows], _WIDTH - min(longest, _PATH) - _BETWEEN, elastic, wrapped)
    room = _WIDTH - _total(others) - _BETWEEN
    paths = [_folded(row[path], max(room, _SHORTEST_PATH)) if fold else row[path] for row in rows]
    return [{path: whole, **other} for whole, other in zip(paths, others, strict=True)]


def _narrowed(rows: list[dict[str, str]], most: int, elastic: Seq[str], wrapped: str | None) -> list[dict[str, str]]:
    whole = [row[wrapped] for row in rows] if wrapped else []
    narrow = False
    while _total(rows) > most:
        widths = _widths(rows)
        widest = max([*elastic, *([wrapped] if wrapped and not narrow else [])], key=lambda name: widths[name])
        if widest == wrapped:
            before = widths[widest]
            lines = [_lines(text, before - 1) for text in whole]
            rows = [row | {widest: text} for row, text in zip(rows, lines, strict=True)]
            narrow = _widths(rows)[widest] >= before or before - 1 <= _NARROWEST
            continue
        if widths[widest] <= len(widest):
            break  # headings are not cut
        rows = [row | {widest: shortened(row[widest], widths[widest] - 1)} for row in rows]
    return rows


def _without(row: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != name}


def _folded(path: str, width: int) -> str:
    """Over several lines, broken behind a slash where there is one."""
    lines = [""]
    for piece in re.findall(r"[^/]*/|[^/]+", path):
        if len(lines[-1]) + len(piece) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(lines)


def _lines(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


def _widths(rows: Seq[dict[str, str]]) -> dict[str, int]:
    return {name: max(len(name), *(len(line) for row in rows for line in row[name].split("\n"))) for name in rows[0]}


def _total(rows: Seq[dict[str, str]]) -> int:
    return sum(width + _BETWEEN for width in _widths(rows).values())


def shortened(text: str, width: int) -> str:
    """The end is kept, and so is the beginning, as names differ there."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - 1 - width // 2) :]}"


def relative(uri: str, root: str) -> str:
    """`uri` below `root`; as it is where it lies elsewhere."""
    base = open_files(root).uri
    return "." if uri == base else uri.removeprefix(f"{base}/")


def scaled(number: float) -> str:
    """40960 → "41.0 k"."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if not unit or number >= 99.95 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.0f} P"


def shown(number: float | None, form: str, unit: str = "") -> str:
    """Up to five digits before the point as they are: `.3g` would make 1,234 hours 1.23e+03."""
    if number is None:
        return "–"
    return f"{number:,.0f}{unit}" if form.endswith("g") and 999.5 <= abs(number) < 1e6 else f"{number:{form}}{unit}"
