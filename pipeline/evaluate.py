"""The evaluation stage: teacher and students side by side, each measured in a process of its own.

Enters: a recipe whose students are trained. Leaves: the table of the chapter's §1.2 — parameters, memory, latency,
quality — in `evaluation.json`. Costs: one load and one pass over the held-out documents per model; a model measured
before is not measured again.

What is compared with the teacher (KL, top-1 agreement) the student's process has measured from the store; what
needs only the text (perplexity, calibration) is measured here for both, by the same code.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console, format_bytes, format_count
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.bindings import RESULT
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
    models = []
    if recipe.evaluate.teacher:
        from stillroom.workers.source import resolve_model

        folder = resolve_model(recipe.teacher.model)
        models.append({"name": "teacher", **_measure(recipe, folder, "teacher", console)})
    for student in recipe.students:
        trained = (student_folder(recipe, student) / RESULT).exists()
        result = result_of(job_of(recipe, student)) if trained else None
        if result is None:
            console.notice(f"evaluate: student {student.name} is not trained yet and is left out")
            continue
        measured = _measure(recipe, Path(result["export"]), student.name, console)
        after = result["after"] or {}
        of_teacher = {key: after.get(key) for key in ("kl", "top1", "top5", "teacher_mass", "student_mass")}
        models.append({"name": student.name, **measured, **of_teacher})
    if not models and recipe.students:
        raise StillroomError(f"no student in {recipe.run_dir} is trained: run `stillroom train` on this recipe first")
    evaluation = {"models": models}
    LocalFiles(recipe.run_dir).write("evaluation.json", (json.dumps(evaluation, indent=2) + "\n").encode())
    _show(models, console)
    return evaluation


def _measure(recipe: Recipe, folder: Path, name: str, console: Console) -> dict[str, Any]:
    """Measurements of one model folder, from `measured/<name>.json` if they are of these weights and this text."""
    manifest = Manifest.open(manifest_path(recipe))
    weights = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))}
    wanted = {
        "folder": str(folder),
        "weights": weights,
        "manifest": manifest.digest,
        "latency_tokens": recipe.evaluate.latency_tokens,
        "dtype": recipe.teacher.dtype if name == "teacher" else "float32",
    }
    path = recipe.run_dir / "measured" / f"{name}.json"
    if path.exists():
        held = json.loads(path.read_text())
        if held["of"] == wanted:
            return dict(held["measured"])
    console.info(f"evaluate: measuring {name}")
    trusted = recipe.teacher.trust_remote_code
    request = json.dumps(
        {**wanted, "manifest_path": str(manifest.path), "device": recipe.teacher.device, "trust_remote_code": trusted}
    )
    done = subprocess.run(
        [sys.executable, "-m", "stillroom.pipeline.measure"], input=request, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise StillroomError(f"measuring {name} in {folder} failed: {last[0]}")
    measured = json.loads(done.stdout)
    LocalFiles(path.parent).write(path.name, json.dumps({"of": wanted, "measured": measured}).encode())
    return dict(measured)


def _show(models: list[dict[str, Any]], console: Console) -> None:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            m["name"],
            format_count(m["parameters"]),
            format_bytes(m["weight_bytes"]),
            number(m["latency_ms_per_token"], 1),
            number(m["perplexity"], 2),
            number(m["ece"], 3),
            number(m.get("kl"), 3),
            number(m.get("top1"), 3),
        ]
        for m in models
    ]
    columns = ["model", "parameters", "weights", "ms/token", "perplexity", "ECE", "KL to teacher", "top-1 agreement"]
    console.table(columns, rows, title="teacher and students on the held-out documents")
