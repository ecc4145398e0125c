"""Ray for the driver: a session, and a pool of teacher actors fed a bounded number of units at a time.

Enters: the recipe's `ray` section, units. Leaves: receipts as they come. Costs: 3–8 s to start a local Ray.

A local Ray listens on the loopback interface only and has no dashboard unless asked for one.
"""

import math
import os
import secrets
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from stillroom.pipeline.process import uninterrupted
from stillroom.pipeline.recipe.schema import RayConfig
from stillroom.storage.errors import StillroomError, TeacherError
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.workers.teacher import TruthRequest

#: Actors that take longer to be ready are worth a word.
PATIENCE_S = 60.0


@contextmanager
def session(config: RayConfig) -> Iterator[None]:
    """A connection to the recipe's cluster, or a local Ray that ends with the block.

    Raises TeacherError if the cluster cannot be joined, or the local machine has less than the actors ask for.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.address:
        options["address"] = config.address
    else:
        # Its own address: a RAY_ADDRESS or another local Ray must not be joined by surprise.
        options |= {
            "address": "local",
            "num_cpus": max(1, math.ceil(config.actors * config.cpus_per_actor)),
            "include_dashboard": config.dashboard,
            "_node_ip_address": "127.0.0.1",
        }
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Else Ray writes a token into the home directory, which may not be writable.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    _connect(options)
    try:
        _require_resources(config)
        yield
    finally:
        with uninterrupted():  # half a shutdown leaves processes behind
            ray.shutdown()


def _connect(options: dict[str, Any]) -> None:
    """ray.init, which has its own idea of SIGTERM: it would end the process without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = f"the Ray cluster at {options['address']} (ray.address)"
        raise TeacherError(
            f"cannot join {where}: {_one_line(error)}. Is it running, with the same Python and Ray? One that asks for "
            "a token needs RAY_AUTH_MODE=token in the environment"
            if options["address"] != "local"
            else f"a local Ray cannot be started: {_one_line(error)}"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _require_resources(config: RayConfig) -> None:
    """Ray lets an actor that nothing can hold wait for ever. A cluster may grow, a local Ray does not."""
    held = ray.cluster_resources()
    for name, each in (("GPU", config.gpus_per_actor), ("CPU", config.cpus_per_actor)):
        if config.address is None and config.actors * each > held.get(name, 0):
            raise TeacherError(
                f"{config.actors} actors with {each:g} {name}s each need {config.actors * each:g}, this machine has "
                f"{held.get(name, 0):g}: lower ray.actors or ray.{name.lower()}s_per_actor"
            )


#: What an actor's `score_unit` takes: the unit, its sequences, and which positions to keep in full.
Work = tuple[Unit, list[Sequence], TruthRequest]


def ask(actor: Any, method: str, *arguments: Any) -> Any:
    """One actor's answer to one call; the actor is ended. Raises what it raised on purpose, TeacherError else."""
    try:
        return ray.get(getattr(actor, method).remote(*arguments))
    except RayError as error:
        raise _cause(error) from error
    finally:
        ray.kill(actor, no_restart=True)


class Pool:
    """Actors and the units they hold. A unit whose actor dies is handed out again, `retries` times.

    make: creates one actor, a Ray handle with `ready` and `score_unit`.
    """

    def __init__(self, make: Callable[[], Any], config: RayConfig) -> None:
        self._make = make
        self._config = config
        self._actors: list[Any] = []
        self._held: dict[Any, tuple[int, Any, Work]] = {}
        self._failures: dict[str, int] = {}

    def start(self, on_wait: Callable[[str], None]) -> list[dict[str, Any]]:
        """Start all actors and wait until each has its teacher loaded; returns what they say of themselves."""
        self._actors = [self._make() for _ in range(self._config.actors)]
        answers = [actor.ready.remote() for actor in self._actors]
        ready, waiting = ray.wait(answers, num_returns=len(answers), timeout=PATIENCE_S)
        if waiting:
            free = ray.available_resources()
            on_wait(
                f"{len(waiting)} of {len(answers)} actors are not ready after {PATIENCE_S:g} s: they load the teacher, "
                f"or wait for room in the cluster ({free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs are free)"
            )
        try:
            # What is ready first: one that failed need not wait for those that hang.
            ray.get(ready)
            return [dict(answer) for answer in ray.get(answers)]
        except RayError as error:
            raise _cause(error) from error

    def run(self, units: Iterator[Work], on_retry: Callable[[str], None]) -> Iterator[Receipt | None]:
        """Receipts in the order in which they come; None about once a second while nothing does.

        units: what to score; drawn only when an actor is free to take it.
        Raises what an actor raised on purpose, and TeacherError for a unit that failed `retries` times more.
        """
        waiting: deque[Work] = deque()
        load = [0] * len(self._actors)
        more = True
        while True:
            while more or waiting:
                slot = min(range(len(load)), key=load.__getitem__)
                if load[slot] >= self._config.inflight_per_actor:
                    break
                work = waiting.popleft() if waiting else next(units, None)
                if work is None:
                    more = False
                    break
                actor = self._actors[slot]
                self._held[actor.score_unit.remote(*work)] = (slot, actor, work)
                load[slot] += 1
            if not self._held:
                return
            done, _ = ray.wait(list(self._held), num_returns=1, timeout=1.0)
            if not done:
                yield None
            for reference in done:
                slot, actor, work = self._held.pop(reference)
                load[slot] -= 1
                receipt = self._receipt(reference, work[0], on_retry)
                if receipt is None and self._actors[slot] is actor:
                    # The dead actor's other unit comes back through an error of its own, and finds a new one here.
                    ray.kill(actor, no_restart=True)  # it may be out of reach, and hold its device
                    self._actors[slot] = self._make()
                if receipt is None:
                    waiting.append(work)
                else:
                    yield receipt

    def stop(self) -> None:
        """End the actors; their devices are free when this returns."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors, self._held = [], {}

    def _receipt(self, reference: Any, unit: Unit, on_retry: Callable[[str], None]) -> Receipt | None:
        """The unit's receipt, or None if it is to be tried again."""
        try:
            receipt: Receipt = ray.get(reference)
            return receipt
        except RayTaskError as error:
            # The teacher said no: the same unit would fail the same way, and the message names the documents.
            raise _cause(error, f"unit {unit.id}: ") from error
        except RayError as error:  # a dead or lost actor, a lost node, one killed for its memory
            failures = self._failures[unit.id] = self._failures.get(unit.id, 0) + 1
            if failures > self._config.retries:
                raise TeacherError(
                    f"unit {unit.id} lost its actor {failures} times, ray.retries allows {self._config.retries}; "
                    f"what is done is committed, run again to go on. Last: {_one_line(error)}"
                ) from error
            on_retry(f"an actor died; unit {unit.id[:12]} is handed out again ({failures} of {self._config.retries})")
            return None


def _cause(error: Exception, what: str = "") -> StillroomError:
    """What the actor raised. what: the work it had, for errors that do not name it themselves."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, StillroomError):
        return cause
    return TeacherError(f"{what}a teacher actor failed: {_one_line(cause or error)}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
