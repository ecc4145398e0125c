"""The pipeline's picture: what each stage of a run made, how large it is and how long it took.

Enters: what `data.gather_run` and `store_data.gather_store` found. Leaves: HTML. Costs: nothing that counts.

A time that an earlier release did not write down is said to be not recorded: only what took none is 0.
"""

from collections.abc import Sequence as Seq
from typing import Any

from stillroom.pipeline.report import plots
from stillroom.pipeline.report.data import teacher_shown
from stillroom.pipeline.report.markup import NONE, count, esc, key, number, seconds, share, size

UNKNOWN = "not recorded"

#: (name, colour, seconds) of what has a known time.
Spent = list[tuple[str, str, float]]


def picture(run: dict[str, Any], store: dict[str, Any] | None, *, titled: bool) -> str:
    """Generation → corpus → teacher → store → students → evaluation with times and bytes."""
    stages = [_generation(run), _corpus(run), _teacher(run, store), _store(store)]
    if run["students"]:
        inner = "".join(_student_box(student) for student in run["students"])
        stages.append(f'<li style="--c:var(--s{run["students"][0]["number"] % 8})"><h3>Students</h3>{inner}</li>')
    stages.append(_evaluation(run))
    title = f"<h3>{esc(run['name'])}</h3>" if titled else ""
    return f'{title}<ol class="flow">{"".join(stages)}</ol>{_times(_spent(run))}'


def _stage(title: str, colour: str, who: str, lines: Seq[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{esc(name)}</dt><dd>{value}</dd></div>" for name, value in lines)
    return f'<li style="--c:var({colour})"><h3>{esc(title)}</h3><p class="who">{who}</p><dl>{rows}</dl></li>'


def _generation(run: dict[str, Any]) -> str:
    """Nothing of a run without one."""
    found = run["generation"]
    if found is None:
        return ""
    total = found["responses"]
    lines = [("kept", _part(found["kept"], total))]
    lines += [(f"dropped, {row['reason']}", _part(row["responses"], total)) for row in found["dropped"]]
    lines += [
        ("tokens", count(found["tokens"])),
        ("tokens/s", number(found["tokens_per_s"], 1)),
        ("bytes", size(found["bytes"])),
        ("time", seconds(found["wall_s"])),
    ]
    return _stage("Generation", "--t0", f"{count(total)} responses of the teacher", lines)


def _part(value: int | None, total: int | None) -> str:
    return f"{count(value)} ({share(value / total, 0)})" if value is not None and total else NONE


def _corpus(run: dict[str, Any]) -> str:
    corpus = run["corpus"]
    if corpus is None:
        return _stage("Corpus", "--ink-2", "not there", [("time", NONE)])
    return _stage("Corpus", "--ink-2", f"{count(corpus['documents'])} documents", [
        ("tokens", count(corpus["tokens"])),
        ("held out", f"{count(corpus['heldout_documents'])} documents"),
        ("bytes", size(corpus["bytes"])),
        ("time", _known(corpus["wall_s"])),
    ])  # fmt: skip


def _teacher(run: dict[str, Any], store: dict[str, Any] | None) -> str:
    ledger, spent = run["ledger"], _taught_s(run)
    scored = sum(row["tokens_scored"] for row in ledger)
    name = teacher_shown(str((run["recipe"].get("teacher") or {}).get("model") or NONE))
    if not scored and store is not None and store["tokens"]:
        # Of another run or stage with the same teacher and signal; or the ledger is gone.
        return _stage("Teacher", "--t0", esc(name), [("batches", "0"), ("time", "none, the store held all")])
    return _stage("Teacher", "--t0", esc(name), [
        ("batches", count(sum(row["teacher_batches"] for row in ledger))),
        ("tokens/s", count(scored / spent if spent else None)),
        ("bytes", size(sum(row["bytes_written"] for row in ledger))),
        ("time", seconds(spent) if spent else NONE),
    ])  # fmt: skip


def _taught_s(run: dict[str, Any]) -> float:
    return float(sum(row["wall_s"] for row in run["ledger"]))


def _store(store: dict[str, Any] | None) -> str:
    if store is None:
        return _stage("Store", "--t1", "not there", [("time", NONE)])
    return _stage("Store", "--t1", esc(store["signal"]), [
        ("shards", count(store["shards"])),
        ("per token", number(store["bytes_per_token"], 1, " B")),
        ("bytes", size(store["bytes"])),
        ("time", "with the teacher's"),
    ])  # fmt: skip


def _student_box(student: dict[str, Any]) -> str:
    result = student["result"]
    rows = [
        ("steps", count((result or {}).get("steps", student["steps"] or None))),
        ("bytes", size(student["export_bytes"])),
        ("time", NONE if result is None else _known(result.get("seconds"))),
    ]
    lines = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    colour = plots.student_colour(student["number"])
    return f'<div class="one"><p class="who">{key(colour)}{esc(student["name"])}</p><dl>{lines}</dl></div>'


def _known(value: float | None) -> str:
    return UNKNOWN if value is None else seconds(value)


def _evaluation(run: dict[str, Any]) -> str:
    measured = (run["evaluation"] or {}).get("models") or []
    if not measured:
        return _stage("Evaluation", "--ink-2", "not yet", [("time", NONE)])
    spent = run["evaluation_s"]
    time = _known(spent["wall_s"])
    if spent["wall_s"] is not None and not spent["whole"]:
        time = f"at least {time}"  # an earlier release measured some of the models
    models = f"{len(measured)} model{'s' * (len(measured) > 1)}"
    positions = measured[0].get("heldout_positions")
    return _stage("Evaluation", "--ink-2", models, [("positions", count(positions)), ("time", time)])


def _spent(run: dict[str, Any]) -> Spent:
    """Of every stage, in the picture's order."""
    stages = [
        ("generation", "--t3", (run["generation"] or {}).get("wall_s")),
        ("corpus", "--ink-2", (run["corpus"] or {}).get("wall_s")),
        ("teacher", "--t0", _taught_s(run)),
        *((s["name"], plots.student_colour(s["number"]), (s["result"] or {}).get("seconds")) for s in run["students"]),
        ("evaluation", "--t2", run["evaluation_s"]["wall_s"]),
    ]
    return [(name, colour, float(value)) for name, colour, value in stages if value]


def _times(parts: Spent) -> str:
    """Where the recorded time went, as one bar."""
    total = sum(part[2] for part in parts)
    if not total:
        return ""
    bar = "".join(f'<span style="--c:var({colour});flex:{value / total:.4f}"></span>' for _, colour, value in parts)
    legend = "".join(
        f"<li>{key(colour)}{esc(name)} {seconds(value)} ({share(value / total, 0)})</li>"
        for name, colour, value in parts
    )
    head = f'<h3>Recorded time, {seconds(total)}</h3><div class="times" aria-hidden="true">{bar}</div>'
    return f'{head}<ul class="legend">{legend}</ul>'
