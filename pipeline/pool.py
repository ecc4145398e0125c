"""Teacher actors, and the units they hold: a bounded number each, handed out again when an actor is lost.

Enters: units. Leaves: receipts and units given up, as they come. Costs: nothing but what Ray takes for its messages.

An actor counts from the moment it has its teacher loaded; one that waits for room in the cluster takes no unit, and one
that joins later takes its share. Who is to blame for a lost actor can be told only where a unit had it to itself: units
that lost one together are tried again one at a time, each alone, and only then counted against.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from stillroom.pipeline.cluster import Actors, cause_of, one_line
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.errors import StillroomError, TeacherError
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.workers.teacher import TruthRequest

#: Actors that take longer to be ready are worth a word.
PATIENCE_S = 60.0
#: How long `run` is silent at most.
TICK_S = 1.0
#: An actor that has not answered `ask` by then hangs: a probe is three passes over one batch, and one call may compile.
ANSWER_S = 1800.0

#: What an actor's `score_unit` takes: the unit, its sequences, and which positions to keep in full.
Work = tuple[Unit, list[Sequence], TruthRequest]


@dataclass(frozen=True)
class Failed:
    """A unit that is given up for this run. cause: one line."""

    unit: Unit
    cause: str


@dataclass(eq=False)
class _Slot:
    """One actor. loading: the reference of its `ready`, until it has answered. held: units it has in hand. alone: of
    the unit it holds; it gets no other beside. gone: its death was noticed."""

    actor: Any
    loading: Any
    held: int = 0
    alone: bool = False
    gone: bool = False


class Pool:
    """Actors and the units they hold.

    actors: makes Ray handles with `ready` and `score_unit`. notice: told what is tried again or waited for.
    """

    def __init__(self, actors: Actors, config: RayConfig, notice: Callable[[str], None]) -> None:
        self._actors, self._config, self._notice = actors, config, notice
        self._slots: list[_Slot] = []
        self._held: dict[Any, tuple[_Slot, Work]] = {}
        self._suspects: deque[Work] = deque()
        self._losses: dict[str, int] = {}
        self._starts_lost = 0
        self._patience_ends = math.inf
        self.retries = 0
        """How often an actor was lost, before or after it was ready."""
        self.said: list[dict[str, Any]] = []
        """What each actor said of itself when it was ready; the longest list that there was room for at one time."""

    @property
    def ready(self) -> int:
        """Actors that have their teacher loaded."""
        return sum(slot.loading is None for slot in self._slots)

    def start(self, tick: Callable[[], None] = lambda: None) -> None:
        """Start all actors and wait until the first has its teacher loaded; the others join while units are scored.

        tick: called about once a second while it waits.
        Raises what an actor's `ready` raises; TeacherError if `retries` + 1 actors in a row die while loading.
        """
        self._slots = [self._fresh() for _ in range(self._config.actors)]
        self._patience_ends = time.monotonic() + PATIENCE_S
        self._wait_until_one_is_ready(tick)
        # Those that came at the same time: one that failed need not wait for those that hang.
        rest = [slot.loading for slot in self._slots if slot.loading is not None]
        if rest:
            done, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
            self._welcome(done)

    def run(self, units: Iterator[Work]) -> Iterator[Receipt | Failed | None]:
        """Receipts, and units given up, in the order in which they come; None about once a second while nothing does.

        units: what to score; drawn only when an actor is free to take it.
        Raises what an actor raised that is not of its unit (StoreFull, IdentityMismatch).
        """
        while True:
            more = self._hand_out(units)
            if not (self._held or self._suspects or more):
                return
            loading = [slot.loading for slot in self._slots if slot.loading is not None]
            done, _ = ray.wait([*self._held, *loading], num_returns=1, timeout=TICK_S)
            if not done:
                self._say_if_none_is_ready()
                yield None
            for reference in done:
                if reference not in self._held:
                    self._welcome([reference])
                    continue
                found = self._settle(reference)
                if found is not None:
                    yield found

    def ask(
        self, method: str, *arguments: Any, tick: Callable[[], None] = lambda: None, answer_s: float = ANSWER_S
    ) -> Any:
        """The answer of an actor that is ready, or of the first that is; None if it was lost, or did not answer in
        time: another is started then in its place.

        tick: called about once a second while it waits. Raises what the actor raised, and what `start` raises.
        """
        self._wait_until_one_is_ready(tick)
        slot = next(slot for slot in self._slots if slot.loading is None)
        answer = getattr(slot.actor, method).remote(*arguments)
        ends = time.monotonic() + answer_s
        while not ray.wait([answer], timeout=min(TICK_S, answer_s))[0]:
            tick()
            if time.monotonic() > ends:
                return self._give_up(slot, f"it has not answered {method} for {answer_s:g} s")
        try:
            return ray.get(answer)
        except RayTaskError as error:
            raise cause_of(error) from error
        except RayError as error:
            return self._give_up(slot, one_line(error))

    def _give_up(self, slot: _Slot, why: str) -> None:
        """An actor that holds no unit."""
        self.retries += 1
        self._replace(slot)
        self._patience_ends = time.monotonic() + PATIENCE_S
        self._notice(f"an actor was lost, another is started: {why}")

    def _wait_until_one_is_ready(self, tick: Callable[[], None]) -> None:
        while not self.ready:
            tick()
            done, _ = ray.wait([slot.loading for slot in self._slots], num_returns=1, timeout=TICK_S)
            self._welcome(done)
            self._say_if_none_is_ready()

    def stop(self) -> None:
        """End the actors; their devices are free when this returns."""
        for slot in self._slots:
            self._actors.end(slot.actor)
        self._slots, self._held = [], {}

    def _fresh(self) -> _Slot:
        actor = self._actors.make()
        return _Slot(actor, actor.ready.remote())

    def _say_if_none_is_ready(self) -> None:
        """Once, until one is ready again."""
        now = time.monotonic()
        if self.ready:
            self._patience_ends = now + PATIENCE_S
        elif now > self._patience_ends:
            self._patience_ends = math.inf
            free = ray.available_resources()
            self._notice(
                f"none of {len(self._slots)} actors is ready after {PATIENCE_S:g} s: they load the teacher, or wait "
                f"for room in the cluster ({free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs are free)"
            )

    def _welcome(self, references: list[Any]) -> None:
        """Take in the actors whose `ready` has answered."""
        for slot in [slot for slot in self._slots if slot.loading in references]:
            try:
                answer = dict(ray.get(slot.loading))
            except RayTaskError as error:
                raise cause_of(error) from error
            except RayError as error:
                self._lose_start(slot, error)
                continue
            slot.loading = None
            self._starts_lost = 0
            if self.ready > len(self.said):
                self.said.append(answer)

    def _lose_start(self, slot: _Slot, error: RayError) -> None:
        """An actor died before it had its teacher: another one, or none where that has been tried."""
        self._starts_lost += 1
        self.retries += 1
        why = one_line(error)
        if self._starts_lost <= self._config.retries:
            self._notice(f"an actor died while it loaded the teacher, another is started: {why}")
            self._replace(slot)
        elif self.ready:
            self._starts_lost = 0
            self._slots.remove(slot)
            self._notice(f"goes on with {len(self._slots)} actors: starting another one fails again and again: {why}")
        else:
            raise TeacherError(
                f"{self._starts_lost} teacher actors in a row died before they had the teacher loaded, ray.retries "
                f"allows {self._config.retries}. Last: {why}"
            ) from error

    def _replace(self, slot: _Slot) -> None:
        slot.gone = True
        self._actors.end(slot.actor)  # it may be out of reach, and hold its device
        self._slots[self._slots.index(slot)] = self._fresh()

    def _hand_out(self, units: Iterator[Work]) -> bool:
        """Fill the actors that have room; False when all of `units` is handed out."""
        reserved = self._hand_out_suspects()
        while True:
            slots = [s for s in self._ready() if s is not reserved and s.held < self._config.inflight_per_actor]
            if not slots:
                return True  # perhaps: it is asked again when there is room
            work = next(units, None)
            if work is None:
                return False
            self._hand(min(slots, key=lambda s: s.held), work)

    def _hand_out_suspects(self) -> _Slot | None:
        """Units that lost an actor, each to one that has nothing in hand; the actor that is to be free for the next."""
        while self._suspects:
            slot = min(self._ready(), key=lambda s: s.held, default=None)
            if slot is None or slot.held:
                return slot
            self._hand(slot, self._suspects.popleft(), alone=True)
        return None

    def _ready(self) -> list[_Slot]:
        """Actors that may take a unit more, as far as what they hold allows."""
        return [slot for slot in self._slots if slot.loading is None and not slot.alone]

    def _hand(self, slot: _Slot, work: Work, *, alone: bool = False) -> None:
        self._held[slot.actor.score_unit.remote(*work)] = (slot, work)
        slot.held += 1
        slot.alone = alone

    def _settle(self, reference: Any) -> Receipt | Failed | None:
        """What came of a unit; None if it is tried again."""
        slot, work = self._held.pop(reference)
        slot.held -= 1
        slot.alone = False
        unit = work[0]
        try:
            receipt: Receipt = ray.get(reference)
            return receipt
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, TeacherError):  # the same unit would fail the same way
                return Failed(unit, one_line(cause))
            if isinstance(cause, StillroomError):
                raise cause from error
            # Unforeseen: after some errors, such as those of CUDA, a process is good for nothing more.
            allowed, what, counts = min(1, self._config.retries), "made an actor fail", True
            why = f"{type(cause).__name__}: {one_line(cause)}" if cause else one_line(error)
        except RayError as error:  # a dead or lost actor, a lost node, one killed for its memory
            allowed, what, counts = self._config.retries, "lost its actor", not (slot.held or slot.gone)
            why = one_line(error)
        if not slot.gone:
            self.retries += 1
            self._replace(slot)
        losses = self._losses[unit.id] = self._losses.get(unit.id, 0) + counts
        if losses > allowed:
            times = "once" if losses == 1 else f"{losses} times"
            return Failed(unit, f"it {what} {times} (ray.retries is {self._config.retries}), last: {why}")
        self._notice(f"an actor died; unit {unit.id[:12]} is handed out again, alone ({losses} of {allowed}): {why}")
        self._suspects.append(work)
        return None
