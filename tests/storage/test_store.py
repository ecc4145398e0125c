"""store.py, plans.py and snapshot.py: what is committed, planned and pinned, on paths both smooth and damaged."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import CorruptShard, FormatMismatch, IdentityMismatch, StoreError
from stillroom.storage.identity import Identity
from stillroom.storage.plans import FOLDER, load_plans
from stillroom.storage.records import Sequence
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, create_store, open_store
from tests.strategies import random_sequences, tiny_identity, tiny_store, unit_of, write_unit


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(2), 12)


@pytest.fixture
def store(tmp_path: Path, sequences: list[Sequence]) -> Store:
    return tiny_store(tmp_path / "store", sequences, per_unit=5)


def digests(sequences: list[Sequence]) -> list[str]:
    return sorted(s.digest for s in sequences)


def test_a_store_is_found_again(store: Store, sequences: list[Sequence]) -> None:
    again = open_store(store.uri)
    assert again.identity == store.identity
    assert again.committed() == store.committed()
    assert len(again.committed()) == 3
    assert digests([s.sequence for s in again.sequences()]) == digests(sequences)
    assert create_store(store.uri, store.identity).committed() == store.committed()


def test_a_crash_between_write_and_commit_leaves_nothing_visible(store: Store) -> None:
    before = store.committed()
    late = random_sequences(np.random.default_rng(8), 3, shortest=30, longest=40)
    store.save_plan([unit_of(late)])
    receipt = write_unit(store, late)
    again = open_store(store.uri)
    assert again.committed() == before
    assert unit_of(late).id not in {u.id for u in again.snapshot().units}
    assert again.commit([receipt]) == [receipt], "the retry may commit what the crashed writer left"
    assert set(again.committed()) == {*before, unit_of(late).id}


def test_a_second_writers_shard_of_a_unit_does_not_count(store: Store, sequences: list[Sequence]) -> None:
    """Same rows from another machine: other bytes, another path, the same unit."""
    other = open_store(store.uri)
    receipt = write_unit(other, sequences[:5], machine="another")
    assert receipt.shard.path != store.committed()[receipt.shard.unit].path
    assert other.commit([receipt]) == []
    assert digests([s.sequence for s in other.sequences()]) == digests(sequences)


def test_founders_at_once_found_one_store(tmp_path: Path) -> None:
    identity = tiny_identity()
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: create_store(str(tmp_path / "s"), identity), range(4)))
    assert {s.identity for s in stores} == {identity}
    assert open_store(str(tmp_path / "s")).committed() == {}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("signal: store top-4 (1/8 nat), asked top-5 (1/8 nat)", tiny_identity(k=5)),
        ("vocabulary: store 40, asked 41", tiny_identity(vocabulary=41)),
        ("signal: store top-4 (1/8 nat), asked top-4 (float32)", tiny_identity(gap_step=None)),
        ("weights: store ab", tiny_identity(weights="ff" * 16)),
    ],
)
def test_another_identity_is_refused_and_the_part_named(store: Store, part: str, other: Identity) -> None:
    with pytest.raises(IdentityMismatch) as caught:
        create_store(store.uri, other)
    message = str(caught.value)
    named = part.split(":")[0]
    assert part in message
    assert store.uri in message
    assert "store.path" in message, "the remedy"
    untouched = {"weights", "vocabulary", "dtype", "tokenizer", "signal"} - {named}
    assert not any(f"{key}: store" in message for key in untouched), "parts that agree are not listed"


def test_where_there_is_no_store(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FormatMismatch, match="is no store"):
            open_store(str(place))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"text"', "{}", '{"id": "x"}', '{"id": "x", "signal": 4}', '{"id": "x", "signal": {}}']
)
def test_an_unreadable_identity_is_told(store: Store, text: str) -> None:
    Path(store.uri, "_stillroom/identity.json").write_text(text)
    with pytest.raises(FormatMismatch, match=r"_stillroom/identity\.json cannot be read"):
        open_store(store.uri)
    with pytest.raises(FormatMismatch, match=r"_stillroom/identity\.json cannot be read"):
        create_store(store.uri, store.identity)


def test_a_changed_identity_is_told(store: Store) -> None:
    path = Path(store.uri, "_stillroom/identity.json")
    path.write_text(path.read_text().replace('"vocabulary": 40', '"vocabulary": 41'))
    with pytest.raises(IdentityMismatch, match="identity file is damaged"):
        open_store(store.uri)


def test_a_store_without_its_log_is_told(store: Store) -> None:
    for file in Path(store.uri, "_delta_log").iterdir():
        file.unlink()
    with pytest.raises(StoreError, match="has no commit log"):
        open_store(store.uri)


def test_plans_accumulate_in_order(store: Store, sequences: list[Sequence]) -> None:
    more = random_sequences(np.random.default_rng(9), 4, shortest=30, longest=40)
    store.save_plan([unit_of(more[:2])])
    store.save_plan([])
    store.save_plan([unit_of(more[2:])])
    expected = [unit_of(p) for p in (sequences[:5], sequences[5:10], sequences[10:], more[:2], more[2:])]
    assert open_store(store.uri).planned() == expected


def test_files_that_are_no_plans_are_let_be(store: Store) -> None:
    planned = store.planned()
    Path(store.uri, FOLDER, ".00002-interrupted.parquet.abc.tmp").write_bytes(b"half")
    Path(store.uri, FOLDER, ".DS_Store").write_bytes(b"a file manager's")
    assert store.planned() == planned


def _plan_file(store: Store) -> Path:
    (path,) = Path(store.uri, FOLDER).iterdir()
    return path


def test_every_damage_of_a_plan_is_told_by_name(store: Store) -> None:
    """Never other units than were saved, and never another error than one that names the file."""
    path, planned = _plan_file(store), store.planned()
    whole = path.read_bytes()
    rng = np.random.default_rng(6)
    told = untold = 0
    for _ in range(200):
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        path.write_bytes(flipped if rng.random() < 0.8 else whole[:at])
        try:
            read = [(u.id, u.sequences) for u in store.planned()]
        except CorruptShard as error:
            told += path.name in str(error)
        else:
            assert read == [(u.id, u.sequences) for u in planned]
            untold += 1
    assert told + untold == 200
    assert told > 100


def test_a_plan_of_other_columns_or_other_units_is_told(store: Store) -> None:
    path = _plan_file(store)
    table = pq.read_table(path)
    for forged in (
        table.select(["unit", "sequence"]),
        table.rename_columns(["a", "b", "c", "d"]),
        table.slice(5),
        table.set_column(1, "sequence", pa.array(["0" * 32] * len(table))),
    ):
        pq.write_table(forged, path)
        with pytest.raises(CorruptShard, match=path.name):
            load_plans(store.files)


def test_a_lost_plan_is_told_when_a_snapshot_needs_it(store: Store) -> None:
    _plan_file(store).unlink()
    with pytest.raises(StoreError, match="3 units that no plan"):
        store.snapshot()


def test_a_snapshot_comes_back_from_its_file(store: Store, tmp_path: Path) -> None:
    snapshot = store.snapshot()
    snapshot.write(tmp_path / "run" / "snapshot.parquet")
    again = Snapshot.read(tmp_path / "run" / "snapshot.parquet")
    assert again == snapshot
    assert again.digest == snapshot.digest
    assert [u.id for u in again.units] == [u.id for u in store.planned()]
    assert set(again.refs) == set(store.committed())


def test_a_snapshot_stands_still_while_the_store_grows(store: Store) -> None:
    snapshot = store.snapshot()
    late = random_sequences(np.random.default_rng(8), 3, shortest=30, longest=40)
    store.save_plan([unit_of(late)])
    store.commit([write_unit(store, late)])
    assert len(snapshot.units) == 3
    assert len(store.snapshot().units) == 4
    assert store.snapshot().digest != snapshot.digest


def test_a_snapshot_of_some_sequences_holds_their_units_alone(store: Store, sequences: list[Sequence]) -> None:
    some = store.snapshot({sequences[0].digest, sequences[11].digest, "0" * 32})
    assert [u.id for u in some.units] == [unit_of(sequences[:5]).id, unit_of(sequences[10:]).id]
    assert set(some.refs) == {u.id for u in some.units}
    assert store.snapshot(set()).units == ()


def test_a_snapshot_of_an_empty_store_is_empty(tmp_path: Path) -> None:
    snapshot = create_store(str(tmp_path / "s"), tiny_identity()).snapshot()
    snapshot.write(tmp_path / "snapshot.parquet")
    assert Snapshot.read(tmp_path / "snapshot.parquet") == snapshot
    assert snapshot.units == ()


def test_every_damage_of_a_snapshot_is_told_by_name(store: Store, tmp_path: Path) -> None:
    path, snapshot = tmp_path / "snapshot.parquet", store.snapshot()
    snapshot.write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(6)
    told = untold = 0
    for _ in range(300):
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        path.write_bytes(flipped if rng.random() < 0.9 else whole[:at])
        try:
            read = Snapshot.read(path)
        except StoreError as error:
            told += path.name in str(error)
        else:
            untold += 1
            assert read.refs == snapshot.refs
            assert read.identity == snapshot.identity
            assert [u.sequences for u in read.units] == [u.sequences for u in snapshot.units]
    assert told + untold == 300
    assert told > 150


def test_files_that_are_no_snapshots_are_told(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.parquet"
    with pytest.raises(StoreError, match=r"snapshot .*snapshot\.parquet cannot be read"):
        Snapshot.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(StoreError, match=r"snapshot .*snapshot\.parquet cannot be read"):
        Snapshot.read(path)


BLOCKED = """
import sys
for name in ("deltalake", "torch", "ray", "vllm", "transformers"):
    sys.modules[name] = None
import stillroom.storage.stream, stillroom.storage.snapshot, stillroom.storage.manifest
from stillroom.storage import Manifest, Stream
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"deltalake", "torch", "ray", "vllm", "transformers"}, loaded
print("read without them")
"""


@pytest.mark.real
def test_a_reader_needs_no_log_no_torch_and_no_ray() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], check=True, capture_output=True, text=True)
    assert done.stdout == "read without them\n"


def test_the_public_names_are_few_and_a_wrong_one_is_told() -> None:
    import stillroom.storage as room

    assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError, match=r"no public name 'Stroe'; it has .*Store"):
        _ = room.Stroe


def test_identity_file_is_readable_json(store: Store) -> None:
    stated = json.loads(Path(store.uri, "_stillroom/identity.json").read_text())
    assert stated["id"] == store.identity.id
    assert stated["format"] == 2
    assert stated["signal"] == {"topk": {"k": 4, "gap_step": 0.125, "layout": "plain"}}
