"""The teaching stage: score what the store lacks, commit it, let the teachers go.

Enters: a recipe, its corpus manifest, its store. Leaves: a store that holds every sequence of the corpus. Costs: the
teacher's time; the driver moves token ids out and receipts back, never signal.

    plan ─► unit + its token ids ─► actor: score, encode, write shard ─► receipt ─► commit in batches
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.console import Console, Progress, format_bytes, format_count, format_duration
from stillroom.pipeline.fidelity import keep_fidelity
from stillroom.pipeline.founding import found_store, require_room
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.plan import Plan, make_plan
from stillroom.pipeline.process import uninterrupted
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.fidelity.sample import choose
from stillroom.storage.fidelity.truth import read_positions
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.storage.store import Store
from stillroom.workers.teacher import TruthRequest

#: A commit takes about 70 ms, so one every two seconds costs 3 % of a core and loses at most that much work.
COMMIT_INTERVAL_S = 2.0
COMMIT_RECEIPTS = 256

#: Sequences of the fidelity sample that are scored once more, alone: 32 positions tell a noise band.
SCORED_TWICE = 4


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
    actors: list[dict[str, Any]] = field(default_factory=list)

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
            "tokens_per_s": round(self.tokens / self.wall_s, 1) if self.wall_s else None,
        }


def teach_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom teach`: ingest, plan, score, commit."""
    sources = Sources(recipe, console)
    ledger = Ledger(recipe.run_dir / "ledger.jsonl")
    manifest = sources.manifest()
    store = found_store(recipe, sources, manifest, console)
    taught = teach(recipe, manifest, store, sources, console, ledger=ledger)
    keep_fidelity(recipe, store, console)
    return taught.as_dict()


def teach(
    recipe: Recipe,
    manifest: Manifest,
    store: Store,
    sources: Sources,
    console: Console,
    *,
    ledger: Ledger,
    on_behalf_of: str = "",
) -> Taught:
    """Score every sequence of the corpus that the store does not hold.

    What is committed stays committed, whatever happens: the same call goes on from there.

    ledger: gets a line at every commit. on_behalf_of: the student that the teaching is for.

    Raises StoreFull, before or while teaching, if the rest would not fit; what the teacher raises.
    """
    keep_token_table(store.files, sources.tokenizer, store.identity.vocabulary)
    seed = recipe.students[0].seed if recipe.students else 0
    plan = make_plan(manifest, store, unit_tokens=recipe.store.unit_tokens, seed=seed)
    taught = Taught(plan.sequences, plan.held)
    if not plan.pending:
        console.info(f"teach: all {plan.sequences:,} sequences are in {store.uri}; no teacher is needed")
        return taught
    console.info(
        f"teach: {plan.pending_sequences:,} of {plan.sequences:,} sequences to score, {plan.pending_tokens:,} tokens "
        f"in {len(plan.pending):,} units; {plan.held:,} sequences are held already"
    )
    sources.require_length(int(max(max(u.tokens) for u in plan.pending)))
    require_room(store.uri, 0, store.files.free_bytes(), recipe=recipe)
    batch = _Batch(store, taught, ledger, on_behalf_of, TeachingAccount(store.files, recipe.name))
    _score(recipe, plan, manifest, store, sources, batch, console)
    return taught


def _score(
    recipe: Recipe,
    plan: Plan,
    manifest: Manifest,
    store: Store,
    sources: Sources,
    batch: "_Batch",
    console: Console,
) -> None:
    from stillroom.pipeline.cluster import Pool, session
    from stillroom.workers.actor import remote_actor

    options = {"num_cpus": recipe.ray.cpus_per_actor, "num_gpus": recipe.ray.gpus_per_actor}
    spec, identity = sources.teacher_spec(), store.identity

    def make() -> Any:
        return remote_actor(**options).remote(spec, identity, store.uri)

    with session(recipe.ray):
        pool = Pool(make, recipe.ray)
        console.info(f"teach: starting {recipe.ray.actors} teacher actor{'s' * (recipe.ray.actors > 1)}")
        batch.taught.actors = pool.start(console.notice)
        room = _Room(recipe, plan, store, console)
        batch.start()
        try:
            with console.progress(plan.pending_tokens, "tokens", label="teach") as progress:
                work = _payloads(plan, manifest, _truth_wanted(recipe, plan, store))
                _drain(pool.run(work, console.notice), batch, room, progress)
        finally:
            # Also on Ctrl-C or an error: what has been scored and written is not to be scored again. A second Ctrl-C
            # waits: it would leave actors and Ray's processes behind.
            with uninterrupted():
                try:
                    batch.commit()
                finally:
                    pool.stop()


def _drain(receipts: Iterator[Receipt | None], batch: "_Batch", room: "_Room", progress: Progress) -> None:
    for receipt in receipts:
        if receipt is not None:
            batch.add(receipt)
            progress.advance(receipt.tokens)
            room.check(batch.taught)
        batch.commit_if_due()


def _payloads(
    plan: Plan, manifest: Manifest, truth: TruthRequest
) -> Iterator[tuple[Unit, list[Sequence], TruthRequest]]:
    """Units with their token ids, read only when an actor is free: 4 bytes a token travel, nothing else."""
    for unit in plan.pending:
        rows = manifest.rows([plan.rows[s] for s in unit.sequences])
        positions = {s: truth.positions[s] for s in unit.sequences if s in truth.positions}
        yield unit, [row.sequence for row in rows], TruthRequest(positions, truth.alone & positions.keys())


def _truth_wanted(recipe: Recipe, plan: Plan, store: Store) -> TruthRequest:
    """The positions of the pending units whose logits are kept in full: what the store's sample still lacks."""
    committed = store.committed()
    units = [unit for unit in store.planned() if unit.id in committed]
    held = read_positions(store.files, units, store.identity)
    positions = choose(plan.pending, wanted=recipe.fidelity.positions, held=held)
    # Of all, held or not: a run that goes on scores twice what an undisturbed one would have.
    return TruthRequest(positions, frozenset(sorted({*positions, *held})[:SCORED_TWICE]) & positions.keys())


class _Batch:
    """Receipts that wait for their commit. What a commit made count is in the ledger a moment later, so that a killed
    driver's work is counted too."""

    def __init__(
        self,
        store: Store,
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
        self._account.start(self.taught.actors)
        self._last = self._clock()

    def add(self, receipt: Receipt) -> None:
        self._waiting.append(receipt)
        self.taught.add(receipt)

    def commit_if_due(self) -> None:
        if len(self._waiting) >= COMMIT_RECEIPTS or (self._waiting and self._clock() - self._last >= COMMIT_INTERVAL_S):
            self.commit()

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
                    "bytes_written": sum(r.shard.size_bytes for r in self._waiting),
                    "wall_s": round(seconds, 3),
                }
            )
            self._account.add(self._waiting)
            self.taught.wall_s += seconds
            self._waiting = []
            self._last = self._clock()


class _Room:
    """Estimates size and time from the first units, and refuses to go on where the disk is too small.

    The pilot is the run's own first units, one per actor, so that nothing is scored twice.
    """

    def __init__(self, recipe: Recipe, plan: Plan, store: Store, console: Console) -> None:
        self._recipe, self._plan, self._store, self._console = recipe, plan, store, console
        self._started = time.monotonic()
        self._said = False

    def check(self, taught: Taught) -> None:
        if self._said or taught.units < min(self._recipe.ray.actors, len(self._plan.pending)):
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
