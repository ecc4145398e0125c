"""What a teaching run has done, and the receipts that it has yet to commit.

Enters: receipts. Leaves: commits, ledger lines and account entries, together. Costs: about 70 ms a commit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.process import uninterrupted
from stillroom.storage.records import Receipt
from stillroom.storage.store import UnitStore

#: A commit takes about 70 ms, so one every two seconds costs 3 % of a core and loses at most that much work.
COMMIT_INTERVAL_S = 2.0
COMMIT_RECEIPTS = 256


@dataclass
class Taught:
    """What a teaching stage did."""

    sequences: int
    held: int
    units: int = 0
    batches: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0
    wall_s: float = 0.0
    retries: int = 0
    actors: list[dict[str, Any]] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Units that could not be scored, as `quarantine.Quarantined` has them."""

    def add(self, receipt: Receipt) -> None:
        self.units += 1
        self.batches += receipt.batches
        self.tokens += receipt.tokens
        self.rows += receipt.rows
        self.bytes += receipt.shard.size_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "sequences_held_before": self.held,
            "units_scored": self.units,
            "teacher_batches": self.batches,
            "tokens_scored": self.tokens,
            "bytes_written": self.bytes,
            "wall_s": round(self.wall_s, 2),
            "tokens_per_s": self.tokens_per_s,
            "quarantined": self.quarantined,
        }

    @property
    def tokens_per_s(self) -> float | None:
        return round(self.tokens / self.wall_s, 1) if self.wall_s else None


class Batch:
    """Receipts that wait for their commit. What a commit made count is in the ledger a moment later, so that a killed
    driver's work is counted too."""

    def __init__(
        self,
        store: UnitStore,
        taught: Taught,
        ledger: Ledger,
        on_behalf_of: str,
        account: TeachingAccount,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self.taught, self._ledger, self._clock = store, taught, ledger, clock
        self._on_behalf_of, self._account = on_behalf_of, account
        self._waiting: list[Receipt] = []
        self._last = clock()

    def start(self) -> None:
        """The clock runs from here: loading the teacher is not capture. The account has it as well."""
        self.actors(self.taught.actors)
        self._last = self._clock()

    def actors(self, said: list[dict[str, Any]]) -> None:
        """said: by each actor when it was ready; more may be by now than before."""
        self.taught.actors = said
        self._account.start(said)

    def add(self, receipt: Receipt) -> None:
        self._waiting.append(receipt)
        self.taught.add(receipt)

    def commit_if_due(self) -> bool:
        """Whether there was a commit."""
        due = self._clock() - self._last >= COMMIT_INTERVAL_S
        if len(self._waiting) >= COMMIT_RECEIPTS or (self._waiting and due):
            self.commit()
            return True
        return False

    def commit(self) -> None:
        """Log, ledger and account together: a Ctrl-C between them would leave work that they never count."""
        if not self._waiting:
            return
        with uninterrupted():
            self._store.commit(self._waiting)
            seconds = self._clock() - self._last
            self._ledger.add(
                {
                    "on_behalf_of": self._on_behalf_of,
                    "units_scored": len(self._waiting),
                    "teacher_batches": sum(r.batches for r in self._waiting),
                    "tokens_scored": sum(r.tokens for r in self._waiting),
                    "rows": sum(r.rows for r in self._waiting),
                    "bytes_written": sum(r.shard.size_bytes for r in self._waiting),
                    "wall_s": round(seconds, 3),
                }
            )
            self._account.add(self._waiting)
            self.taught.wall_s += seconds
            self._waiting = []
            self._last = self._clock()
