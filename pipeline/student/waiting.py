"""Waiting for teachers: a student on an open snapshot, whose shards are told as they are committed.

Enters: what the command that follows the log appends to `arrivals.jsonl`. Leaves: shards, one line for a person where
the student has to wait for one, and in the end the complete snapshot. Costs: a stat five times a second while it waits.

The student itself waits as long as its command lives: that one knows whether anybody still teaches, and ends it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from stillroom.storage.arrivals import Arrivals, arrivals_path
from stillroom.storage.errors import StudentError
from stillroom.storage.records import ShardRef
from stillroom.storage.snapshot import Snapshot

INTERVAL_S = 0.2
#: Shorter waits are not worth a line: the stream is packs ahead of the student.
WORTH_A_LINE_S = 2.0
#: Of waiting, between two lines: where units come one by one, each wait by itself is short.
LINE_EVERY_S = 30.0


class WaitEnded(Exception):
    """Nobody waits any more: a signal came, or the stream was closed."""


class Waiting:
    """Shared by a student's streams, each with a thread of its own.

    path: of the open snapshot. stopped: whether a signal asked the run to end. say: takes a line. clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        snapshot: Snapshot,
        *,
        stopped: Callable[[], bool],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._snapshot = path, snapshot
        self._stopped, self.say, self._clock, self._sleep = stopped, say, clock, sleep
        self._arrivals = Arrivals(arrivals_path(path))
        self._lock = threading.Lock()
        self._next_line = WORTH_A_LINE_S
        self.seconds = 0.0
        """Waited in all. Some of it while the student still had packs."""

    def held(self) -> dict[str, ShardRef]:
        """Shards that are there now, by unit."""
        with self._lock:
            self._arrivals.look()
            return {**self._snapshot.refs, **self._arrivals.refs}

    def __call__(self, unit: str, gone: Callable[[], bool]) -> ShardRef:
        """The shard of a unit, waited for. Raises WaitEnded."""
        self._wait(lambda: self._arrived(unit), gone, f"unit {unit[:12]}, which is not scored yet")
        return self._arrivals.refs[unit]

    def complete(self) -> Snapshot:
        """The complete snapshot, waited for. Raises WaitEnded; StudentError if it has other shards than were read."""
        found = self._snapshot
        seen: tuple[int, int] | None = None

        def there() -> bool:
            nonlocal found, seen
            state = self._path.stat()
            if (state.st_ino, state.st_mtime_ns) != seen:
                seen = state.st_ino, state.st_mtime_ns
                found = Snapshot.read(self._path)
            return not found.open

        self._wait(there, lambda: False, "the last units: a student is done when all of its corpus is scored")
        changed = [unit for unit, ref in self.held().items() if found.refs.get(unit) != ref]
        if changed:
            raise StudentError(
                f"{self._path} has another shard of unit {changed[0]} than was trained on: remove the student's folder "
                "to train it anew"
            )
        return found

    def _arrived(self, unit: str) -> bool:
        with self._lock:
            self._arrivals.look()
            return unit in self._arrivals.refs

    def _wait(self, there: Callable[[], bool], gone: Callable[[], bool], what: str) -> None:
        said, last = False, self._clock()
        while not there():
            if gone() or self._stopped():
                raise WaitEnded
            if self.seconds >= self._next_line:
                said, self._next_line = True, self.seconds + LINE_EVERY_S
                self.say(
                    f"waiting for {what} ({len(self.held()):,} of {len(self._snapshot.units):,} units are there, "
                    f"{self.seconds:.0f} s waited in all)"
                )
            self._sleep(INTERVAL_S)
            now = self._clock()
            self.seconds, last = self.seconds + now - last, now
        if said:
            self.say("going on")
