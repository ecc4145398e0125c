"""python -m stillroom.pipeline.student JOB.json

Enters: a job file. Leaves: the run folder, and an exit code: 0 finished (also if it was before), 1 a problem, 2 a bad
job file, 130 interrupted. Costs: a finished run answers without importing torch.

Of several processes each runs this. They are started from here, where the job says how many, or by torchrun, which may
do so on several machines that share the run's folder:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --shutdown-timeout 600
        -m stillroom.pipeline.student JOB.json
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from stillroom.pipeline.student.bindings import RESULT, bindings_of, finished
from stillroom.pipeline.student.config import StudentJob
from stillroom.pipeline.student.launcher import launch
from stillroom.pipeline.student.parent import Parent
from stillroom.pipeline.student.places import Place
from stillroom.storage.errors import StillroomError, StudentError, UsageError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot

#: A step and a checkpoint of a large student.
PATIENCE_S = 120.0


def main(arguments: list[str]) -> int:
    """Run a job; the exit code."""
    parent, place = Parent(), Place.here()
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -m stillroom.pipeline.student JOB.json")
        job = StudentJob.read(Path(arguments[0]))
        # A command holds the run's folder: who still trains here has lost his, and is writing his last checkpoint.
        patience_s = 0 if parent.pid is None else PATIENCE_S
        # Of several processes the first one holds it, or what started them for all.
        own = not place.launched and place.rank == 0
        with locked(job.run_dir, patience_s=patience_s) if own else nullcontext(-1) as lock:
            _run(job, Path(arguments[0]), place, lock)
    except StillroomError as error:
        parent.tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _run(job: StudentJob, path: Path, place: Place, lock: int) -> None:
    manifest = Manifest.open(job.manifest)
    snapshot = None if job.snapshot is None else Snapshot.read(job.snapshot)
    result = finished(job, bindings_of(job, manifest, snapshot))
    if result is not None:
        if place.rank == 0:
            print(f"{job.student.name}: already trained, see {job.run_dir / RESULT}", file=sys.stderr)
        return
    if job.processes > 1 and not place.told:
        launch(path, job.processes, lock)
        return
    if place.world > 1:
        # DistributedDataParallel warns, from C++, of every run in which no parameter is unused: most are like that.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from stillroom.pipeline.student.session import run

    result = run(job, manifest, snapshot)
    if place.rank == 0:
        print(f"{job.student.name}: trained, exported to {result['export']}", file=sys.stderr)


@contextmanager
def locked(run_dir: Path, *, patience_s: float = 0) -> Iterator[int]:
    """Only one process trains in a folder; the lock goes with the process, however it ends. Gives its descriptor:
    processes that have inherited it hold the lock as well."""
    run_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience_s
    with (run_dir / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise StudentError(f"another process is training in {run_dir}: wait for it, or end it") from error
            time.sleep(0.1)
        yield file.fileno()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
