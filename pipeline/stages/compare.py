"""Students of all stages in one table, each against the teacher with which its chain began.

Enters: a chain whose stages are done. Leaves: one row a student; what was measured stays in the stage's `measured/`.
Costs: for each student a process, one pass over its first stage's held-out documents, and over its own stage's where
its teacher is another.

A student's own KL is to its own teacher, which in a later stage is a student itself: only against the first teacher
can a chain be held beside direct distillation. Every row is measured here, by one code on all held-out documents: what
a run says after training is of its `eval_packs`, its packing and its precision. Steps count the student's own, and
those of all that led to it.
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
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.train import manifest_path, student_folder
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot


def compare(chain: Chain, console: Console) -> list[dict[str, Any]]:
    """One row for each trained student, in the order of the stages."""
    rows: list[dict[str, Any]] = []
    heldout: dict[str, str] = {}
    for stage in chain.stages:
        root, before = chain.root(stage), chain.steps(stage)
        for student in stage.recipe.students:
            path = student_folder(stage.recipe, student) / RESULT
            if not path.exists():
                continue
            result = read_result(path)
            first, *others = _measured(root, stage, student, console)
            own = others[0] if others else first
            heldout[root.name] = Manifest.open(manifest_path(root.recipe)).digest
            rows.append(
                {
                    "stage": stage.name,
                    "student": student.name,
                    "teacher": "/".join(stage.taught_by) if stage.taught_by else stage.recipe.teacher.model,
                    "layers": result["layers"],
                    "parameters": result["parameters"],
                    "steps": result["steps"],
                    "steps_with_teachers": None if before is None else before + result["steps"],
                    "heldout_positions": first.get("tokens"),
                    "kl_to_own_teacher": own.get("kl"),
                    **{f"{name}_to_first_teacher": first.get(name) for name in ("kl", "top1", "top5")},
                    "perplexity": first.get("perplexity"),
                }
            )
    show(rows, console)
    if len(set(heldout.values())) > 1:
        console.notice(
            f"compare: stages {', '.join(heldout)} have corpora of their own: rows of what they led to are of other "
            "held-out documents, and cannot be held beside each other"
        )
    return rows


def _measured(root: Stage, stage: Stage, student: StudentConfig, console: Console) -> list[dict[str, Any]]:
    """Of a student on the first stage's held-out documents; of one in a later stage also on its own stage's, which
    hold what its own teacher said. Without KL where no signal was pinned."""
    recipe = stage.recipe
    folder = student_folder(recipe, student) / EXPORT
    on = [(manifest_path(root.recipe), _snapshot(root))]
    if root is not stage:
        on.append((manifest_path(recipe), _there(student_folder(recipe, student) / SNAPSHOT)))
    wanted = {
        "folder": str(folder), "weights": weights_of(folder), "on": [
            [Manifest.open(manifest).digest, snapshot and Snapshot.read(snapshot).digest] for manifest, snapshot in on
        ],
    }  # fmt: skip
    name = f"{student.name}.first-teacher"
    found = held(recipe.run_dir, name, wanted)
    if found is None:
        console.info(f"compare: {stage.name}/{student.name} against the teacher of stage {root.name}")
        request = {
            "folder": str(folder), "device": recipe.teacher.device, "on": [
                {"manifest": str(manifest), "snapshot": snapshot and str(snapshot)} for manifest, snapshot in on
            ],
        }  # fmt: skip
        began = time.monotonic()
        what = f"measuring {student.name} in {folder} on held-out documents"
        found = {"on": json.loads(run_module("stillroom.pipeline.student.against", request, what))}
        keep(recipe.run_dir, name, wanted, found, wall_s=time.monotonic() - began)
    return list(found["on"])


def _snapshot(root: Stage) -> Path | None:
    """What any student of the stage learned from; None where all learned from the text alone."""
    found = (_there(student_folder(root.recipe, student) / SNAPSHOT) for student in root.recipe.students)
    return next((path for path in found if path), None)


def _there(path: Path) -> Path | None:
    return path if path.exists() else None


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
