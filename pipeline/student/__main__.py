"""python -m stillroom.pipeline.student JOB.json

Enters: a job file. Leaves: the run folder, and an exit code: 0 finished (also if it was before), 1 a problem, 2 a bad
job file, 130 interrupted. Costs: a finished run answers without importing torch.
"""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.pipeline.student.bindings import RESULT, bindings_of, finished
from stillroom.pipeline.student.config import StudentJob
from stillroom.storage.errors import StillroomError, StudentError, UsageError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot


def main(arguments: list[str]) -> int:
    """Run a job; the exit code."""
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -m stillroom.pipeline.student JOB.json")
        job = StudentJob.read(Path(arguments[0]))
        with locked(job.run_dir):
            _run(job)
    except StillroomError as error:
        print(f"error: {error}", file=sys.stderr)
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
def locked(run_dir: Path) -> Iterator[None]:
    """Only one process trains in a folder; the lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudentError(f"another process is training in {run_dir}: wait for it, or end it") from error
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
