"""Repair and gc in a bucket of a real S3 server: what they do in a folder, they do there."""

import time
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.care.gc import collect_garbage
from stillroom.storage.care.pins import pin
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.records import Sequence
from stillroom.storage.store import Store, create_store
from tests.s3_server import BUCKET, S3Server
from tests.storage.damage import shards
from tests.strategies import next_token_teacher, random_sequences, tiny_identity, unit_of, write_unit

pytestmark = pytest.mark.real

LATER_S = time.time() + 7200.0


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(3), 15, shortest=10, longest=24)


@pytest.fixture
def store(s3_server: S3Server, sequences: list[Sequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = create_store(f"s3://{BUCKET}/{tmp_path.name}", tiny_identity())
    parts = [sequences[at : at + 5] for at in range(0, 15, 5)]
    store.save_plan([unit_of(part) for part in parts])
    store.commit([write_unit(store, part, next_token_teacher) for part in parts])
    return store


def test_a_broken_object_is_dropped_scored_again_and_its_leftovers_removed(
    store: Store, sequences: list[Sequence], tmp_path: Path
) -> None:
    assert verify_store(store.uri)["problems"] == []
    before = store.committed()
    victim = before[unit_of(sequences[5:10]).id]
    data = bytearray(store.files.read(victim.path))
    data[100] ^= 1
    store.files.write(victim.path, bytes(data))
    lost = shards(store)[0] if shards(store)[0] != victim else shards(store)[1]
    store.files.delete(lost.path)
    done = repair_store(store.uri)
    assert done["problems_left"] == 0
    assert done["repair"]["units_dropped"] == sorted([victim.unit, lost.unit])
    assert store.committed() == {u: ref for u, ref in before.items() if u not in (victim.unit, lost.unit)}
    # Another machine scores it: the damaged object keeps its name and is nobody's.
    store.commit([write_unit(store, sequences[5:10], next_token_teacher, machine="another")])
    assert collect_garbage(store.uri)["removed_files"] == 0
    found = collect_garbage(store.uri, now_s=LATER_S)
    assert [line["file"] for line in found["removed"]] == [victim.path]
    assert found["foreign"] == []
    assert verify_store(store.uri)["problems"] == []


def test_a_pinned_student_keeps_its_objects(store: Store, tmp_path: Path) -> None:
    snapshot, path = store.snapshot(), tmp_path / "snapshot.parquet"
    pin(store.files, snapshot, path)
    snapshot.write(path)
    leftover = shards(store)[0]
    data = store.files.read(leftover.path)
    store.files.delete(leftover.path)
    repair_store(store.uri)
    store.files.write(leftover.path, data)
    assert collect_garbage(store.uri, now_s=LATER_S)["spared_pinned_files"] == 1
    path.unlink()
    removed = {line["file"] for line in collect_garbage(store.uri, now_s=LATER_S)["removed"]}
    assert leftover.path in removed
    assert len(removed) == 2
