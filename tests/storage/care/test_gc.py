"""gc.py: what nobody can need any more goes; what the log, a student, a writer or a stranger has stays."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care import pins
from stillroom.storage.care.gc import collect_garbage
from stillroom.storage.care.pins import pin
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Sequence, ShardRef
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, create_store
from tests.storage.damage import flip, shards
from tests.strategies import random_sequences, tiny_identity, tiny_store, unit_of, write_unit

#: Everything that a test writes is older than an hour then.
LATER_S = time.time() + 7200.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(3), 15), per_unit=5)


@pytest.fixture
def extra() -> list[Sequence]:
    return random_sequences(np.random.default_rng(4), 3, shortest=30, longest=40)


def names(store: Store) -> set[str]:
    return {info.name for info in store.files.walk() if not info.name.startswith("_delta_log")}


def collect(store: Store, **named: Any) -> dict[str, Any]:
    return collect_garbage(store.uri, **{"now_s": LATER_S, **named})


def test_of_a_clean_store_nothing_is_removed(store: Store) -> None:
    before = names(store)
    found = collect(store)
    assert found["removed"] == []
    assert found["freed_bytes"] == found["foreign_files"] == 0
    assert names(store) == before


def leftovers(store: Store, extra: list[Sequence]) -> dict[str, str]:
    """One of each kind, with a word of why it goes."""
    shard = write_unit(store, extra).shard.path
    truth = f"_stillroom/truth/{unit_of(extra).id}-{sha256_hex(b'truth')}.parquet"
    store.files.write(truth, b"truth")
    calibration = save_calibration(store.files, Calibration(np.ones(4, np.float32), np.zeros(4, np.float32)))
    temporary = f"shards/.{'ab' * 16}-{'cd' * 32}.parquet.{'ef' * 16}.tmp"
    store.files.write(temporary, b"half")
    return {
        shard: "the log does not name",
        truth: "not committed",
        f"_stillroom/calibration-{calibration}.parquet": "identity does not name",
        temporary: "temporary",
    }


def test_leftovers_are_removed_and_their_bytes_counted(store: Store, extra: list[Sequence]) -> None:
    before = names(store)
    expected = leftovers(store, extra)
    sizes = {info.name: info.size_bytes for info in store.files.walk()}
    found = collect(store)
    assert {line["file"] for line in found["removed"]} == expected.keys()
    assert all(expected[line["file"]] in line["why"] for line in found["removed"])
    assert found["freed_bytes"] == sum(sizes[name] for name in expected)
    assert found["removed_files"] == 4
    assert names(store) == before
    assert verify_store(store.uri)["problems"] == []


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store, extra: list[Sequence]) -> None:
    leftovers(store, extra)
    before = names(store)
    told = collect(store, dry_run=True)
    assert names(store) == before
    assert told | {"dry_run": False} == collect(store)


def test_what_is_young_is_spared(store: Store, extra: list[Sequence]) -> None:
    """A writer is about to commit it."""
    leftovers(store, extra)
    before = names(store)
    found = collect(store, older_than_s=10_800.0)
    assert found["removed"] == []
    assert found["spared_young_files"] == 4
    assert names(store) == before


def test_the_sample_of_a_committed_unit_is_kept(store: Store) -> None:
    name = f"_stillroom/truth/{shards(store)[0].unit}-{sha256_hex(b'truth')}.parquet"
    store.files.write(name, b"truth")
    assert collect(store)["removed"] == []


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "shards/README.md",
        "shards/copy-of.parquet",
        f"shards/{'AB' * 16}-{'cd' * 32}.parquet",
        f"shards/sub/{'ab' * 16}-{'cd' * 32}.parquet",
        f"backup/shards/{'ab' * 16}-{'cd' * 32}.parquet",
        f"{'ab' * 16}-{'cd' * 32}.parquet",
        "shards/something.tmp",
        f"elsewhere/.x.{'ef' * 16}.tmp",
        "_stillroom/own.json",
    ],
)
def test_what_stillroom_does_not_make_is_shown_and_left(store: Store, name: str) -> None:
    store.files.write(name, b"mine")
    found = collect(store)
    assert found["removed"] == []
    assert found["foreign"] == [name]
    assert store.files.read(name) == b"mine"


@pytest.mark.parametrize("name", ["ledger.jsonl", f"head-{'ab' * 32}.safetensors", "plans/00009-x.parquet"])
def test_heads_plans_and_ledgers_are_kept(store: Store, name: str) -> None:
    store.files.write(f"_stillroom/{name}", b"kept")
    found = collect(store)
    assert (found["removed"], found["foreign"]) == ([], [])


def test_the_log_of_deltalake_is_not_looked_at(store: Store) -> None:
    store.files.write("_delta_log/_commit_1.json.tmp", b"delta-rs")
    found = collect(store)
    assert (found["removed"], found["foreign"]) == ([], [])


class TestPins:
    @pytest.fixture
    def student(self, store: Store, tmp_path: Path) -> Path:
        """A snapshot of all shards, pinned; then one shard is dropped from the log."""
        path = tmp_path / "student" / "snapshot.parquet"
        snapshot = store.snapshot()
        pin(store.files, snapshot, path)
        snapshot.write(path)
        CommitLog.open(store.uri).remove([shards(store)[0]])
        return path

    def read_all(self, store: Store, path: Path) -> int:
        snapshot = Snapshot.read(path)
        return sum(1 for ref in snapshot.refs.values() for _ in store.reader(ref))

    def test_a_pinned_student_keeps_its_shards(self, store: Store, student: Path) -> None:
        found = collect(store)
        assert found["removed"] == []
        assert (found["pins"], found["spared_pinned_files"]) == (1, 1)
        assert self.read_all(store, student) == 15

    def test_who_pins_what_is_kept_is_named(self, store: Store, student: Path, tmp_path: Path) -> None:
        (leftover,) = Snapshot.read(student).refs.keys() - store.committed().keys()
        size = Snapshot.read(student).refs[leftover].size_bytes
        snapshot, second = store.snapshot(), tmp_path / "second" / "snapshot.parquet"
        pin(store.files, snapshot, second)  # it needs nothing that the log does not name
        snapshot.write(second)
        (row,) = collect(store)["pinned_by"]
        assert (row["student"], row["host"]) == (str(student), pins.this_host())
        assert (row["files"], row["size_bytes"]) == (1, size)
        assert store.files.exists(row["pin"])

    def test_a_student_that_is_gone_keeps_nothing(self, store: Store, student: Path) -> None:
        student.unlink()
        found = collect(store)
        assert sorted(line["why"] for line in found["removed"]) == [
            "pin of a student whose snapshot is gone",
            "shard that the log does not name",
        ]
        assert found["pins"] == 0
        assert collect(store)["removed"] == []

    def test_a_student_that_pins_anew_lets_the_old_ones_go(self, store: Store, student: Path) -> None:
        snapshot = store.snapshot()
        pin(store.files, snapshot, student)
        snapshot.write(student)
        found = collect(store)
        assert [line["why"] for line in found["removed"]] == ["shard that the log does not name"]
        assert self.read_all(store, student) == 10

    def test_a_snapshot_put_there_without_pinning_ends_the_pin(self, store: Store, student: Path) -> None:
        store.snapshot().write(student)
        assert len(collect(store)["removed"]) == 2

    def test_a_pin_of_another_machine_holds(self, store: Store, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether its snapshot is there cannot be seen from here."""
        student.unlink()
        monkeypatch.setattr(pins, "this_host", lambda: "another")
        found = collect(store)
        assert found["removed"] == []
        assert found["pins"] == 1

    def test_a_snapshot_that_cannot_be_read_now_holds(self, store: Store, student: Path) -> None:
        student.write_bytes(b"")
        assert collect(store)["removed"] == []

    def test_a_pin_is_there_before_its_snapshot(self, store: Store, student: Path) -> None:
        """Young, it holds though there is no snapshot yet: the student is about to write it."""
        student.unlink()
        found = collect(store, now_s=time.time())
        assert found["pins"] == 1
        assert found["spared_pinned_files"] == 1

    def test_a_damaged_pin_stops_everything(self, store: Store, student: Path, extra: list[Sequence]) -> None:
        leftovers(store, extra)
        (name,) = store.files.list("_stillroom/pins")
        store.files.write(name, b"{")
        before = names(store)
        with pytest.raises(CorruptShard, match=name):
            collect(store)
        assert names(store) == before


class TestRaces:
    def test_what_is_committed_after_the_listing_is_spared(
        self, store: Store, extra: list[Sequence], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        receipt = write_unit(store, extra)
        genuine = LocalFiles.walk

        def walk(self: LocalFiles) -> Any:
            yield from genuine(self)
            store.commit([receipt])

        monkeypatch.setattr(LocalFiles, "walk", walk)
        assert collect(store)["removed"] == []
        assert store.files.exists(receipt.shard.path)

    def test_what_is_committed_while_it_is_removed_is_told(
        self, store: Store, extra: list[Sequence], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        receipt = write_unit(store, extra)
        store.save_plan([unit_of(extra)])
        genuine = LocalFiles.delete

        def delete(self: LocalFiles, name: str) -> None:
            store.commit([receipt])
            genuine(self, name)

        monkeypatch.setattr(LocalFiles, "delete", delete)
        with pytest.raises(StoreError, match=receipt.shard.path):
            collect(store)
        assert repair_store(store.uri)["problems_left"] == 0
        assert receipt.shard.unit not in store.committed()


SEQUENCES = random_sequences(np.random.default_rng(0), 8, longest=4)
UNITS = [SEQUENCES[at : at + 2] for at in range(0, 8, 2)]
units = st.integers(0, len(UNITS) - 1)
machines = st.integers(0, 1)


class CareMachine(RuleBasedStateMachine):
    """Teach, damage, repair, pin and collect in any order, against a dictionary that cannot go wrong.

    model: unit → its shard. broken: paths of files that are not whole. pinned: what a student reads, all whole when
    it began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stillroom-test-"))
        self.store = create_store(str(self.root / "store"), tiny_identity(k=2, vocabulary=40))
        self.store.save_plan([unit_of(unit) for unit in UNITS])
        self.model: dict[str, ShardRef] = {}
        self.pinned: dict[str, ShardRef] = {}
        self.broken: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(unit=units, machine=machines)
    def teach(self, unit: int, machine: int) -> None:
        """Also where the unit is committed: the shard stays a leftover then, or mends the file of the same name."""
        receipt = write_unit(self.store, UNITS[unit], machine=f"machine {machine}")
        self.broken.discard(receipt.shard.path)
        self.store.commit([receipt])
        self.model.setdefault(receipt.shard.unit, receipt.shard)

    @precondition(lambda self: self.model)
    @rule(unit=units, lost=st.booleans())
    def damage(self, unit: int, lost: bool) -> None:
        ref = self.store.committed().get(unit_of(UNITS[unit]).id)
        if ref is None or ref.path in self.broken or ref.path in {r.path for r in self.pinned.values()}:
            return
        path = Path(self.store.uri, ref.path)
        path.unlink() if lost else flip(path)
        self.broken.add(ref.path)

    @rule()
    def repair(self) -> None:
        done = repair_store(self.store.uri)
        assert done["problems_left"] == 0
        lost = {unit for unit, ref in self.model.items() if ref.path in self.broken}
        assert set(done["repair"]["units_dropped"]) == lost
        for unit in lost:
            del self.model[unit]

    @rule()
    def pin(self) -> None:
        """Of what is whole: a student would fail on anything else when it reads it."""
        if any(ref.path in self.broken for ref in self.model.values()):
            return
        snapshot, path = self.store.snapshot(), self.root / "snapshot.parquet"
        pin(self.store.files, snapshot, path)
        snapshot.write(path)
        self.pinned = snapshot.refs

    @rule()
    def drop(self) -> None:
        """As a repair of a shard that was found wrong by a second look."""
        if self.model:
            unit, ref = min(self.model.items())
            CommitLog.open(self.store.uri).remove([ref])
            del self.model[unit]

    @rule()
    def collect(self) -> None:
        found = collect_garbage(self.store.uri, now_s=LATER_S)
        kept = {ref.path for ref in (*self.model.values(), *self.pinned.values())}
        assert not kept & {line["file"] for line in found["removed"]}
        left = set(self.store.files.list("shards"))
        assert left <= kept
        self.broken &= kept
        assert kept - self.broken <= left

    @invariant()
    def the_log_is_the_model(self) -> None:
        assert self.store.committed() == self.model

    @invariant()
    def the_student_reads_on(self) -> None:
        for ref in self.pinned.values():
            assert sum(1 for _ in self.store.reader(ref)) == 2

    @invariant()
    def verify_finds_what_is_broken_and_nothing_else(self) -> None:
        found = {p["shard"] for p in verify_store(self.store.uri)["problems"]}
        assert found == {ref.path for ref in self.model.values() if ref.path in self.broken}


TestCareMachine = CareMachine.TestCase
TestCareMachine.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
