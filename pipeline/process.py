"""What a command is to its process: how signals end it, and the lock on its run's folder.

Enters: signals, a folder. Leaves: KeyboardInterrupt where nothing is lost; one command at a time in a folder. Costs:
nothing.
"""

import fcntl
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stillroom.storage.errors import RecipeError, StillroomError


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is a Ctrl-C inside: it commits what is scored, passes on to the student, and ends with 130."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a signal never comes here
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done. Main thread only.

    By handlers, as masking them does not do: Ray's threads would take the signal, and Python runs its handler here.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        for late in dict.fromkeys(received):
            signal.raise_signal(late)


#: The locks of a run's folder: on its corpus and teaching, and on its students.
TEACHING, TRAINING = ".lock", ".train.lock"


def locks_of(command: str, *, read_through: bool) -> tuple[str, ...]:
    """What a command needs for itself: a student that follows a `teach` leaves the teaching to it."""
    if command in ("plan", "generate", "teach"):
        return (TEACHING,)
    return (TRAINING,) if command == "train" and read_through else (TEACHING, TRAINING)


@contextmanager
def only_one(run_dir: Path, locks: Sequence[str] = (TEACHING, TRAINING)) -> Iterator[None]:
    """Hold a run's folder; the locks go with the process, however it ends.

    Raises StillroomError if another command holds it: two would score the same units twice, and train the same student.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run_dir: {run_dir} cannot be made ({error.strerror}): name another folder") from error
    with ExitStack() as held:
        for name in locks:
            file = held.enter_context((run_dir / name).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StillroomError(
                    f"another stillroom command is at work in {run_dir}: wait for it, end it, or set another run_dir"
                ) from error
        yield


def is_held(run_dir: Path, lock: str) -> bool:
    """Whether another command holds it now."""
    if not (run_dir / lock).exists():
        return False
    with (run_dir / lock).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
