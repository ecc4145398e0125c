"""The teaching stage: score what the store lacks, commit it, let the teachers go.

Enters: a recipe, its corpus manifest, its store. Leaves: a store that holds every sequence of the corpus, but for units
that could not be scored, which are named. Costs: the teacher's time; the driver moves token ids out and receipts back,
never signal.

    plan ─► unit + its token ids ─► actor: score, encode, write shard ─► receipt ─► commit in batches
                                                            └► failure ─► quarantine, the others go on
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.console import Console, Progress
from stillroom.pipeline.fidelity import keep_band, keep_fidelity
from stillroom.pipeline.founding import found_store, require_room
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.plan import Plan, make_plan
from stillroom.pipeline.process import uninterrupted
from stillroom.pipeline.progress_file import State
from stillroom.pipeline.quarantine import left_out
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.taught import Batch, Taught
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.errors import BatchDependent, TeacherError
from stillroom.storage.fidelity.sample import choose
from stillroom.storage.fidelity.truth import read_positions
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.storage.store import Store
from stillroom.workers.teacher import TruthRequest

if TYPE_CHECKING:  # ray takes a second
    from stillroom.pipeline.pool import Failed, Pool
    from stillroom.pipeline.status import Status

#: Sequences of the fidelity sample that are scored once more, alone: 32 positions tell a noise band.
SCORED_TWICE = 4

#: Units of which one is to tell whether rows depend on their batch, where the first ones cannot be scored.
PROBED_UNITS = 3

#: Units that are looked at for a batch of two: one without any costs its way to the actor.
LOOKED_AT_UNITS = 32


def teach_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom teach`: ingest, plan, score, commit. The result names the units that could not be scored."""
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
    """Score every sequence of the corpus that the store does not hold. Units that fail are left out, and named.

    What is committed stays committed, whatever happens: the same call goes on from there, and tries again what failed.

    ledger: gets a line at every commit. on_behalf_of: the student that the teaching is for.

    Returns what was done, with the units left out: see `require_all_taught`. Raises StoreFull, before or while
    teaching, if the rest would not fit; what the teacher raises.
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
    batch = Batch(store, taught, ledger, on_behalf_of, TeachingAccount(store.files, recipe.name))
    _score(recipe, plan, manifest, store, sources, batch, console)
    return taught


def require_all_taught(taught: Taught, store: Store) -> None:
    """For what needs the whole corpus: raises TeacherError if units were left out."""
    if taught.quarantined:
        raise TeacherError(left_out(taught.quarantined, store.uri))


def _score(
    recipe: Recipe,
    plan: Plan,
    manifest: Manifest,
    store: Store,
    sources: Sources,
    batch: Batch,
    console: Console,
) -> None:
    from stillroom.pipeline.cluster import Actors, session
    from stillroom.pipeline.metrics import TeachingMetrics
    from stillroom.pipeline.pool import Pool
    from stillroom.pipeline.status import Status
    from stillroom.workers.actor import remote_actor

    spec, identity = sources.teacher_spec(), store.identity

    def create(**options: Any) -> Any:
        return remote_actor(**options).remote(spec, identity, store.uri)

    with session(recipe.ray, ranks=spec.ranks):
        pool = Pool(Actors(create, recipe.ray, ranks=spec.ranks), recipe.ray, console.notice)
        console.info(f"teach: starting {recipe.ray.actors} teacher actor{'s' * (recipe.ray.actors > 1)}")
        status = Status(recipe, plan, manifest, store, batch, pool, TeachingMetrics(recipe.name), console)
        state: State = "stopped"
        try:
            pool.start(status.waiting)
            band = require_batch_free(pool, plan, manifest, console, status.waiting)
            if band and recipe.fidelity.positions == 0:
                keep_band(store, band, console)
            status.begin()
            with console.progress(plan.pending_tokens, "tokens", label="teach") as progress:
                work = _payloads(plan, manifest, _truth_wanted(recipe, plan, store))
                _drain(pool.run(work), batch, status, progress)
            state = "done"
        finally:
            # Also on Ctrl-C or an error: what has been scored and written is not to be scored again. A second Ctrl-C
            # waits: it would leave actors and Ray's processes behind.
            with uninterrupted():
                try:
                    batch.commit()
                    status.close(state)
                finally:
                    pool.stop()


def require_batch_free(
    pool: "Pool", plan: Plan, manifest: Manifest, console: Console, tick: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """Before anything is spent: raises BatchDependent if the teacher's rows depend on their batch. Returns the noise
    band that was measured, None where no unit could tell it, which is noticed.

    A unit that cannot be scored tells nothing of that; it is named when its turn comes. Nor does one of which every
    batch is a single sequence. A unit that loses its actor is asked of another one once.

    tick: called about once a second.
    """
    failures = 0
    for unit in plan.pending[:LOOKED_AT_UNITS]:
        rows = manifest.rows([plan.rows[sequence] for sequence in unit.sequences])
        found = None
        for _ in range(2):
            try:
                found = pool.ask("probe", [row.sequence for row in rows], tick=tick)
            except BatchDependent:
                raise
            except TeacherError:
                if not pool.ready:  # it is not the unit: no actor can be started
                    raise
                break
            if found is not None:
                break
        if found and found["positions"]:
            console.info(f"teach: rows scored alone and in a batch differ by KL {found['kl_mean_nats']:.1g} nats")
            band: dict[str, Any] = found["band"]
            return band
        failures += found is None
        if failures == PROBED_UNITS:
            break
    console.notice(
        "teach: it is not checked whether rows depend on their batch: "
        + (f"{failures} units could not be scored" if failures else "no batch of the first units holds two sequences")
    )
    return None


def _drain(events: "Iterator[Receipt | Failed | None]", batch: Batch, status: "Status", progress: Progress) -> None:
    for event in events:
        if isinstance(event, Receipt):
            batch.add(event)
            progress.advance(event.tokens)
            status.scored(event)
        elif event is not None:
            status.failed(event)
        status.tick(committed=batch.commit_if_due())


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
