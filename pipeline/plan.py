"""Which units are to be scored: the corpus's sequences minus the committed ones.

Enters: a corpus manifest and a store. Leaves: pending units in teaching order, saved in the store before the first
is scored. Costs: about 100 bytes of memory a sequence.

A unit's sequences are neighbours by digest, not in the corpus: that is a shuffle which no insertion, re-ordering or
repetition disturbs, so the same set of sequences always makes the same units.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.console import Console
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.schedules import extremes
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest, ManifestIndex
from stillroom.storage.order import unit_order
from stillroom.storage.records import Unit
from stillroom.storage.store import Store, UnitStore
from stillroom.storage.units import first_places, places


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    pending: units not committed, in teaching order. held: unique sequences of the corpus in the store already.
    rows: of each sequence of the pending units, by digest, one manifest row that has it.
    """

    pending: tuple[Unit, ...]
    sequences: int
    held: int
    rows: dict[str, int]

    @property
    def pending_sequences(self) -> int:
        return sum(len(u.sequences) for u in self.pending)

    @property
    def pending_tokens(self) -> int:
        return sum(sum(u.tokens) for u in self.pending)


def make_plan(
    manifest: Manifest, store: UnitStore | None, *, unit_tokens: int, seed: int, save: bool = True, beside: int = 0
) -> Plan:
    """Plan the remainder, and save what is new of it (unless told to look only).

    Units that an earlier plan holds are followed as they are, if all their sequences are still wanted; only what
    they leave over is packed anew. So a killed run and an undisturbed one score the same units.

    store: None stands for one that is not founded yet. unit_tokens: budget of a unit. seed: of the training order;
        units are taught in its epoch 0. beside: tokens that each sequence takes beside its own, such as a response's.
    """
    index = manifest.index()
    wanted = first_places(index.sequences)
    names = index.sequences[wanted]
    covered = np.zeros(len(names), bool)
    pending: list[Unit] = []
    held = 0
    if store:
        pending, held = _follow(store, names, covered)
    fresh = pack_units(index, wanted[~covered].tolist(), unit_tokens, beside=beside)
    if fresh and store and save:
        store.save_plan(fresh)
    pending += fresh
    ordered = tuple(pending[i] for i in unit_order([u.id for u in pending], seed, 0)) if pending else ()
    digests = [s for unit in ordered for s in unit.sequences]
    rows = wanted[places(np.array(digests, "S32"), names)].tolist() if digests else []
    return Plan(ordered, len(names), held, dict(zip(digests, rows, strict=True)))


def _follow(store: UnitStore, names: NDArray[np.bytes_], covered: NDArray[np.bool_]) -> tuple[list[Unit], int]:
    """Units of saved plans that are still to be scored, and how many of the corpus's sequences are committed.

    names: S32 [W], the corpus's sequences. covered: bool [W]; set for those that are committed or in a unit returned.
    Columns and no dictionaries: a million committed units are looked through in three seconds.
    """
    planned = store.planned()
    done = places(planned.ids, store.committed().units) >= 0
    at = places(planned.sequences, names)
    committed = at[np.repeat(done, np.diff(planned.starts))]
    covered[committed[committed >= 0]] = True
    held = int(covered.sum())
    pending = []
    for number in np.flatnonzero(~done).tolist():
        part = at[planned.starts[number] : planned.starts[number + 1]]
        if (part >= 0).all() and not covered[part].any():
            pending.append(planned[number])
            covered[part] = True
    return pending, held


def pack_units(index: ManifestIndex, rows: Iterable[int], unit_tokens: int, *, beside: int = 0) -> list[Unit]:
    """Sequences in the order of their digests, cut where a unit would exceed its budget."""
    units: list[Unit] = []
    members: list[int] = []
    held = 0
    for row in sorted(rows, key=lambda r: index.sequences[r]):
        tokens = int(index.tokens[row]) + beside
        if members and held + tokens > unit_tokens:
            units.append(_unit(index, members))
            members, held = [], 0
        members.append(row)
        held += tokens
    if members:
        units.append(_unit(index, members))
    return units


def _unit(index: ManifestIndex, rows: Seq[int]) -> Unit:
    return Unit(
        tuple(index.sequences[r].decode() for r in rows),
        tuple(int(index.tokens[r]) for r in rows),
        tuple(int(index.contexts[r]) for r in rows),
    )


def plan_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom plan`: what is there, what is to be done, and what it will cost by a short pilot.

    It founds no store and saves no plan: signal and unit size may still be changed by what it says.
    """
    sources = Sources(recipe, console)
    manifest, store = sources.manifest(), sources.store_if_founded()
    seed = recipe.students[0].seed if recipe.students else 0
    plan = make_plan(manifest, store, unit_tokens=recipe.store.unit_tokens, seed=seed, save=False)
    if plan.pending:
        sources.require_length(int(max(max(u.tokens) for u in plan.pending)))
    files = open_files(recipe.store.path)
    result: dict[str, Any] = {
        "corpus": manifest.meta.counts,
        "store": files.uri,
        "sequences": plan.sequences,
        "sequences_held": plan.held,
        "pending_units": len(plan.pending),
        "pending_sequences": plan.pending_sequences,
        "pending_tokens": plan.pending_tokens,
        "free_bytes": files.free_bytes(),
    }
    if plan.pending:
        from stillroom.pipeline.pilot import estimate

        result["estimate"] = estimate(recipe, plan, manifest, sources, console)
    elif store:
        console.info("plan: the store holds all of the corpus; its own fidelity tells whom it serves")
        result["students"] = [_served(recipe, student, store) for student in recipe.students]
    return result


def _served(recipe: Recipe, student: StudentConfig, store: Store) -> dict[str, Any]:
    """Whether a complete store serves a student, and if not, why."""
    from stillroom.pipeline.fidelity import require_supported

    temperature = extremes(student.losses.temperature)[1]
    try:
        require_supported(recipe, student, store)
    except UnsupportedSignal as error:
        return {"student": student.name, "temperature": temperature, "served": False, "why": str(error)}
    return {"student": student.name, "temperature": temperature, "served": True, "why": None}
