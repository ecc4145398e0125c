"""What a run shows while it teaches: its pilot's estimate, progress file, metrics, the units that it gives up.

Enters: receipts, failures and the passing of time. Leaves: lines, a small file, numbers. Costs: a small write every two
seconds.
"""

import time
from abc import ABC, abstractmethod
from typing import Any

from stillroom.pipeline.console import Console, format_bytes, format_count, format_duration
from stillroom.pipeline.founding import require_room
from stillroom.pipeline.metrics import TeachingMetrics
from stillroom.pipeline.plan import Plan
from stillroom.pipeline.pool import Failed, Pool
from stillroom.pipeline.progress_file import ProgressFile, State
from stillroom.pipeline.quarantine import Quarantine
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.taught import Batch, Taught
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Receipt
from stillroom.storage.store import Store, UnitStore


class UnitStatus(ABC):
    """Of any run over units: the progress file, and the units that are given up. `begin` is told when the first actor
    is ready, and the teacher probed."""

    def __init__(
        self, recipe: Recipe, plan: Plan, manifest: Manifest, store: UnitStore, batch: Batch, pool: Pool,
        console: Console,
    ) -> None:  # fmt: skip
        self._plan, self._batch, self._pool = plan, batch, pool
        self._wanted = recipe.ray.actors
        self._quarantine = Quarantine(plan, manifest, console)
        self._file = ProgressFile(store.files, recipe.name, console.notice)
        self._news = False

    def begin(self) -> None:
        """Units are handed out now: the clocks run from here."""
        self._file.begin()
        self._batch.taught.actors = list(self._pool.said)
        self._batch.start()
        self.tick(committed=True)

    def waiting(self) -> None:
        """About once a second before that: one that waits can be told from one that was killed."""
        self._file.update(self._counts, news=False)

    def failed(self, event: Failed) -> None:
        """Raises TeacherError where it cannot be the units."""
        taught, self._news = self._batch.taught, True
        entry = self._quarantine.add(event.unit, event.cause, scored=taught.units)
        taught.quarantined.append(entry.as_dict())

    def tick(self, *, committed: bool) -> None:
        """After each event, and about once a second while there is none."""
        if len(self._pool.said) > len(self._batch.taught.actors):
            self._batch.actors(list(self._pool.said))
        self._news = self._news or committed
        if self._file.update(self._counts, news=self._news):
            self._news = False

    def close(self, state: State) -> None:
        self._batch.taught.retries = self._pool.retries
        self._file.update(self._counts, news=True, state=state)

    @abstractmethod
    def _counts(self) -> dict[str, Any]:
        """What the progress file says."""

    def _units(self, done: str) -> dict[str, int]:
        """done: what a committed unit is called."""
        taught, units = self._batch.taught, len(self._plan.pending)
        left_out = len(taught.quarantined)
        return {
            "planned": units,
            done: taught.units,
            "quarantined": left_out,
            "pending": units - taught.units - left_out,
        }

    def _actors(self) -> dict[str, int]:
        return {"wanted": self._wanted, "ready": self._pool.ready, "lost": self._pool.retries}


class Status(UnitStatus):
    """Of teaching. Made before the actors are started."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        manifest: Manifest,
        store: Store,
        batch: Batch,
        pool: Pool,
        metrics: TeachingMetrics,
        console: Console,
    ) -> None:
        self._metrics = metrics
        self._room = _Room(recipe, plan, store, console)
        self._halved = False
        self._console, self._batch_tokens = console, recipe.teacher.batch_tokens
        super().__init__(recipe, plan, manifest, store, batch, pool, console)

    def begin(self) -> None:
        self._room.begin()
        super().begin()

    def scored(self, receipt: Receipt) -> None:
        self._metrics.scored(receipt.tokens, receipt.shard.size_bytes)
        self._room.check(self._batch.taught)
        if receipt.halved and not self._halved:
            self._halved = True
            self._console.notice(
                f"a batch did not fit in the device's memory and is scored in halves, as may others: unit "
                f"{receipt.shard.unit[:12]}; teacher.batch_tokens below {self._batch_tokens} saves the failed passes"
            )

    def failed(self, event: Failed) -> None:
        self._metrics.quarantined()
        super().failed(event)

    def tick(self, *, committed: bool) -> None:
        self._metrics.actors(self._pool.ready, self._pool.retries)
        super().tick(committed=committed)

    def _counts(self) -> dict[str, Any]:
        taught, tokens = self._batch.taught, self._plan.pending_tokens
        left_out = taught.quarantined
        return {
            "sequences": {"wanted": self._plan.sequences, "held_before": self._plan.held},
            "units": self._units("scored"),
            "tokens": {
                "planned": tokens,
                "scored": taught.tokens,
                "pending": tokens - taught.tokens - sum(unit["tokens"] for unit in left_out),
            },
            "tokens_per_s": taught.tokens_per_s,
            "bytes": taught.bytes,
            "actors": self._actors(),
            "quarantined": left_out,
        }


class GeneratingStatus(UnitStatus):
    """Of generating: units are of prompts, rows are generated tokens. Made before the engines are started."""

    def _counts(self) -> dict[str, Any]:
        taught = self._batch.taught
        return {
            "prompts": {"wanted": self._plan.sequences, "held_before": self._plan.held},
            "units": self._units("generated"),
            "responses": taught.batches,
            "tokens_generated": taught.rows,
            "bytes": taught.bytes,
            "actors": self._actors(),
            "quarantined": taught.quarantined,
        }


class _Room:
    """Estimates size and time from the first units, and refuses to go on where the disk is too small.

    The pilot is the run's own first units, one per actor at work, so that nothing is scored twice.
    """

    def __init__(self, recipe: Recipe, plan: Plan, store: Store, console: Console) -> None:
        self._recipe, self._plan, self._store, self._console = recipe, plan, store, console
        self._said = False
        self.begin()

    def begin(self) -> None:
        """The clock runs from here."""
        self._started = time.monotonic()

    def check(self, taught: Taught) -> None:
        if self._said or taught.units < min(len(taught.actors), len(self._plan.pending)):
            return
        self._said = True
        left = self._plan.pending_tokens - taught.tokens
        need = round(taught.bytes / taught.tokens * left)
        seconds = (time.monotonic() - self._started) / taught.tokens * left
        free = self._store.files.free_bytes()
        self._console.info(
            f"teach: {taught.bytes / taught.tokens:.0f} bytes a token in a pilot of {taught.tokens:,} tokens: about "
            f"{format_bytes(need)} and {format_duration(seconds)} for the other {format_count(left)} tokens; "
            f"{format_bytes(free) if free is not None else 'unknown'} free"
        )
        require_room(self._store.uri, need, free, recipe=self._recipe)
