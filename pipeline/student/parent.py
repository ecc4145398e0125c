"""What the student's process and the command that started it owe each other.

Enters: `STILLROOM_PARENT` in the environment, "<pid>:<descriptor>", set by the command. Leaves: an error for the
command to tell, and an end like a SIGTERM's when the command is gone: nobody would know of the training, and the same
command, run again, would find its folder taken. Costs: a thread that looks twice a second.
"""

import json
import os
import signal
import sys
import threading
import time

from stillroom.storage.errors import StillroomError

VARIABLE = "STILLROOM_PARENT"


class Parent:
    """pid and report are None where a person started the process."""

    def __init__(self) -> None:
        pid, _, report = os.environ.pop(VARIABLE, "").partition(":")
        self.pid = int(pid) if pid else None
        self._report = int(report) if report else None
        if self.pid is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, error: StillroomError) -> None:
        """Hand an error to the command, or print it where there is none."""
        if self._report is None:
            print(f"error: {error}", file=sys.stderr)
            return
        text = json.dumps({"kind": type(error).__name__, "message": str(error)})
        with os.fdopen(self._report, "w", encoding="utf-8") as pipe:
            pipe.write(text)

    def _watch(self) -> None:
        while os.getppid() == self.pid:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
