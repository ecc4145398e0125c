"""Small pieces of the page: escaped text, numbers with units, tables, figures.

Enters: values. Leaves: HTML. Costs: nothing.
"""

import html
import json
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from stillroom.pipeline.console import format_bytes, format_duration

NONE = "–"


def esc(value: object) -> str:
    """Text as text, in elements and in attributes."""
    return html.escape(str(value), quote=True)


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    return NONE if value is None else format_bytes(value)


def seconds(value: float | None) -> str:
    return NONE if value is None else format_duration(value)


def number(value: float | None, digits: int, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: no `<` is left in it, so nothing can end the element.

    >>> script_json("</script>")
    '"\\\\u003c/script>"'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def key(variable: str) -> str:
    """A square of this colour."""
    return f'<span class="key" style="background:var({variable})"></span>'


def table(columns: Seq[str], rows: Iterable[Seq[str]], *, caption: str = "", name: str = "") -> str:
    """Cells are markup already; the first of a row is its heading. Wider than the page, it scrolls by itself."""
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    said = f"<caption>{esc(caption)}</caption>" if caption else ""
    label = esc(caption or name or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{said}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(name: str, title: str, words: str, numbers: str) -> str:
    """A plot's place, its title, what it shows for those who do not see it, and its numbers as a table."""
    return (
        f'<figure><h3>{esc(title)}</h3><div class="plot" id="{esc(name)}" role="img" aria-label="{esc(words)}"></div>'
        f"<figcaption><details><summary>Numbers</summary>{numbers}</details></figcaption></figure>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Values, markup already, with their names."""
    return '<dl class="facts">' + "".join(f"<div><dt>{esc(k)}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"


def section(anchor: str, title: str, body: str) -> str:
    head = f'<h2 id="{anchor}-title">{esc(title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{head}{body}</section>'
