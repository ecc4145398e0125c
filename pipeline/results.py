"""What a command found, on stdout: one JSON object, or tables for people.

Enters: the JSON-able dict that a command returns. Leaves: text on a stream. Costs: nothing that counts.

A value's unit is in its name, as everywhere here: `_bytes`, `_s`, `_per_s`. Scalars become one table of two columns,
nested mappings are named with dots, a list of mappings becomes a table of its own.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

from stillroom.pipeline.console import format_bytes, format_count, format_duration, print_table, rich_console

#: The column of a path, which is to be copied.
PATH = "store"
#: The key of a row's sentences.
NOTICES = "notices"


def print_json(result: dict[str, Any], stream: TextIO) -> None:
    """One object on one line. JSON has no NaN and no infinity: they become null."""
    print(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False), file=stream, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_tables(result: dict[str, Any], stream: TextIO) -> None:
    """Notices, which are sentences, come as lines below the table that they would make unreadable."""
    rich = rich_console(stream)
    scalars = [(name.replace("_", " "), cell(name, value)) for name, value in _flat(result) if not _is_table(value)]
    if scalars:
        print_table(rich, None, scalars)
    for title, rows in _tables(result):
        flat = [{key: value for key, value in _flat(row) if not _is_table(value) and key != NOTICES} for row in rows]
        columns = list(dict.fromkeys(key for row in flat for key in row))
        cells = [[cell(key, row.get(key)) for key in columns] for row in flat]
        print_table(rich, [key.replace("_", " ") for key in columns], cells, title=title, whole=PATH)
        for row in rows:
            for notice in row.get(NOTICES) or []:
                rich.print(f"notice: {row.get('name', title)}: {notice}", markup=False, highlight=False, soft_wrap=True)


def _tables(result: dict[str, Any], above: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every list of mappings with its name, those inside of its rows after it."""
    for name, value in _flat(result):
        if _is_table(value):
            title = f"{above}{name.replace('_', ' ')}"
            yield title, value
            for number, row in enumerate(value):
                yield from _tables(row, f"{title} {number}: ")


def cell(name: str, value: Any) -> str:
    """A value in the unit that its name states.

    >>> cell("size_bytes", 1_300_000), cell("tokens", 113108), cell("wall_s", 200), cell("kl_after", 0.51234)
    ('1.3 MB', '113,108', '3 min 20 s', '0.512')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        words = name.rpartition(".")[2].split("_")
        if words[-1] == "bytes":
            return format_bytes(value)
        if words[-1] == "s" and "per" not in words:
            return format_duration(value)
        return format_count(value)
    if isinstance(value, list):
        return ", ".join(cell(name, item) for item in value) or "none"
    return str(value)


def _flat(result: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
