"""The evaluation stage: teacher and students side by side, each measured in a process of its own.

Enters: a recipe whose students are trained. Leaves: the table of the chapter's §1.2 — parameters, memory, latency,
quality — in `evaluation.json`. Costs: one load and one pass over the held-out documents per model; a model measured
before is not measured again.

What is compared with the teacher (KL, top-1 agreement) the student's process has measured from the store; what
needs only the text (perplexity, calibration) is measured here for both, by the same code. With `evaluate.answers` each
student answers held-out prompts there as well, and BLEU and ROUGE-L are counted here.
"""

import json
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from stillroom.pipeline.answers import Question, compared, questions, request
from stillroom.pipeline.console import Console, format_bytes, format_count
from stillroom.pipeline.console import format_number as number
from stillroom.pipeline.harness import held_tasks, require_lm_eval, tasks_of
from stillroom.pipeline.harness import shown as tasks_shown
from stillroom.pipeline.measured import held, keep, run_module, weights_of
from stillroom.pipeline.quality.likeness import require_installed
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.bindings import EXPORT, RESULT
from stillroom.pipeline.train import job_of, manifest_path, result_of, student_folder
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import LocalFiles
from stillroom.storage.manifest import Manifest


def evaluate_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom evaluate`."""
    return evaluate(recipe, console)


def evaluate(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Measure the teacher (if the recipe wants it) and every trained student; returns {"models": […]}."""
    if not manifest_path(recipe).exists():
        raise StillroomError(f"{manifest_path(recipe)} is not there yet: run `stillroom run` on this recipe first")
    asked = _questions(recipe, Manifest.open(manifest_path(recipe)))
    _notices(recipe, asked, console)
    if recipe.evaluate.lm_eval:
        require_lm_eval()
    models = []
    if recipe.evaluate.teacher:
        from stillroom.workers.source import resolve_model

        folder = resolve_model(recipe.teacher.model)
        measured = _measure(recipe, folder, "teacher", console)
        models.append({"name": "teacher", **measured, **_tasks(recipe, folder, "teacher", console)})
    for student in recipe.students:
        trained = (student_folder(recipe, student) / RESULT).exists()
        result = result_of(job_of(recipe, student)) if trained else None
        if result is None:
            console.notice(f"evaluate: student {student.name} is not trained yet and is left out")
            continue
        measured = _measure(recipe, Path(result["export"]), student.name, console, asked)
        if asked:
            measured["answers"] = compared(asked, measured["answers"], recipe.run_dir, student.name)
        after = result["after"] or {}
        of_teacher = {key: after.get(key) for key in ("kl", "top1", "top5", "teacher_mass", "student_mass")}
        measured |= _tasks(recipe, Path(result["export"]), student.name, console)
        models.append({"name": student.name, **measured, **of_teacher, "kl_positions": after.get("tokens")})
        if student.eval_packs and after and after["tokens"] < measured["heldout_positions"]:
            console.notice(
                f"evaluate: KL and agreement of {student.name} are of {after['tokens']:,} positions (its eval_packs, "
                f"{student.eval_packs}), perplexity and ECE of all {measured['heldout_positions']:,}"
            )
    if not models and recipe.students:
        raise StillroomError(f"no student in {recipe.run_dir} is trained: run `stillroom train` on this recipe first")
    evaluation = {"models": models}
    LocalFiles(recipe.run_dir).write("evaluation.json", (json.dumps(evaluation, indent=2) + "\n").encode())
    _show(models, console)
    return evaluation


def _tasks(recipe: Recipe, folder: Path, name: str, console: Console) -> dict[str, Any]:
    """Downstream tasks, where the recipe has any."""
    asked = recipe.evaluate.lm_eval
    return {"lm_eval": tasks_of(recipe, asked, folder, name, console)} if asked else {}


def _questions(recipe: Recipe, manifest: Manifest) -> list[Question]:
    """What students are asked; nothing where the recipe does not want it, or has no held-out prompt."""
    if recipe.evaluate.answers is None:
        return []
    require_installed()
    from stillroom.pipeline.student.model import load_tokenizer  # torch

    return questions(manifest, load_tokenizer(recipe.run_dir / "tokenizer"), recipe.evaluate.answers.prompts)


def _notices(recipe: Recipe, asked: list[Question], console: Console) -> None:
    if recipe.evaluate.answers is not None and not asked:
        console.notice(
            "evaluate: no prompt with a kept response is held out, so no student answers any: give more prompts, or "
            "set corpus.heldout higher"
        )
    if any(question.retokenised for question in asked):
        console.notice(
            "evaluate: the prompts are of another tokenizer than the students': their text is tokenised anew"
        )


def _measure(recipe: Recipe, folder: Path, name: str, console: Console, asked: Seq[Question] = ()) -> dict[str, Any]:
    """Measurements of one model folder, from `measured/<name>.json` if they are of these weights, this text and these
    prompts."""
    manifest = Manifest.open(manifest_path(recipe))
    wanted = _wanted(recipe, folder, name, manifest, asked)
    found = held(recipe.run_dir, name, wanted)
    if found is None:
        console.info(f"evaluate: measuring {name}")
        told = {
            "manifest_path": str(manifest.path), "device": recipe.teacher.device,
            "trust_remote_code": recipe.teacher.trust_remote_code,
        }  # fmt: skip
        began = time.monotonic()
        printed = run_module("stillroom.pipeline.measure", wanted | told, f"measuring {name} in {folder}")
        found = dict(json.loads(printed))
        keep(recipe.run_dir, name, wanted, found, wall_s=time.monotonic() - began)
    return found


def _wanted(recipe: Recipe, folder: Path, name: str, manifest: Manifest, asked: Seq[Question] = ()) -> dict[str, Any]:
    """All that a model's measurements depend on."""
    answers = recipe.evaluate.answers
    return {
        "folder": str(folder),
        "weights": weights_of(folder),
        "manifest": manifest.digest,
        "latency_tokens": recipe.evaluate.latency_tokens,
        "dtype": recipe.teacher.dtype if name == "teacher" else "float32",
        **({"answers": request(asked, max_tokens=answers.max_tokens)} if asked and answers else {}),
    }


def stale_measures(recipe: Recipe, manifest: Manifest) -> list[str]:
    """Names of the teacher and the trained students that are not measured as the recipe asks. Measures nothing."""
    from stillroom.workers.source import resolve_model

    folders = {"teacher": resolve_model(recipe.teacher.model)} if recipe.evaluate.teacher else {}
    folders |= {student.name: student_folder(recipe, student) / EXPORT for student in recipe.students}
    asked = _questions(recipe, manifest)
    stale = []
    for name, folder in folders.items():
        wanted = _wanted(recipe, folder, name, manifest, () if name == "teacher" else asked)
        tasks = recipe.evaluate.lm_eval
        lacks_tasks = tasks is not None and held_tasks(recipe, tasks, folder, name) is None
        if lacks_tasks or held(recipe.run_dir, name, wanted) is None:
            stale.append(name)
    return stale


def _show(models: list[dict[str, Any]], console: Console) -> None:
    answered = any(m.get("answers") for m in models)
    kinds = any("perplexity_teacher_text" in m for m in models)
    tasks = tasks_shown(models)
    rows = [
        [
            m["name"],
            format_count(m["parameters"]),
            format_bytes(m["weight_bytes"]),
            number(m["latency_ms_per_token"], 1),
            number(m["perplexity"], 2),
            *([number(m.get("perplexity_teacher_text"), 2), number(m.get("perplexity_ground_truth"), 2)] * kinds),
            number(m["ece"], 3),
            number(m.get("kl"), 3),
            number(m.get("top1"), 3),
            *([number((m.get("answers") or {}).get(key), digits) for key, digits in _ANSWERS] * answered),
            *(number(m.get("lm_eval", {}).get(task, {}).get(metric), 3) for task, metric in tasks),
        ]
        for m in models
    ]
    columns = [
        "model", "parameters", "weights", "ms/token", "perplexity", *(["on teacher text", "on ground truth"] * kinds),
        "ECE", "KL to teacher", "top-1 agreement", *(["BLEU", "ROUGE-L"] * answered),
        *(f"{task} {metric}" for task, metric in tasks),
    ]  # fmt: skip
    console.table(columns, rows, title="teacher and students on the held-out documents")


_ANSWERS = (("bleu", 1), ("rouge_l", 3))
