"""Students of one recipe trained side by side: each in its process, from one store.

Enters: a recipe, its students. Leaves: what `train` leaves of each. Costs: the memory of as many students as run at
once; on one device they share it, and each is the slower for it.

Numbers do not depend on who trains beside whom. With GPUs, each of those that run at once has the ones of its own.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.devices import VISIBLE, visible_gpus
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.pipeline.student_process import StudentProcess
from stillroom.pipeline.train import job_of, result_of, start, trained
from stillroom.storage.errors import RecipeError, StillroomError

INTERVAL_S = 0.2


def train_together(recipe: Recipe, students: Sequence[StudentConfig], console: Console) -> list[dict[str, Any]]:
    """Train those that are not trained yet, `train.side_by_side` at a time; the results, in the students' order.

    An error of one ends the others at a checkpoint, and is raised; a Ctrl-C does the same. The same call goes on.
    """
    jobs = [job_of(recipe, student) for student in students]
    waiting = deque(job for job in jobs if result_of(job) is None)
    for job in jobs:
        if job not in waiting:
            console.info(f"train: {job.student.name} is trained already, in {job.run_dir}")
    seats = _seats(recipe, students)
    working: dict[int, StudentProcess] = {}  # by seat
    try:
        while waiting or working:
            for seat in range(len(seats)):
                if seat not in working and waiting:
                    working[seat] = _begin(recipe, waiting.popleft(), seats[seat], console)
            for seat in [seat for seat, process in working.items() if process.ended]:
                working.pop(seat).wait()
            time.sleep(INTERVAL_S)
    finally:
        _end(working)
    return [trained(recipe, job, console) for job in jobs]


def _begin(recipe: Recipe, job: StudentJob, gpus: str | None, console: Console) -> StudentProcess:
    environment = None if gpus is None else {**os.environ, VISIBLE: gpus}
    return start(recipe, job, console, beside=True, environment=environment)


def _seats(
    recipe: Recipe, students: Sequence[StudentConfig], look: Callable[[], list[str]] = visible_gpus
) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of those that run at once; None where nobody may want a GPU, or the recipe
    names one. Raises RecipeError if there are GPUs, and too few."""
    count = min(recipe.train.side_by_side, len(students)) or 1
    if all(student.device in ("cpu", "mps") or ":" in student.device for student in students):
        return [None] * count
    visible, each = look(), recipe.train.processes
    if not visible:
        return [None] * count
    if len(visible) < count * each:
        raise RecipeError(
            f"train.side_by_side is {count}, of {each} GPU{'s' * (each > 1)} each; this machine has {len(visible)}: "
            "lower it, or give each student a device"
        )
    return [",".join(visible[seat * each : (seat + 1) * each]) for seat in range(count)]


def _end(working: dict[int, StudentProcess]) -> None:
    """Those that are left stop at a checkpoint; how they end says nothing new."""
    for process in working.values():
        process.stop()
    for process in working.values():
        with suppress(StillroomError, KeyboardInterrupt):
            process.wait()
