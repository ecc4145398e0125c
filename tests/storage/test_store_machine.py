"""A store under writers that write, commit, crash, retry, race and resume, against a dictionary that cannot err."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stillroom.pipeline.plan import make_plan
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.store import Store, create_store, open_store
from tests.strategies import random_sequences, tiny_identity, tiny_manifest, unit_of, write_unit

SEQUENCES = random_sequences(np.random.default_rng(0), 12, longest=4)
UNITS = [SEQUENCES[at : at + 3] for at in range(0, 12, 3)]

units = st.integers(0, len(UNITS) - 1)
writers = st.integers(0, 1)


class StoreMachine(RuleBasedStateMachine):
    """Two writers with a handle each; a third handle only reads.

    model: unit → the shard that counts. pending: what each writer has written and not committed. orphans: shards of
    crashed writers, which may still be committed by whoever finds their receipt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stillroom-test-"))
        self.reader = create_store(str(self.root), tiny_identity(k=2, vocabulary=40))
        self.reader.save_plan([unit_of(unit) for unit in UNITS])
        self.manifest = tiny_manifest(self.root / "corpus.parquet", SEQUENCES)
        self.writers: list[Store] = [open_store(str(self.root)) for _ in range(2)]
        self.pending: list[list[Receipt]] = [[], []]
        self.orphans: list[Receipt] = []
        self.model: dict[str, ShardRef] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(writer=writers, unit=units)
    def write(self, writer: int, unit: int) -> None:
        """Also a retry of what was written before; the writers are different machines."""
        receipt = write_unit(self.writers[writer], UNITS[unit], machine=f"machine {writer}")
        self.pending[writer].append(receipt)

    @precondition(lambda self: any(self.pending))
    @rule(writer=writers)
    def commit(self, writer: int) -> None:
        self._commit(writer, self.pending[writer])
        self.pending[writer] = []

    @precondition(lambda self: any(self.pending))
    @rule(writer=writers)
    def commit_and_crash(self, writer: int) -> None:
        """The answer is lost: the writer does not know that it committed, and commits again after its restart."""
        again = self.pending[writer]
        self.commit(writer)
        self.writers[writer] = open_store(str(self.root))
        self._commit(writer, again)

    @rule(writer=writers)
    def crash(self, writer: int) -> None:
        self.orphans += self.pending[writer]
        self.pending[writer] = []
        self.writers[writer] = open_store(str(self.root))

    @precondition(lambda self: self.orphans)
    @rule(writer=writers)
    def commit_what_a_crashed_writer_left(self, writer: int) -> None:
        self._commit(writer, self.orphans)
        self.orphans = []

    @rule(writer=writers, unit=units, at_a_time=st.integers(1, 4))
    def resume(self, writer: int, unit: int, at_a_time: int) -> None:
        """A run that starts plans what the log does not name; the first of it is scored and committed."""
        plan = make_plan(self.manifest, self.writers[writer], unit_tokens=at_a_time, seed=unit)
        wanted = {unit_of(unit).id: unit for unit in UNITS if unit_of(unit).id not in self.model}
        assert {u.id for u in plan.pending} == wanted.keys()
        assert len(plan.pending) == len(wanted), "a unit is pending once"
        assert plan.held == sum(len(unit) for unit in UNITS) - sum(len(unit) for unit in wanted.values())
        planned = [u.id for u in self.reader.planned()]
        assert planned == [unit_of(unit).id for unit in UNITS], "nothing is packed anew"
        if plan.pending:
            self._commit(writer, [write_unit(self.writers[writer], wanted[plan.pending[0].id])])

    def _commit(self, writer: int, receipts: list[Receipt]) -> None:
        committed = self.writers[writer].commit(receipts)
        told = {r.shard.unit: r.shard for r in committed}
        assert len(told) == len(committed), "a unit is told once"
        assert told.keys() == {r.shard.unit for r in receipts} - self.model.keys()
        assert all(r in receipts for r in committed)
        self.model |= told

    @invariant()
    def every_handle_sees_the_model(self) -> None:
        for handle in (self.reader, *self.writers):
            assert handle.committed() == self.model

    @invariant()
    def snapshots_hold_what_is_committed_and_nothing_else(self) -> None:
        snapshot = self.reader.snapshot()
        assert snapshot.refs == self.model
        assert [u.id for u in snapshot.units] == [u.id for u in map(unit_of, UNITS) if u.id in self.model]

    @invariant()
    def every_committed_sequence_is_read_once(self) -> None:
        expected = sorted(s.digest for unit in UNITS if unit_of(unit).id in self.model for s in unit)
        assert sorted(s.sequence.digest for s in self.reader.sequences()) == expected


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
