"""The page's parts about runs: the table of models, every student's curves, the ledger.

Enters: what `data.gather_run` found. Leaves: HTML, and figures for the page's script. Costs: nothing that counts.
"""

from collections.abc import Sequence as Seq
from typing import Any

from stillroom.pipeline.harness import shown as tasks_shown
from stillroom.pipeline.report import plots
from stillroom.pipeline.report.markup import NONE, count, esc, figure, key, number, seconds, section, share, size, table
from stillroom.pipeline.report.store_parts import title_of

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

#: Kinds of held-out text, and a column's words for its perplexity.
_KINDS = (("teacher_text", "on teacher text"), ("ground_truth", "on ground truth"))


def label_students(runs: Seq[dict[str, Any]]) -> None:
    """Give every student of the page its `label` and `number`; the number is its colour everywhere."""
    at = 0
    for run in runs:
        for student in run["students"]:
            student["label"] = student["name"] if len(runs) == 1 else f"{run['name']}: {student['name']}"
            student["number"] = at
            at += 1


def missing(runs: Seq[dict[str, Any]], chains: Seq[dict[str, Any]] = ()) -> str:
    """What is not there, said before anything else; nothing where all is."""
    said = [esc(sentence) for chain in chains for sentence in chain["missing"]]
    said += [
        esc(sentence) if len(runs) == 1 else f"<b>{esc(run['name'])}</b>: {esc(sentence)}"
        for run in runs
        for sentence in run["missing"]
    ]
    if not said:
        return ""
    items = "".join(f"<li>{sentence}</li>" for sentence in said)
    return f'<div class="missing" role="note"><strong>What this page lacks</strong><ul>{items}</ul></div>'


def evaluation(runs: Seq[dict[str, Any]]) -> str:
    """The table of teacher and students on the held-out documents.

    Perplexity by kind of text, likeness of answers and downstream tasks are columns where a model has them.
    """
    models = [model for run in runs for model in (run["evaluation"] or {}).get("models") or []]
    kinds = [kind for kind in _KINDS if any(f"perplexity_{kind[0]}" in model for model in models)]
    answered = [model["answers"] for model in models if model.get("answers")]
    tasks = tasks_shown(models)
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
                    *(_change(model, student, f"perplexity_{kind}") for kind, _ in kinds),
                    number(model.get("ece"), 3),
                    number(model.get("kl"), 3, " nats"),
                    share(model.get("top1")),
                    *(
                        [
                            number((model.get("answers") or {}).get("bleu"), 1),
                            number((model.get("answers") or {}).get("rouge_l"), 3),
                        ]
                        if answered
                        else ()
                    ),
                    *(number(((model.get("lm_eval") or {}).get(task) or {}).get(metric), 3) for task, metric in tasks),
                ]
            )
    if not rows:
        return ""
    columns = [
        "model", "parameters", "weights", "per token", "peak memory", "perplexity", *(said for _, said in kinds), "ECE",
        "KL to teacher", "top-1", *(("BLEU", "ROUGE-L") if answered else ()),
        *(f"{task} {metric}" for task, metric in tasks),
    ]  # fmt: skip
    whose = "the stored teacher of its stage" if len(_teachers(runs)) > 1 else "the stored teacher"
    note = (
        '<p class="quiet">On the held-out documents. ECE: expected calibration error. KL and top-1 agreement: student '
        f"against {whose}, at T = 1.{_by_kind(kinds)}{_asked(answered)}</p>"
    )
    return section("evaluation", "Evaluation", note + table(columns, rows, name="Evaluation"))


def _change(model: dict[str, Any], student: dict[str, Any] | None, key: str) -> str:
    """Of a student before → after training, where it was measured before."""
    after = model.get(key)
    before = (((student or {}).get("result") or {}).get("before") or {}).get(key)
    return number(after, 2) if before is None or after is None else f"{number(before, 2)} → {number(after, 2)}"


def _by_kind(kinds: Seq[tuple[str, str]]) -> str:
    if not kinds:
        return ""
    return " Perplexity on text that the teacher wrote and on other text (ground truth): before → after training."


def _asked(answers: Seq[dict[str, Any]]) -> str:
    """What BLEU and ROUGE-L are of."""
    if not answers:
        return ""
    asked = sorted({int(found["prompts"]) for found in answers if found.get("prompts")})
    of = f"{' or '.join(f'{n:,}' for n in asked)} held-out prompts" if asked else "held-out prompts"
    return f" BLEU and ROUGE-L: each student's answers to {of} against the teacher's kept responses."


def chains(found: Seq[dict[str, Any]], runs: Seq[dict[str, Any]]) -> str:
    """Students of all stages beside each other, against the teacher with which their chain began."""
    numbers = {(run["name"], s["name"]): s["number"] for run in runs for s in run["students"]}
    columns = [
        "student", "KL to the first teacher", "top-1 of the first teacher", "KL to its own teacher", "perplexity",
        "steps", "steps with its teachers'", "layers", "parameters", "taught by",
    ]  # fmt: skip
    tables = []
    for chain in found:
        rows = [
            [
                _keyed(
                    numbers.get((row.get("stage"), row.get("student"))), f"{row.get('stage')}: {row.get('student')}"
                ),
                number(row.get("kl_to_first_teacher"), 3, " nats"),
                share(row.get("top1_to_first_teacher")),
                number(row.get("kl_to_own_teacher"), 3, " nats"),
                number(row.get("perplexity"), 2),
                count(row.get("steps")),
                count(row.get("steps_with_teachers")),
                count(row.get("layers")),
                _millions(row.get("parameters")),
                f'<span class="long">{esc(row.get("teacher"))}</span>',
            ]
            for row in chain["students"]
        ]
        if not rows:
            continue
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
    own = " KL and agreement are with each student's own teacher." if len(_teachers(runs)) > 1 else ""
    note = f'<p class="quiet">From each student\'s log, step by step.{own}{thinned}</p><ul class="legend">{legend}</ul>'
    return section("curves", "Training", f'{note}<div class="plots">{"".join(figures)}</div>'), items


def _teachers(runs: Seq[dict[str, Any]]) -> set[str]:
    return {str((run["recipe"].get("teacher") or {}).get("model")) for run in runs}


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
    note = f'<p class="quiet">What the teacher did for each student, over all commands of the run.{_free(runs)}</p>'
    kept = ""
    for uri, found in stores.items():
        used_by = [run["name"] for run in runs if run["store"] == uri]
        if found["reuse"] and found["reuse"]["uses"]:
            kept += _kept(found, f"The store {title_of(found, used_by)}" if len(stores) > 1 else "The store")
    return section("reuse", "Reuse", note + table(columns, rows, name="Reuse") + kept)


def _free(runs: Seq[dict[str, Any]]) -> str:
    """That a store costs its teacher nothing after the first student, where the ledgers show it."""
    by_store: dict[Any, list[dict[str, Any]]] = {}
    for at, run in enumerate(runs):
        by_store.setdefault(run["store"] or at, []).extend(run["ledger"])
    later = [row for rows in by_store.values() for row in rows[1:]]
    if not later or any(row["teacher_batches"] for row in later):
        return ""
    if len(by_store) > 1:
        return " Every student after the first of its store cost the teacher nothing."
    return " Every student after the first cost it nothing."


def _kept(store: dict[str, Any], which: str) -> str:
    held = store["reuse"]
    hours = [held["teacher_hours_spent"], held["teacher_hours_live"]]
    uses, names = held["uses"], ", ".join(map(esc, held["students"]))
    words = f"{esc(which)} has served {uses} student{'s' * (uses != 1)} ({names}), "
    words += f"{number(held['passes'], 2)} passes over its tokens."
    if None not in hours:
        words += (
            f" The teacher worked {seconds(3600 * hours[0])}; run live beside each student it would have worked about "
            f"{seconds(3600 * hours[1])}."
        )
    if held.get("break_even_passes") is not None:
        words += f" Break-even is at {number(held['break_even_passes'], 2)} passes."
    return f'<p class="quiet" style="margin-top:10px">{words}</p>'
