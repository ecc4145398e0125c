"""repair.py: what is broken stops counting and is scored again, what is good is not touched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from stillroom.pipeline.plan import make_plan
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import CorruptShard, FormatMismatch, IdentityMismatch, StoreError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence, ShardRef
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, open_store
from tests.storage.damage import edit_entry, flip, replace, shards
from tests.strategies import (
    named_receipt,
    next_token_teacher,
    random_sequences,
    tiny_manifest,
    tiny_store,
    unit_of,
    write_unit,
)


@pytest.fixture
def sequences() -> list[Sequence]:
    """In the order in which plans hold them."""
    drawn = random_sequences(np.random.default_rng(3), 30, shortest=10, longest=24)
    return sorted(drawn, key=lambda s: s.digest)


@pytest.fixture
def store(tmp_path: Path, sequences: list[Sequence]) -> Store:
    return tiny_store(tmp_path / "store", sequences, per_unit=10, teacher=next_token_teacher)


@pytest.fixture
def manifest(tmp_path: Path, sequences: list[Sequence]) -> Manifest:
    return tiny_manifest(tmp_path / "manifest.parquet", sequences)


def pending(manifest: Manifest, store: Store) -> list[str]:
    """Units that `stillroom teach` would score."""
    return [u.id for u in make_plan(manifest, store, unit_tokens=10_000, seed=0, save=False).pending]


def plan_files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store.uri, "_stillroom/plans").iterdir()}


def test_a_healthy_store_is_left_alone(store: Store) -> None:
    version = DeltaTable(store.uri).version()
    done = repair_store(store.uri)
    assert done["problems"] == []
    assert done["problems_left"] == 0
    assert done["repair"]["units_dropped"] == []
    assert DeltaTable(store.uri).version() == version


def break_file(store: Store, ref: ShardRef) -> None:
    flip(Path(store.uri, ref.path))


def lose_file(store: Store, ref: ShardRef) -> None:
    Path(store.uri, ref.path).unlink()


def name_another(store: Store, ref: ShardRef) -> None:
    """The log names a file that was never written."""
    sha256 = "ab" * 32
    replace(store, ref, ShardRef(ref.unit, f"shards/{ref.unit}-{sha256}.parquet", sha256, ref.size_bytes), 10)


@pytest.mark.parametrize("damage", [break_file, lose_file, name_another])
def test_just_the_broken_unit_is_scored_again(
    store: Store, sequences: list[Sequence], manifest: Manifest, damage: Any
) -> None:
    before = store.committed()
    victim = unit_of(sequences[10:20])
    damage(store, before[victim.id])
    assert pending(manifest, store) == []
    done = repair_store(store.uri)
    assert done["problems_left"] == 0
    assert [p["repaired"] for p in done["problems"]] == [True]
    assert done["repair"]["units_dropped"] == [victim.id]
    assert done["repair"]["sequences_to_score"] == 10
    assert done["repair"]["tokens_to_score"] == sum(victim.tokens)
    assert store.committed() == {unit: ref for unit, ref in before.items() if unit != victim.id}
    assert pending(manifest, store) == [victim.id]
    # Scored on the same machine the shard has the same name, and takes the place of the damaged file.
    store.commit([write_unit(store, sequences[10:20], next_token_teacher)])
    assert store.committed() == before
    assert verify_store(store.uri)["problems"] == []
    assert pending(manifest, store) == []


def test_a_unit_scored_again_meanwhile_keeps_its_new_shard(store: Store, sequences: list[Sequence]) -> None:
    """Two repairs, and a teacher between them: the second goes by the file, not by the unit."""
    ref = store.committed()[unit_of(sequences[:10]).id]
    log = CommitLog.open(store.uri)
    assert log.remove([ref]) == [ref]
    again = write_unit(store, sequences[:10], next_token_teacher, machine="another")
    store.commit([again])
    assert log.remove([ref]) == []
    assert store.committed()[ref.unit] == again.shard


def test_two_repairs_at_once_do_what_one_does(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one commits between our look at the log and our commit."""
    one, other, third = shards(store)
    log, rival = CommitLog.open(store.uri), CommitLog.open(store.uri)
    genuine = CommitLog._write

    def slow(self: CommitLog, *arguments: Any) -> None:
        monkeypatch.setattr(CommitLog, "_write", genuine)
        rival.remove([one])
        genuine(self, *arguments)

    monkeypatch.setattr(CommitLog, "_write", slow)
    log.remove([one, other])
    assert shards(store) == [third]


def test_a_log_entry_that_is_wrong_of_a_good_shard_is_corrected(store: Store, manifest: Manifest) -> None:
    ref = shards(store)[0]
    replace(store, ref, ShardRef(ref.unit, ref.path, ref.sha256, 5), 11)
    done = repair_store(store.uri)
    assert done["repair"]["log_entries_corrected"] == 1
    assert done["repair"]["units_dropped"] == []
    assert store.committed()[ref.unit] == ref
    assert verify_store(store.uri)["problems"] == []
    assert pending(manifest, store) == []


def test_a_damaged_plan_comes_back_as_it_was(store: Store, manifest: Manifest) -> None:
    before, units = plan_files(store), store.planned()
    (name,) = before
    flip(Path(store.uri, "_stillroom/plans", name))
    with pytest.raises(CorruptShard):
        store.planned()
    done = repair_store(store.uri)
    assert done["repair"]["plans_rebuilt"] == [f"_stillroom/plans/{name}"]
    assert plan_files(store) == before
    assert store.planned() == units
    assert pending(manifest, store) == []
    assert verify_store(store.uri)["problems"] == []


def test_a_lost_plan_is_rebuilt_in_its_place(store: Store) -> None:
    extra = random_sequences(np.random.default_rng(9), 4)
    store.save_plan([unit_of(extra)])
    before = plan_files(store)
    Path(store.uri, "_stillroom/plans", min(before)).unlink()
    with pytest.raises(StoreError, match="a plan file was lost"):
        store.snapshot()
    repair_store(store.uri)
    assert plan_files(store) == before
    assert len(store.snapshot().units) == 3


def test_a_plan_with_units_not_scored_yet_keeps_what_is_committed(
    store: Store, sequences: list[Sequence], manifest: Manifest
) -> None:
    """What was planned and never scored is planned anew: its sequences are in the corpus."""
    victim = unit_of(sequences[10:20])
    CommitLog.open(store.uri).remove([store.committed()[victim.id]])
    (name,) = plan_files(store)
    flip(Path(store.uri, "_stillroom/plans", name))
    done = repair_store(store.uri)
    (rebuilt,) = plan_files(store)
    assert rebuilt != name
    assert rebuilt.startswith("00001-")
    assert done["problems_left"] == 0
    assert pending(manifest, store) == [victim.id]


def test_a_plan_and_a_shard_of_it_are_damaged(store: Store, sequences: list[Sequence], manifest: Manifest) -> None:
    victim = unit_of(sequences[:10])
    break_file(store, store.committed()[victim.id])
    for name in plan_files(store):
        flip(Path(store.uri, "_stillroom/plans", name))
    done = repair_store(store.uri)
    assert done["repair"]["units_of_unknown_size"] == 1
    assert pending(manifest, store) == [victim.id]
    assert verify_store(store.uri)["problems"] == []


def test_a_damaged_fidelity_sample_is_removed(store: Store, sequences: list[Sequence]) -> None:
    name = f"_stillroom/truth/{unit_of(sequences[:10]).id}-{sha256_hex(b'truth')}.parquet"
    store.files.write(name, b"trash")
    assert repair_store(store.uri)["repair"]["files_removed"] == [name]
    assert not store.files.exists(name)


def test_what_no_repair_can_mend_is_left_and_said(store: Store) -> None:
    edit_entry(store, 1, lambda text: text.replace('{"add"', '{"aed"', 1))
    done = repair_store(store.uri)
    assert done["problems_left"] == 1
    assert [p["repaired"] for p in done["problems"]] == [False]
    Path(store.uri, "_stillroom/identity.json").write_text("{")
    with pytest.raises((IdentityMismatch, FormatMismatch), match="damaged"):
        repair_store(store.uri)


def test_a_file_that_cannot_be_reached_is_not_taken_for_a_broken_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No permission, no network: that says nothing of the bytes, and dropping would score a store again."""
    version = DeltaTable(store.uri).version()

    opened = LocalFiles.open

    def refuse(self: LocalFiles, name: str) -> Any:
        if name.startswith("shards/"):
            raise StoreError(f"cannot read {name}: Permission denied")
        return opened(self, name)

    monkeypatch.setattr(LocalFiles, "open", refuse)
    done = repair_store(store.uri)
    assert done["problems_left"] == 3
    assert all("Permission denied" in p["problem"] for p in done["problems"])
    assert DeltaTable(store.uri).version() == version


@pytest.mark.parametrize("stops", range(1, 6))
def test_an_interrupted_repair_is_repeated(
    store: Store, sequences: list[Sequence], manifest: Manifest, monkeypatch: pytest.MonkeyPatch, stops: int
) -> None:
    """Stopped before its n-th change to the store, of all kinds; the next one ends where an undisturbed one would."""
    extra = random_sequences(np.random.default_rng(9), 4)
    store.save_plan([unit_of(extra)])
    first, _, third = shards(store)
    break_file(store, first)
    replace(store, third, ShardRef(third.unit, third.path, third.sha256, 5), 10)
    flip(Path(store.uri, "_stillroom/plans", max(plan_files(store))))
    flip(Path(store.uri, "_stillroom/plans", min(plan_files(store))))
    changes = 0

    def stop(genuine: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == stops:
                raise KeyboardInterrupt
            return genuine(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, method in ((LocalFiles, "write"), (LocalFiles, "delete"), (CommitLog, "_write")):
            patch.setattr(owner, method, stop(getattr(owner, method)))
        with pytest.raises(KeyboardInterrupt):
            repair_store(store.uri)
    repair_store(store.uri)
    assert verify_store(store.uri)["problems"] == []
    lost = pending(manifest, store)
    assert first.unit in lost
    assert set(lost) <= {first.unit, third.unit}


def test_a_pinned_student_says_what_to_do_where_its_shard_was_dropped(store: Store, tmp_path: Path) -> None:
    snapshot, victim = store.snapshot(), shards(store)[0]
    snapshot.write(tmp_path / "snapshot.parquet")
    break_file(store, victim)
    repair_store(store.uri)
    pinned = Snapshot.read(tmp_path / "snapshot.parquet")
    with pytest.raises(CorruptShard, match=victim.path):
        open_store(store.uri).reader(pinned.refs[victim.unit])


def test_removing_what_the_log_does_not_name_commits_nothing(store: Store) -> None:
    version = DeltaTable(store.uri).version()
    log = CommitLog.open(store.uri)
    assert log.remove([]) == []
    assert log.remove([named_receipt(7).shard]) == []
    assert DeltaTable(store.uri).version() == version
