"""A whole recipe: corpus → teach → train → evaluate, resumed wherever it stopped.

Enters: a recipe. Leaves: the run's folder, with `summary.json` last. Costs: what its stages cost; a stage that is done
costs a look at its files.

Teaching is asked for before each student, and not once for all: the second student's share of it is measured, not
assumed, to be nothing. With `train.read_through` the first student starts beside the teachers.
"""

import json
from functools import partial
from typing import Any

from stillroom.pipeline.console import Console, format_bytes
from stillroom.pipeline.evaluate import evaluate
from stillroom.pipeline.fidelity import keep_fidelity, require_taught
from stillroom.pipeline.founding import found_store
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.precompute import require_all_taught, teach
from stillroom.pipeline.quality.likeness import require_installed
from stillroom.pipeline.recipe import save_resolved
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.run_status import RESOLVED
from stillroom.pipeline.side_by_side import train_together
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.train import require_possible, require_untouched, show_students, student_line, train
from stillroom.storage.catalog.stores import summary as summary_of
from stillroom.storage.files import LocalFiles
from stillroom.storage.store import Store


def run_recipe(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """Run what is not done yet; returns the summary that it writes to `summary.json`."""
    save_resolved(recipe, recipe.run_dir / RESOLVED)
    if recipe.evaluate.answers is not None:
        require_installed()
    sources = Sources(recipe, console)
    generations = None
    if recipe.generate is not None:
        from stillroom.pipeline.generate import generate, require_all_generated
        from stillroom.pipeline.generated import generations_summary

        generated = generate(recipe, sources, console)
        require_all_generated(generated)
        generations = generations_summary(recipe, generated)
    manifest = sources.manifest()
    signal = sources.identity().signal
    for student in recipe.students:
        require_untouched(recipe, student, manifest)
        require_possible(recipe, student, manifest, sources)
        require_taught(student, signal, where=recipe.store.path)
    store = found_store(recipe, sources, manifest, console)
    ledger = Ledger(recipe.run_dir / "ledger.jsonl")
    students = []

    def teaching(on_behalf_of: str) -> None:
        taught = teach(recipe, manifest, store, sources, console, ledger=ledger, on_behalf_of=on_behalf_of)
        require_all_taught(taught, store)
        keep_fidelity(recipe, store, console)

    together = recipe.train.side_by_side > 1
    for student in recipe.students:
        if together:
            teaching(student.name)
        elif recipe.train.read_through:
            from stillroom.pipeline.read_through import train_beside  # with it comes Ray, which takes a second

            begin = partial(teaching, student.name)
            students.append(train_beside(recipe, student, manifest, store, begin, console))
        else:
            teaching(student.name)
            students.append(train(recipe, student, console))
    if together:
        students = train_together(recipe, recipe.students, console)
    if not recipe.students:
        teaching("")
    evaluation = evaluate(recipe, console)
    summary = summarise(recipe, store, ledger, students, evaluation)
    if generations is not None:
        summary["generations"] = generations
    LocalFiles(recipe.run_dir).write("summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    _show(recipe, students, summary, console)
    return summary


def summarise(
    recipe: Recipe, store: Store, ledger: Ledger, students: list[dict[str, Any]], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """The run in numbers; teaching counted over all its runs, interrupted ones too."""
    held = summary_of(store)
    first = recipe.students[0].name if recipe.students else ""
    later = {s.name for s in recipe.students[1:]}
    return {
        "recipe": recipe.name,
        "store": store.uri,
        "tokens": held["tokens"],
        "shards": held["shards"],
        "bytes": held["bytes"],
        "bytes_per_token": held["bytes_per_token"],
        "capture_tokens_per_s": ledger.tokens_per_s(),
        "teacher_batches_first_run": ledger.batches({first, ""}),
        "teacher_batches_second_run": ledger.batches(later),
        "students": [student_line(s) for s in students],
        "models": evaluation["models"],
    }


def _show(recipe: Recipe, students: list[dict[str, Any]], summary: dict[str, Any], console: Console) -> None:
    show_students(students, console)
    speed = summary["capture_tokens_per_s"]
    console.info(
        f"store: {summary['tokens']:,} tokens in {summary['shards']:,} shards, {format_bytes(summary['bytes'])}, "
        f"{summary['bytes_per_token']} bytes/token" + (f", captured at {speed:,.0f} tokens/s" if speed else "")
    )
    batches = summary["teacher_batches_first_run"], summary["teacher_batches_second_run"]
    console.info(f"teacher batches: {batches[0]} for the first student, {batches[1]} for the later ones")
    console.info(f"run: {recipe.run_dir} (summary.json, students/*/export); store: {summary['store']}")
    console.info(f"next: stillroom inspect {summary['store']}    stillroom verify {summary['store']}")
    if "generations" in summary:
        from stillroom.pipeline.generated import show_distillation

        show_distillation(summary, console)
