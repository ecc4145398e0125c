"""A student's process, seen from the command that started it.

Enters: a command line. Leaves: its end, as this process would have ended: nothing, the error that it met, or
KeyboardInterrupt. Costs: a pipe.
"""

import json
import os
import signal
import subprocess
from typing import Any

from stillroom.pipeline.student.parent import VARIABLE
from stillroom.storage import errors
from stillroom.storage.errors import StillroomError, StudentError

INTERRUPTED = 130


class StudentProcess:
    """Started when it is made. It ends as well if we are killed.

    beside: it works while this process does something else. It is then out of the terminal's reach, so that `stop` is
    the one signal that it gets, and it prints plain lines. environment: its own; ours unless given.
    """

    def __init__(
        self, command: list[str], name: str, *, beside: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self._name, self._beside = name, beside
        self._reading, writing = os.pipe()
        told = {VARIABLE: f"{os.getpid()}:{writing}"} | ({"TTY_COMPATIBLE": "0"} if beside else {})
        # Its stdout is our stderr: ours is for the result alone.
        self._process = subprocess.Popen(
            command,
            stdout=2,
            pass_fds=(writing,),
            env={**(os.environ if environment is None else environment), **told},
            process_group=0 if beside else None,
        )
        os.close(writing)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """It writes a checkpoint and ends. Said once: a second signal would end it at once."""
        self._process.terminate()

    def wait(self) -> None:
        """Until it ends. A Ctrl-C reaches it too, as the terminal signals the whole group, or is passed on where it
        works beside; a SIGTERM to us is passed on. It writes its checkpoint, then both end.

        Raises the error that the process met, StudentError if it could not say, KeyboardInterrupt.
        """
        previous = signal.signal(signal.SIGTERM, lambda *_: self._process.send_signal(signal.SIGTERM))
        try:
            code = self._code()
        finally:
            signal.signal(signal.SIGTERM, previous)
            with os.fdopen(self._reading, encoding="utf-8") as pipe:
                told = pipe.read()
        # By the signal itself where a further Ctrl-C came while the process was already leaving.
        if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        if told:
            raise _error(told, self._name)
        if code != 0:
            how = f"was killed by signal {-code}" if code < 0 else f"stopped with exit code {code}"
            raise StudentError(f"student {self._name} {how}; the same command goes on from its last checkpoint")

    def _code(self) -> int:
        stopped = False
        while True:
            try:
                return self._process.wait()
            except KeyboardInterrupt:
                # The child has had the signal as well and is writing its checkpoint: leaving now would orphan it.
                if self._beside and not stopped:
                    self.stop()
                    stopped = True


def _error(told: str, name: str) -> StillroomError:
    """What the student's process said, as the error that it was there."""
    words: dict[str, Any] = json.loads(told)
    kind: type[StillroomError] = getattr(errors, words["kind"])
    return kind(f"student {name}: {words['message']}")
