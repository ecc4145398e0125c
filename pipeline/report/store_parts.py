"""The page's parts about a store, and the token viewer's frame.

Enters: what `store_data.gather_store` found. Leaves: HTML, and figures for the page's script. Costs: nothing that
counts.
"""

from collections.abc import Sequence as Seq
from typing import Any

from stillroom.pipeline.report import plots
from stillroom.pipeline.report.data import teacher_shown
from stillroom.pipeline.report.markup import count, esc, facts, figure, key, number, section, share, size, table


def store(found: dict[str, Any], at: int, *, several: bool, used_by: Seq[str] = ()) -> tuple[str, list[dict[str, Any]]]:
    """(HTML, figures) of a store. at: its number on the page. used_by: names of the page's runs that learn from it."""
    teacher = teacher_shown(found["teacher"]) if used_by else found["teacher"]
    head = facts(
        [
            ("teacher", esc(teacher)),
            ("signal", esc(found["signal"])),
            ("tokens", count(found["tokens"])),
            ("size of the shards", size(found["bytes"])),
            ("per token", number(found["bytes_per_token"], 1, " B")),
            ("shards", count(found["shards"])),
            ("sequences", count(found["sequences"])),
            ("vocabulary", count(found["vocabulary"])),
        ]
    )
    figures, items = _figures(found, at)
    places = f'<div class="plots wide">{"".join(figures)}</div>'
    body = head + _read(found) + places + _columns(found) + _fidelity(found)
    title = f"Store {title_of(found, used_by)}" if several else "Store"
    path = f'<p class="quiet">{esc(found["store"])}</p>'
    return section("store" if at == 0 else f"store-{at}", title, path + body), items


def title_of(found: dict[str, Any], used_by: Seq[str]) -> str:
    """What tells a store from the page's others: the stores of a chain's stages all have the same folder's name."""
    return f"of {', '.join(used_by)}" if used_by else str(found["store"].rpartition("/")[2])


def _read(found: dict[str, Any]) -> str:
    rows, held = found["rows_read"], found["rows"]
    if rows < held:
        return (
            f'<p class="quiet">Sampled: mass and entropy are of {rows:,} of the {held:,} stored positions, those of '
            "the first units by id, which is a random order.</p>"
        )
    return f'<p class="quiet">Mass and entropy are of all {held:,} stored positions.</p>'


def _figures(found: dict[str, Any], at: int) -> tuple[list[str], list[dict[str, Any]]]:
    figures, items = [], []
    mass, entropy = found["mass"], found["entropy"]
    if mass is None:
        figures.append("<p>Retained mass: not known of this store, which keeps no logits.</p>")
    else:
        name = f"mass-{at}"
        items.append(plots.mass(name, mass))
        columns = ["k", *(f"T = {t:g}" for t in mass["temperatures"])]
        rows = [[str(k), *(share(m[i]) for m in mass["mass"])] for i, k in enumerate(mass["k"])]
        last = ", ".join(
            f"{share(m[-1])} at T = {t:g}" for t, m in zip(mass["temperatures"], mass["mass"], strict=True)
        )
        legend = "".join(f"<li>{key(f'--t{n}')}T = {t:g}</li>" for n, t in enumerate(mass["temperatures"]))
        shown = figure(
            name, "Retained mass by k and T", f"The {mass['k'][-1]} likeliest ids hold {last}",
            table(columns, rows, name="Retained mass"),
        )  # fmt: skip
        figures.append(shown.replace("<figcaption>", f'<figcaption><ul class="legend">{legend}</ul>', 1))
    if entropy is None:
        figures.append("<p>Entropy: not known of this store.</p>")
    else:
        name = f"entropy-{at}"
        items.append(plots.histogram(name, entropy))
        words = f"mean {entropy['mean']:.2f}, median {entropy['median']:.2f} nats over {entropy['rows']:,} positions"
        edges = entropy["edges"]
        rows = [[f"{a:.2f} – {b:.2f}", count(c)] for a, b, c in zip(edges, edges[1:], entropy["counts"], strict=False)]
        shown = figure(name, "Entropy of the teacher", words, table(["nats", "positions"], rows, name="Entropy"))
        figures.append(shown.replace("<figcaption>", f"<figcaption>{esc(words)}; {esc(entropy['how'])}.", 1))
    return figures, items


def _columns(found: dict[str, Any]) -> str:
    columns = found["columns_bytes_per_token"]
    if not columns:
        return ""
    most = max(columns.values()) or 1
    rows = [
        [
            f"<code>{esc(name)}</code>",
            f'<div class="bar" style="width:{100 * value / most:.2f}%"></div>',
            number(value, 2, " B"),
        ]
        for name, value in sorted(columns.items(), key=lambda item: -item[1])
    ]
    sampled = found["columns_sampled_shards"]
    of = f"of {sampled} of {found['shards']:,} shards" if sampled < found["shards"] else "of all shards"
    shown = table(["column", "", "bytes per token"], rows, name="Bytes per token by column")
    return f'<h3 style="margin-top:16px">Bytes per token by column, {of}</h3><div class="bars">{shown}</div>'


def _fidelity(found: dict[str, Any]) -> str:
    rows = [
        [
            esc(row["tier"]),
            number(row["temperature"], 0),
            share(row["retained_mass"]),
            f"{row['kl_added_nats']:.1e} nats" if row["kl_added_nats"] is not None else "–",
            number(row["gradient_angle_deg"], 2, "°"),
        ]
        for row in found["fidelity"] or []
    ]
    if not rows:
        return ""
    columns = ["part", "T", "retained mass", "KL added", "angle of the gradient"]
    title = '<h3 style="margin-top:16px">Fidelity, against the teacher\'s full logits on a sample of positions</h3>'
    return title + table(columns, rows, name="Fidelity")


def tokens(groups: list[dict[str, Any]]) -> str:
    """The token viewer; its script fills it."""
    shown = [d for g in groups for d in g["documents"]]
    if not shown:
        return ""
    kinds = {d["heldout"] for d in shown}
    what = "held-out documents" if kinds == {True} else "training documents" if kinds == {False} else "sequences"
    cut = sum(d["shown"] for d in shown) < sum(d["tokens"] for d in shown)
    note = (
        f'<p class="quiet">{len(shown)} {what}, {sum(d["shown"] for d in shown):,} tokens'
        f"{', long ones cut' if cut else ''}. Each token is shaded by the prediction made for it. Hover, tap, or move "
        "with <kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> <kbd>Home</kbd> <kbd>End</kbd>.</p>"
    )
    return section(
        "viewer",
        "Tokens",
        f"""{note}
<div class="controls"><label for="document">Document<select id="document"></select></label>
<fieldset><legend>Shaded by</legend><div id="shades"></div></fieldset></div>
<div class="scale" aria-hidden="true">0<i></i><span id="most"></span></div>
<div class="reader">
<div class="text" id="text" role="listbox" aria-label="Tokens of the document" aria-orientation="horizontal"></div>
<div class="panel" tabindex="0" role="region" aria-label="The token's predictions">
<p id="said" aria-live="polite"></p><div id="panel"></div></div></div>""",
    )
