"""The page, put together: one HTML file with its style, its script, the plotting library and the numbers in it.

Enters: gathered runs, stores and what the token viewer shows. Leaves: HTML that asks for nothing: its own policy
forbids every request. Costs: 1.3 MB of plotting library, 0.1 MB of figures, at most about 1.7 MB of tokens.
"""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from stillroom.pipeline.report import picture, plots, run_parts, store_parts
from stillroom.pipeline.report.markup import esc, script_json, section

#: Nothing is fetched, whatever a text in the page says.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def render(
    title: str,
    *,
    runs: Seq[dict[str, Any]],
    chains: Seq[dict[str, Any]] = (),
    stores: dict[str, dict[str, Any]],
    groups: list[dict[str, Any]],
    made: str,
) -> str:
    """The whole page.

    runs: of `gather_run`, labelled. chains: of `gather_chain`. stores: of `gather_store`, by URI.
    groups: of `payload.viewer`, one a run or store. made: when and by what, in words.
    """
    items: list[dict[str, Any]] = []
    parts: list[str] = []
    if runs:
        pictures = "".join(picture.picture(run, stores.get(run["store"] or ""), titled=len(runs) > 1) for run in runs)
        parts.append(section("pipeline", "Pipeline", pictures))
        parts.append(run_parts.chains(chains, runs))
        parts.append(run_parts.evaluation(runs))
        html, found = run_parts.curves(runs)
        parts.append(html)
        items += found
        parts.append(run_parts.reuse(runs, stores))
    for at, (uri, store) in enumerate(stores.items()):
        used_by = [run["name"] for run in runs if run["store"] == uri]
        html, found = store_parts.store(store, at, several=len(stores) > 1, used_by=used_by)
        parts.append(html)
        items += found
    parts.append(store_parts.tokens(groups))
    links = (
        ("pipeline", "Pipeline"), ("chain", "Stages"), ("evaluation", "Evaluation"), ("curves", "Training"),
        ("reuse", "Reuse"), ("store", "Store"), ("viewer", "Tokens"),
    )  # fmt: skip
    body = "\n".join(part for part in parts if part)
    nav = "".join(f'<a href="#{name}">{words}</a>' for name, words in links if f'id="{name}"' in body)
    here = Path(__file__).parent
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>
{(here / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{esc(title)}</h1><p class="quiet">{esc(made)}</p><nav aria-label="Parts of the page">{nav}</nav></header>
<main>
{run_parts.missing(runs, chains)}
{body}
</main>
<footer><p>Made by stillroom; this file holds all that it shows and asks for nothing else.</p></footer>
<script type="application/json" id="plots-data">{script_json({"colours": plots.COLOURS, "items": items})}</script>
<script type="application/json" id="tokens-data">{script_json([g for g in groups if g["documents"]])}</script>
<script>
{plots.library()}
</script>
<script>
{(here / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""
