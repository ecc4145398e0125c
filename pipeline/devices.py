"""Which GPUs a student and teachers on one machine get, when they work at the same time: never the same one.

Enters: a recipe and the GPUs that this process sees. Leaves: what CUDA_VISIBLE_DEVICES is to be for the teachers.
Costs: torch is imported, if both could want a GPU.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillroom.pipeline.cluster import address_of
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.config import StudentConfig
from stillroom.storage.errors import RecipeError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, in order."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def teachers_gpus(
    recipe: Recipe, student: StudentConfig, look: Callable[[], list[str]] = visible_gpus
) -> list[str] | None:
    """The GPUs that are left to teachers beside this student; None where both cannot want the same one. look: gives
    the GPUs of this process.

    Raises RecipeError if too few are left, or it cannot be told from here.
    """
    gpus = recipe.ray.actors * recipe.teacher.ranks * recipe.ray.gpus_per_actor
    if recipe.teacher.device == "cpu" or not gpus or student.device in ("cpu", "mps"):
        return None
    visible = look()
    if not visible:
        return None
    if address_of(recipe.ray) is not None:
        raise RecipeError(
            f"train.read_through: student {student.name} may want a GPU of this machine ({student.device}) that the "
            "cluster gives to a teacher: run `stillroom teach` on the cluster and `stillroom train` on a machine "
            "outside it, or set the student's device to cpu"
        )
    first = int(student.device.partition(":")[2] or 0)
    own = range(first, first + recipe.train.processes)
    left = [name for number, name in enumerate(visible) if number not in own]
    if math.ceil(gpus) > len(left):
        raise RecipeError(
            f"train.read_through: student {student.name} takes GPU {', '.join(map(str, own))} of {len(visible)}, which "
            f"leaves {len(left)} for teachers that ask for {gpus:g} (ray.actors × teacher.ranks × ray.gpus_per_actor): "
            "they never share one; lower these, set the student's device to cpu, or set train.read_through to false"
        )
    return left


@contextmanager
def only_gpus(names: list[str] | None) -> Iterator[None]:
    """What is started inside sees these GPUs alone; None: all that we see."""
    if names is None:
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ",".join(names)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before
