"""python -m stillroom.pipeline.student JOB.json

Enters: a job file. Leaves: the run folder, and an exit code: 0 finished (also if it was before), 1 a problem, 2 a bad
job file, 130 interrupted. Costs: a finished run answers without importing torch.
"""

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.pipeline.student.bindings import RESULT, bindings_of, finished
from stillroom.pipeline.student.config import StudentJob
from stillroom.pipeline.student.parent import Parent
from stillroom.storage.errors import StillroomError, StudentError, UsageError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot

#: A step and a checkpoint of a large student.
PATIENCE_S = 120.0


def main(arguments: list[str]) -> int:
    """Run a job; the exit code."""
    parent = Parent()
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -m stillroom.pipeline.student JOB.json")
        job = StudentJob.read(Path(arguments[0]))
        # A command holds the run's folder: who still trains here has lost his, and is writing his last checkpoint.
        with locked(job.run_dir, patience_s=0 if parent.pid is None else PATIENCE_S):
            _run(job)
    except StillroomError as error:
        parent.tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _run(job: StudentJob) -> None:
    manifest = Manifest.open(job.manifest)
    snapshot = None if job.snapshot is None else Snapshot.read(job.snapshot)
    result = finished(job, bindings_of(job, manifest, snapshot))
    if result is not None:
        print(f"{job.student.name}: already trained, see {job.run_dir / RESULT}", file=sys.stderr)
        return
    from stillroom.pipeline.student.session import run

    result = run(job, manifest, snapshot)
    print(f"{job.student.name}: trained, exported to {result['export']}", file=sys.stderr)


@contextmanager
def locked(run_dir: Path, *, patience_s: float = 0) -> Iterator[None]:
    """Only one process trains in a folder; the lock goes with the process, however it ends."""
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
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
