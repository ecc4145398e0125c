"""The page's parts about runs: the pipeline's picture, the table of models, every student's curves, the ledger.

Enters: what `data.gather_run` found. Leaves: HTML, and figures for the page's script. Costs: nothing that counts.
"""

from collections.abc import Sequence as Seq
from typing import Any

from stillroom.pipeline.report import plots
from stillroom.pipeline.report.markup import NONE, count, esc, figure, key, number, seconds, section, share, size, table

#: key, title, axis, logarithmic, a share, dots at every point.
_CURVES = (
    ("loss", "Training loss", "loss, nats", False, False, False),
    ("kd", "Distillation loss, training", "loss × T², nats", False, False, False),
    ("kl", "KL, teacher to student, held-out", "KL, nats", False, False, True),
    ("top1", "Top-1 agreement, held-out", "share of positions", False, True, True),
    ("perplexity", "Perplexity, held-out", "perplexity", True, False, True),
    ("temperature", "Temperature", "T", False, False, False),
    ("alpha", "Weight of distillation", "α", False, False, False),
    ("lr", "Learning rate", "learning rate", False, False, False),
)


def label_students(runs: Seq[dict[str, Any]]) -> None:
    """Give every student of the page its `label` and `number`; the number is its colour everywhere."""
    at = 0
    for run in runs:
        for student in run["students"]:
            student["label"] = student["name"] if len(runs) == 1 else f"{run['name']}: {student['name']}"
            student["number"] = at
            at += 1


def missing(runs: Seq[dict[str, Any]]) -> str:
    """What is not there, said before anything else; nothing where all is."""
    said = [
        esc(sentence) if len(runs) == 1 else f"<b>{esc(run['name'])}</b>: {esc(sentence)}"
        for run in runs
        for sentence in run["missing"]
    ]
    if not said:
        return ""
    items = "".join(f"<li>{sentence}</li>" for sentence in said)
    return f'<div class="missing" role="note"><strong>What this page lacks</strong><ul>{items}</ul></div>'


def picture(run: dict[str, Any], store: dict[str, Any] | None, *, titled: bool) -> str:
    """Corpus → teacher → store → students → evaluation with times and bytes."""
    corpus, ledger = run["corpus"] or {}, run["ledger"]
    spent = sum(row["wall_s"] for row in ledger)
    scored = sum(row["tokens_scored"] for row in ledger)
    teacher = str((run["recipe"].get("teacher") or {}).get("model") or NONE)
    stages = [
        _stage("Corpus", "--ink-2", f"{count(corpus.get('documents'))} documents", [
            ("tokens", count(corpus.get("tokens"))),
            ("held out", f"{count(corpus.get('heldout_documents'))} documents"),
            ("bytes", size(corpus.get("bytes"))), ("time", "not recorded"),
        ]),
        _stage("Teacher", "--t0", esc(teacher), [
            ("batches", count(sum(row["teacher_batches"] for row in ledger))),
            ("tokens/s", count(scored / spent if spent else None)),
            ("bytes", size(sum(row["bytes_written"] for row in ledger))), ("time", seconds(spent if ledger else None)),
        ]),
        _stage("Store", "--t1", esc(store["signal"]) if store else "not there", [
            ("shards", count(store["shards"] if store else None)),
            ("per token", number(store["bytes_per_token"], 1, " B") if store else NONE),
            ("bytes", size(store["bytes"] if store else None)), ("time", "with the teacher's"),
        ]),
    ]  # fmt: skip
    if run["students"]:
        inner = "".join(_student_box(student) for student in run["students"])
        stages.append(f'<li style="--c:var(--s{run["students"][0]["number"] % 8})"><h3>Students</h3>{inner}</li>')
    measured = (run["evaluation"] or {}).get("models") or []
    stages.append(
        _stage("Evaluation", "--ink-2", f"{len(measured)} models" if measured else "not yet", [
            ("positions", count(measured[0].get("heldout_positions") if measured else None)),
            ("time", "not recorded"),
        ])
    )  # fmt: skip
    title = f"<h3>{esc(run['name'])}</h3>" if titled else ""
    return f'{title}<ol class="flow">{"".join(stages)}</ol>{_times(run, spent)}'


def _stage(title: str, colour: str, who: str, lines: Seq[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{esc(name)}</dt><dd>{value}</dd></div>" for name, value in lines)
    return f'<li style="--c:var({colour})"><h3>{esc(title)}</h3><p class="who">{who}</p><dl>{rows}</dl></li>'


def _student_box(student: dict[str, Any]) -> str:
    result = student["result"] or {}
    rows = [
        ("steps", count(result.get("steps", student["steps"] or None))),
        ("bytes", size(student["export_bytes"])),
        ("time", seconds(result.get("seconds"))),
    ]
    lines = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    colour = plots.student_colour(student["number"])
    return f'<div class="one"><p class="who">{key(colour)}{esc(student["name"])}</p><dl>{lines}</dl></div>'


def _times(run: dict[str, Any], spent: float) -> str:
    """Where the recorded time went, as one bar."""
    parts = [("teacher", "--t0", spent)] if spent else []
    parts += [
        (s["name"], plots.student_colour(s["number"]), s["result"].get("seconds") or 0.0)
        for s in run["students"]
        if s["result"]
    ]
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


def evaluation(runs: Seq[dict[str, Any]]) -> str:
    """The table of teacher and students on the held-out documents."""
    rows = []
    for run in runs:
        known = {student["name"]: student for student in run["students"]}
        for model in (run["evaluation"] or {}).get("models") or []:
            student = known.get(model["name"])
            name = model["name"] if student is None and len(runs) == 1 else f"{run['name']}: {model['name']}"
            colour = "--ink-2" if student is None else plots.student_colour(student["number"])
            rows.append(
                [
                    key(colour) + esc(name if student is None else student["label"]),
                    _millions(model.get("parameters")),
                    size(model.get("weight_bytes")),
                    number(model.get("latency_ms_per_token"), 1, " ms"),
                    size(model.get("peak_memory_bytes")),
                    number(model.get("perplexity"), 2),
                    number(model.get("ece"), 3),
                    number(model.get("kl"), 3, " nats"),
                    share(model.get("top1")),
                ]
            )
    if not rows:
        return ""
    columns = [
        "model", "parameters", "weights", "per token", "peak memory", "perplexity", "ECE", "KL to teacher", "top-1",
    ]  # fmt: skip
    note = (
        '<p class="quiet">On the held-out documents. ECE: expected calibration error. KL and top-1 agreement: student '
        "against the stored teacher, at T = 1.</p>"
    )
    return section("evaluation", "Evaluation", note + table(columns, rows, name="Evaluation"))


def chains(found: Seq[dict[str, Any]], runs: Seq[dict[str, Any]]) -> str:
    """Students of all stages beside each other, against the teacher with which their chain began."""
    numbers = {(run["name"], s["name"]): s["number"] for run in runs for s in run["students"]}
    columns = [
        "student", "taught by", "layers", "parameters", "steps", "with its teachers'", "KL to its teacher",
        "KL to the first", "top-1 of the first", "perplexity",
    ]  # fmt: skip
    tables = []
    for chain in found:
        rows = [
            [
                _keyed(
                    numbers.get((row.get("stage"), row.get("student"))), f"{row.get('stage')}: {row.get('student')}"
                ),
                esc(row.get("teacher")),
                count(row.get("layers")),
                _millions(row.get("parameters")),
                count(row.get("steps")),
                count(row.get("steps_with_teachers")),
                number(row.get("kl_to_own_teacher"), 3, " nats"),
                number(row.get("kl_to_first_teacher"), 3, " nats"),
                share(row.get("top1_to_first_teacher")),
                number(row.get("perplexity"), 2),
            ]
            for row in chain["students"]
        ]
        tables.append(f"<h3>{esc(chain['name'])}</h3>" + table(columns, rows, name="Students of all stages"))
    note = (
        '<p class="quiet">Only against the first teacher can a chain be held beside direct distillation: the teacher '
        "of a later stage is a student itself.</p>"
    )
    return section("chain", "Stages compared", note + "".join(tables)) if tables else ""


def _keyed(at: int | None, name: str) -> str:
    return key("--ink-2" if at is None else plots.student_colour(at)) + esc(name)


def _millions(parameters: float | None) -> str:
    return NONE if parameters is None else number(parameters / 1e6, 1 if parameters >= 1e6 else 3, " M")


def curves(runs: Seq[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(HTML, figures) of all students side by side."""
    students = [student for run in runs for student in run["students"] if student["curves"]]
    if not students:
        return "", []
    legend = "".join(f"<li>{key(plots.student_colour(s['number']))}{esc(s['label'])}</li>" for s in students)
    figures, items = [], []
    for name, title, axis, y_log, as_share, marks in _CURVES:
        shown = [(s["label"], s["number"], s["curves"][name]) for s in students if name in s["curves"]]
        if not shown or (y_log and any(value <= 0 for _, _, points in shown for _, value in points)):
            continue
        anchor = f"curve-{name}"
        items.append(plots.curves(anchor, shown, y_label=axis, y_log=y_log, share=as_share, marks=marks))
        figures.append(figure(anchor, title, _words(title, shown), _numbers(shown)))
    each = max(s["steps_per_point"] for s in students)
    thinned = f" Long logs are thinned: a point is the mean of up to {each} steps." if each > 1 else ""
    note = f'<p class="quiet">From each student\'s log, step by step.{thinned}</p><ul class="legend">{legend}</ul>'
    return section("curves", "Training", f'{note}<div class="plots">{"".join(figures)}</div>'), items


def _words(title: str, shown: Seq[tuple[str, int, Seq[tuple[float, float]]]]) -> str:
    ends = [f"{name} from {points[0][1]:,.4g} to {points[-1][1]:,.4g}" for name, _, points in shown]
    return f"{title} over steps: {'; '.join(ends)}"


def _numbers(shown: Seq[tuple[str, int, Seq[tuple[float, float]]]]) -> str:
    rows = []
    for name, _, points in shown:
        values = [value for _, value in points]
        rows.append([esc(name), *(f"{v:,.4g}" for v in (values[0], min(values), max(values), values[-1]))])
    return table(["student", "first", "least", "most", "last"], rows, name="Numbers of the curve")


def reuse(runs: Seq[dict[str, Any]], stores: dict[str, dict[str, Any]]) -> str:
    """What each student cost the teacher."""
    rows = []
    for run in runs:
        colours = {s["name"]: plots.student_colour(s["number"]) for s in run["students"]}
        for row in run["ledger"]:
            name = row["on_behalf_of"] or "the store (no student)"
            shown = name if len(runs) == 1 else f"{run['name']}: {name}"
            rows.append(
                [
                    key(colours.get(row["on_behalf_of"], "--ink-2")) + esc(shown),
                    count(row["teacher_batches"]),
                    count(row["units_scored"]),
                    count(row["tokens_scored"]),
                    size(row["bytes_written"]),
                    seconds(row["wall_s"]),
                ]
            )
    if not rows:
        return ""
    columns = ["on behalf of", "teacher's batches", "units", "tokens scored", "bytes written", "teacher's time"]
    later = [row for run in runs for row in run["ledger"][1:]]
    free = (
        " Every student after the first cost it nothing."
        if later and not any(r["teacher_batches"] for r in later)
        else ""
    )
    note = f'<p class="quiet">What the teacher did for each student, over all commands of the run.{free}</p>'
    kept = "".join(_kept(found) for found in stores.values() if found["reuse"] and found["reuse"]["uses"])
    return section("reuse", "Reuse", note + table(columns, rows, name="Reuse") + kept)


def _kept(store: dict[str, Any]) -> str:
    held = store["reuse"]
    hours = [held["teacher_hours_spent"], held["teacher_hours_live"]]
    words = f"The store has served {held['uses']} students ({', '.join(map(esc, held['students']))}), "
    words += f"{number(held['passes'], 2)} passes over its tokens."
    if None not in hours:
        words += (
            f" The teacher worked {seconds(3600 * hours[0])}; run live beside each student it would have worked about "
            f"{seconds(3600 * hours[1])}."
        )
    if held.get("break_even_passes") is not None:
        words += f" Break-even is at {number(held['break_even_passes'], 2)} passes."
    return f'<p class="quiet" style="margin-top:10px">{words}</p>'
