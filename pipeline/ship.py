"""stillroom as one folder that can be sent to machines on which it is not installed.

Enters: the package that is running, installed or editable. Leaves: a folder `stillroom` with every file of a wheel and
no other. Costs: a copy of 1 MB; no network, no pip, no build.

A driver that joins a cluster sends it along (cluster.py): Ray unpacks it before the import path of each node's workers,
where it comes before an installed stillroom, so driver and actors are always the same code. A wheel would do the same,
but nodes would have pip install it, with everything that it depends on.

To submit a job to a cluster on whose head stillroom is not installed either, put it beside the recipe:

    python -m stillroom.pipeline.ship FOLDER
    ray job submit --working-dir FOLDER -- python -m stillroom.pipeline teach recipe.yaml
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOMS = ("pipeline", "storage", "workers")
#: Where Ray unpacks what came with a job, on each node.
_UNPACKED_BY_RAY = "runtime_resources"


def write_package(folder: Path) -> Path:
    """Write the running package under `folder`, in place of one that is there; returns `folder / "stillroom"`."""
    target = folder / "stillroom"
    fresh = folder / f".stillroom.{os.getpid()}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    for room in ROOMS:
        shutil.copytree(_source(room), fresh / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target


@contextmanager
def package_folder() -> Iterator[Path]:
    """The running package as a folder that lasts as long as the block."""
    with TemporaryDirectory(prefix="stillroom-") as folder:
        yield write_package(Path(folder))


def came_with_job() -> bool:
    """Whether the running package was sent with a Ray job, which then sends it to every actor as well."""
    return _UNPACKED_BY_RAY in _source("pipeline").parts


def _source(room: str) -> Path:
    spec = importlib.util.find_spec(f"stillroom.{room}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m stillroom.pipeline.ship FOLDER", file=sys.stderr)
        sys.exit(2)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(write_package(Path(sys.argv[1])))
