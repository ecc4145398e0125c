"""Students of all stages in one table, each against the teacher with which its chain began.

Enters: a chain whose stages are done. Leaves: one row a student; what was measured stays in the stage's `measured/`.
Costs: one pass over the first stage's held-out documents for each student that has another teacher.

A student's own KL is to its own teacher, which in a later stage is a student itself: only against the first teacher
can a chain be held beside direct distillation. Steps count the student's own, and those of all that led to it.
"""

import json
import time
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console, format_count
from stillroom.pipeline.measured import held, keep, run_module, weights_of
from stillroom.pipeline.pinning import SNAPSHOT
from stillroom.pipeline.recipe.chain import Chain, Stage
from stillroom.pipeline.student.bindings import EXPORT, RESULT, read_result
from stillroom.pipeline.train import manifest_path, student_folder
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot


def compare(chain: Chain, console: Console) -> list[dict[str, Any]]:
    """One row for each trained student, in the order of the stages."""
    rows = []
    for stage in chain.stages:
        root, before = chain.root(stage), chain.steps(stage)
        for student in stage.recipe.students:
            path = student_folder(stage.recipe, student) / RESULT
            if not path.exists():
                continue
            result = read_result(path)
            own = result["after"] or {}
            first = own if root is stage else _against(root, stage, student.name, console)
            rows.append(
                {
                    "stage": stage.name,
                    "student": student.name,
                    "teacher": "/".join(stage.taught_by) if stage.taught_by else stage.recipe.teacher.model,
                    "layers": result["layers"],
                    "parameters": result["parameters"],
                    "steps": result["steps"],
                    "steps_with_teachers": None if before is None else before + result["steps"],
                    "kl_to_own_teacher": own.get("kl"),
                    **{f"{name}_to_first_teacher": first.get(name) for name in ("kl", "top1", "top5")},
                    "perplexity": own.get("perplexity"),
                }
            )
    show(rows, console)
    return rows


def _against(root: Stage, stage: Stage, student: str, console: Console) -> dict[str, Any]:
    """Of a student on the first stage's held-out documents; nothing where that stage pinned no signal."""
    recipe = stage.recipe
    folder = recipe.run_dir / "students" / student / EXPORT
    snapshot = _snapshot(root)
    if snapshot is None:
        return {}
    manifest = manifest_path(root.recipe)
    wanted = {
        "folder": str(folder), "weights": weights_of(folder), "manifest": Manifest.open(manifest).digest,
        "snapshot": Snapshot.read(snapshot).digest,
    }  # fmt: skip
    name = f"{student}.first-teacher"
    found = held(recipe.run_dir, name, wanted)
    if found is None:
        console.info(f"compare: {stage.name}/{student} against the teacher of stage {root.name}")
        request = {
            "folder": str(folder), "manifest": str(manifest), "snapshot": str(snapshot),
            "device": recipe.teacher.device,
        }  # fmt: skip
        what = f"measuring {student} in {folder} against {snapshot}"
        began = time.monotonic()
        found = dict(json.loads(run_module("stillroom.pipeline.student.against", request, what)))
        keep(recipe.run_dir, name, wanted, found, wall_s=time.monotonic() - began)
    return found


def _snapshot(root: Stage) -> Path | None:
    paths = [student_folder(root.recipe, student) / SNAPSHOT for student in root.recipe.students]
    return next((path for path in paths if path.exists()), None)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    console.table(
        ["stage", "student", "layers", "parameters", "steps", "with its teachers'", "KL to own teacher",
         "KL to first teacher", "top-1 agreement with it", "perplexity"],
        [
            [
                row["stage"], row["student"], str(row["layers"]), format_count(row["parameters"]), str(row["steps"]),
                "–" if row["steps_with_teachers"] is None else str(row["steps_with_teachers"]),
                number(row["kl_to_own_teacher"], 3), number(row["kl_to_first_teacher"], 3),
                number(row["top1_to_first_teacher"], 3), number(row["perplexity"], 2),
            ]
            for row in rows
        ],
        title="students of all stages on the held-out documents",
    )  # fmt: skip
