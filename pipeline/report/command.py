"""`stillroom report RUN --html FILE` and `stillroom inspect STORE --html FILE`.

Enters: run folders, or a store's URI. Leaves: one HTML file, and what it holds as a dictionary. Costs: see the room's
text; a student's process is the longest part of it, once.
"""

import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console, format_bytes
from stillroom.pipeline.report import documents as texts
from stillroom.pipeline.report.answers import ask
from stillroom.pipeline.report.data import gather_chain, gather_run, run_folders
from stillroom.pipeline.report.page import render
from stillroom.pipeline.report.payload import tokens_shown, viewer
from stillroom.pipeline.report.plots import require_plotting
from stillroom.pipeline.report.run_parts import label_students
from stillroom.pipeline.report.store_data import gather_store
from stillroom.storage.catalog.views import texts_of
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import LocalFiles
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import Store, open_store

#: More is said to be too much, in a notice.
MOST_BYTES = 5_000_000


def report(folders: Seq[str], html: str, console: Console) -> dict[str, Any]:
    """One page about one or more runs, chains among them. Raises UsageError where a folder is no run."""
    require_plotting()
    given = [
        (gather_chain(folder), [gather_run(path) for path in run_folders(folder)]) for folder in map(Path, folders)
    ]
    runs = [run for _, part in given for run in part]
    label_students(runs)
    chains = [chain for chain, _ in given if chain is not None]
    stores: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run["store"] is not None and run["store"] not in stores:
            console.info(f"report: reading {run['store']}")
            try:
                stores[run["store"]] = gather_store(run["store"])
            except StillroomError as error:  # the rest of the page is there
                run["missing"].append(f"The store cannot be shown: {error}")
                run["store"] = None
    shown = sum(len(run["students"]) for run in runs)
    groups = [_group(run, tokens_shown(shown, len(runs)), console) for run in runs]
    names = [part["name"] for chain, stages in given for part in ([chain] if chain else stages)]
    title = " · ".join(dict.fromkeys(names))
    page = render(title, runs=runs, chains=chains, stores=stores, groups=groups, made=f"stillroom report of {_now()}")
    return _write(page, html, console) | {
        "runs": [run["folder"] for run in runs],
        "students": shown,
        "stores": list(stores),
        "positions_read": sum(store["rows_read"] for store in stores.values()),
        "tokens_shown": sum(d["shown"] for group in groups for d in group["documents"]),
        "missing": [sentence for part in (*chains, *runs) for sentence in part["missing"]],
    }


def inspect_page(uri: str, html: str, console: Console) -> dict[str, Any]:
    """The store's part alone."""
    require_plotting()
    found = gather_store(uri)
    store = open_store(uri)
    shown = texts.of_store(store, tokens=tokens_shown(0))
    group = viewer("store", shown, {}, _texts(store)) | {"colours": []}
    title = f"Store {uri.rstrip('/').rpartition('/')[2]}"
    page = render(title, runs=(), stores={store.uri: found}, groups=[group], made=f"stillroom inspect of {_now()}")
    return _write(page, html, console) | {
        "store": store.uri,
        "positions_read": found["rows_read"],
        "tokens_shown": sum(d["shown"] for d in group["documents"]),
    }


def _group(run: dict[str, Any], budget: int, console: Console) -> dict[str, Any]:
    """What the token viewer shows of a run; without documents where store or corpus are missing."""
    nothing: dict[str, Any] = {"name": run["name"], "students": [], "colours": [], "documents": []}
    if run["store"] is None or run["corpus"] is None:
        return nothing
    store = open_store(run["store"])
    shown = texts.of_run(Manifest.open(Path(run["folder"]) / "corpus.parquet"), store, tokens=budget)
    if not shown:
        run["missing"].append("The store holds none of the documents to be shown: the token viewer is left out.")
        return nothing
    signal = store.identity.signal
    answers = ask(
        run, shown, vocabulary=store.identity.vocabulary, has_kl=bool(signal.topk or signal.hidden), console=console
    )
    numbers = {student["name"]: student["number"] for student in run["students"]}
    return viewer(run["name"], shown, answers, _texts(store)) | {
        "colours": [f"var(--s{numbers[name] % 8})" for name in answers]
    }


def _texts(store: Store) -> dict[int, str] | None:
    held = texts_of(store.files)
    return None if held is None else dict(enumerate(held))


def _write(page: str, html: str, console: Console) -> dict[str, Any]:
    path = Path(html).absolute()
    data = page.encode("utf-8", errors="replace")
    LocalFiles(path.parent).write(path.name, data)
    console.info(f"wrote {path} ({format_bytes(len(data))})")
    if len(data) > MOST_BYTES:
        console.notice(f"{path} is larger than {format_bytes(MOST_BYTES)}: give fewer runs at once")
    return {"html": str(path), "size_bytes": len(data)}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
