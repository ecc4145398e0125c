"""The processes that train one student on this machine: started, told to stop, and ended together.

Enters: a job file and how many. Leaves: their end as one process' would have been: nothing, the error that a rank met,
or KeyboardInterrupt. Costs: a look ten times a second; no torch.

Not torchrun, which the ranks also run under (see `places`): it kills what has not ended 30 s after a signal, in the
middle of a large student's checkpoint; ends with code 1 however the ranks ended; and prints its own trace of their
errors. Over several machines it is the one to use.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillroom.pipeline.student.parent import VARIABLE
from stillroom.pipeline.student.places import RENDEZVOUS
from stillroom.storage import errors
from stillroom.storage.errors import RankLost, StillroomError, StudentError

INTERRUPTED = 130
#: Once a rank has ended badly, the others have so long to say what they met: they may be inside a message that never
#: comes. After a stop they have as long as a checkpoint may take to be synced.
GRACE_S = 10.0
STOP_GRACE_S = 120.0
LOOK_S = 0.1


def launch(path: Path, processes: int, lock: int) -> None:
    """Train a job. lock: descriptor of the run folder's lock, which each of them holds too.

    Raises the error that a rank met, StudentError if one could not say, KeyboardInterrupt after a signal.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-ranks-") as folder, _passing() as ranks:
        where = f"file://{folder}/meeting"
        for number in range(processes):
            ranks.append(_Rank(path, number, processes, where, lock))
        _wait(ranks)
    _judge(ranks)


class _Rank:
    """One process, out of the terminal's reach: a signal comes to it from here, once."""

    def __init__(self, path: Path, number: int, world: int, where: str, lock: int) -> None:
        self.number = number
        #: As it ended by itself; None while it runs, and for one that was ended from here.
        self.code: int | None = None
        self._reading, writing = os.pipe()
        cores = max(1, len(os.sched_getaffinity(0)) // world) if hasattr(os, "sched_getaffinity") else 1
        environment = {
            "OMP_NUM_THREADS": str(cores),
            **os.environ,
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            RENDEZVOUS: where,
            VARIABLE: f"{os.getpid()}:{writing}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillroom.pipeline.student", str(path)], env=environment,
            pass_fds=(writing, lock), process_group=0,
        )  # fmt: skip
        os.close(writing)

    def told(self) -> dict[str, Any] | None:
        """The error that it met, once it has ended."""
        with os.fdopen(self._reading, encoding="utf-8") as pipe:
            text = pipe.read()
        found: dict[str, Any] | None = json.loads(text) if text else None
        return found

    @property
    def interrupted(self) -> bool:
        return self.code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)


@contextmanager
def _passing() -> Iterator[list[_Rank]]:
    """Both signals go to all ranks while open. None outlives it."""
    ranks: list[_Rank] = []

    def passed(number: int, _frame: object) -> None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    before = {number: signal.signal(number, passed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[_Rank]) -> None:
    """Until all have ended, or one has ended badly and the others have had their time."""
    end: float | None = None
    while True:
        for rank in ranks:
            rank.code = rank.process.poll()
        if all(rank.code is not None for rank in ranks):
            return
        bad = [rank for rank in ranks if rank.code]
        if bad and end is None:
            end = time.monotonic() + (STOP_GRACE_S if all(rank.interrupted for rank in bad) else GRACE_S)
        if end is not None and time.monotonic() >= end:
            return
        time.sleep(LOOK_S)


def _judge(ranks: list[_Rank]) -> None:
    """Raise what a rank met: its own error before the end of one that could not say, and that before the loss of
    another rank, which all the others meet."""
    told = {rank.number: words for rank in ranks if (words := rank.told()) is not None}
    own = [words for words in told.values() if words["kind"] != RankLost.__name__]
    if own:
        raise _error(own[0])
    if any(rank.interrupted for rank in ranks):
        raise KeyboardInterrupt
    untold = [rank for rank in ranks if rank.code and rank.number not in told]
    if untold:
        code = untold[0].code or 0
        how = f"was killed by signal {-code}" if code < 0 else f"stopped with exit code {code}"
        raise StudentError(
            f"rank {untold[0].number} of {len(ranks)} {how}; the same command goes on from its last checkpoint"
        )
    for words in told.values():
        raise _error(words)


def _error(words: dict[str, Any]) -> StillroomError:
    kind: type[StillroomError] = getattr(errors, words["kind"])
    return kind(words["message"])
