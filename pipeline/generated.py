"""What sequence-level distillation came to: responses, and what the students make of them. For the summary, and the
table that a run ends with.

Enters: verdicts, the ledger of generating, the summary of a run. Leaves: numbers that are the same when the run is
repeated and nothing runs. Costs: reading one small column.
"""

from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.console import format_number as number
from stillroom.pipeline.corpus.verdicts import KEPT, read_verdicts
from stillroom.pipeline.generate import Generated
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.quality.judge import REASONS
from stillroom.pipeline.recipe.schema import VERDICTS, Recipe


def generations_summary(recipe: Recipe, generated: Generated) -> dict[str, Any]:
    """Of all runs in this folder. tokens: of the responses judged. tokens_per_s: generated, all engines together, their
    start left out; None where this folder's runs found all of them there."""
    reasons, total = generated.reasons, generated.reasons.total()
    tokens = int(sum(read_verdicts(recipe.run_dir / VERDICTS)[0]["tokens"].to_pylist()))
    return {
        "store": generated.store.uri,
        "identity": generated.store.identity.id,
        "prompts": generated.prompts,
        "responses": total,
        "tokens": tokens,
        "kept": reasons[KEPT],
        "dropped": [{"reason": reason, "responses": reasons[reason]} for reason in REASONS if reasons[reason]],
        "tokens_per_s": Ledger(recipe.run_dir / "ledger.generate.jsonl").rows_per_s(),
    }


def show_distillation(summary: dict[str, Any], console: Console) -> None:
    """The table of a run with a `generate` section, from its summary alone."""
    rows = [*_responses(summary["generations"])]
    teacher: dict[str, Any] = next((m for m in summary["models"] if m["name"] == "teacher"), {})
    answers = {m["name"]: m.get("answers") for m in summary["models"]}
    for student in summary["students"]:
        rows += _student(student, teacher, answers.get(student["name"]))
    console.table(["", "", ""], rows, title="sequence-level distillation")


def _responses(found: dict[str, Any]) -> list[list[str]]:
    total = found["responses"]
    counts = [("kept", found["kept"]), *((f"dropped, {d['reason']}", d["responses"]) for d in found["dropped"])]
    speed = found["tokens_per_s"]
    return [
        ["teacher's responses", f"{total:,}", f"{found['tokens']:,} tokens"],
        *([name, f"{count:,}", f"{count / total:.1%}"] for name, count in counts if total),
        ["generated tokens/s", "" if speed is None else f"{speed:,.1f}", ""],
    ]


def _student(student: dict[str, Any], teacher: dict[str, Any], answers: dict[str, Any] | None) -> list[list[str]]:
    name, rows = student["name"], []
    kinds = [("teacher_text", "teacher text"), ("ground_truth", "ground truth")]
    if "ppl_teacher_text_after" not in student:  # all held-out documents are of one kind
        kinds = [("", "the held-out documents")]
    for key, said in kinds:
        own, of_teacher = f"ppl_{key}_" if key else "ppl_", f"perplexity_{key}" if key else "perplexity"
        before, after = student.get(f"{own}before"), student.get(f"{own}after")
        there = teacher.get(of_teacher)
        rows.append(
            [
                f"{name}: perplexity on {said}",
                "" if before is None or after is None else f"{number(before, 2)} → {number(after, 2)}",
                "" if there is None else f"teacher {number(there, 2)}",
            ]
        )
    mix = student.get("mix")
    if mix and sum(mix["trained"].values()):
        total = sum(mix["trained"].values())
        shares = ", ".join(f"{source} {count / total:.0%}" for source, count in mix["trained"].items())
        rows.append([f"{name}: learned from", shares, f"of {total:,} positions, mixed by {mix['by']}"])
    if answers:
        asked = f"{answers['prompts']:,} prompts, {answers['ended']:.0%} of the answers ended"
        rows.append([f"{name}: BLEU of its answers", f"{answers['bleu']:.1f}", asked])
        rows.append([f"{name}: ROUGE-L of its answers", f"{answers['rouge_l']:.3f}", answers["file"]])
    return rows
