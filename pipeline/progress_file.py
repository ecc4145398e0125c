"""How far a teaching run is, as a small file in the store: for people, scripts and dashboards on any machine.

Enters: counts. Leaves: `_stillroom/progress.json`, whole at every moment. Costs: one small write, at most every two
seconds while units are committed and every ten while none is.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Literal

from stillroom.storage.catalog.uses import utc_now
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import Files

PROGRESS = "_stillroom/progress.json"
INTERVAL_S = 2.0
#: While nothing is committed, so that one that waits can be told from one that was killed.
HEARTBEAT_S = 10.0

State = Literal["teaching", "done", "stopped"]


class ProgressFile:
    """The file of one run; the next one on the same store writes over it.

    A write that fails is told once and stops nothing: where the disk is full, the commit says so. clock: seconds.
    """

    def __init__(
        self, files: Files, run: str, notice: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._files, self._run, self._notice, self._clock = files, run, notice, clock
        self._failed = False
        self.begin()

    def begin(self) -> None:
        """Its seconds run from here, not from when it was made; the next update is written."""
        self._began, self._began_at = self._clock(), utc_now()
        self._last = -float("inf")

    def update(self, counts: Callable[[], dict[str, Any]], *, news: bool, state: State = "teaching") -> bool:
        """Write, if it is time; whether it was. counts: what is written beside times and state; called only for that.
        news: something was committed or given up since the last time."""
        now = self._clock()
        due = now - self._last >= (INTERVAL_S if news else HEARTBEAT_S)
        if not due and state == "teaching":
            return False
        self._last = now
        body = {
            "run": self._run,
            "state": state,
            "began_at": self._began_at,
            "updated_at": utc_now(),
            "seconds": round(now - self._began, 1),
            **counts(),
        }
        try:
            self._files.write(PROGRESS, (json.dumps(body, indent=1) + "\n").encode())
        except StillroomError as error:
            if not self._failed:
                self._notice(f"{PROGRESS} cannot be written, which stops nothing: {error}")
            self._failed = True
        return True
