"""arrivals.py and open snapshots: what a student is told of shards that come while it trains."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.arrivals import Arrivals, ArrivalsWriter, arrivals_path
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.manifest import Manifest
from stillroom.storage.order import LANES
from stillroom.storage.records import ShardRef
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, create_store
from stillroom.storage.stream import Stream
from tests.strategies import (
    manifest_row,
    named_receipt,
    random_sequences,
    tiny_identity,
    tiny_manifest,
    tiny_store,
    unit_of,
    write_unit,
)


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(0), 40), per_unit=4)


@pytest.fixture(name="manifest")
def _manifest(tmp_path: Path) -> Manifest:
    sequences = random_sequences(np.random.default_rng(0), 40)
    rows = [manifest_row(s, document=n, heldout=n % 10 == 9) for n, s in enumerate(sequences)]
    return tiny_manifest(tmp_path / "corpus.parquet", rows)


def opened(whole: Snapshot, held: int) -> Snapshot:
    """The same with the shards of its first `held` units alone."""
    kept = [unit.id for unit in whole.units[:held]]
    return replace(whole, refs={unit: whole.refs[unit] for unit in kept})


def test_told_shards_are_read_in_order_and_once(tmp_path: Path) -> None:
    path = arrivals_path(tmp_path / "snapshot.parquet")
    refs = [named_receipt(number).shard for number in range(5)]
    reader, writer = Arrivals(path), ArrivalsWriter(path)
    assert reader.look() == []
    writer.tell(refs[:2])
    assert reader.look() == refs[:2]
    writer.tell(refs[1:4])
    assert reader.look() == refs[2:4]
    assert reader.look() == []
    assert list(reader.refs.values()) == list(writer.refs.values()) == refs[:4]
    assert ArrivalsWriter(path).refs == writer.refs


@pytest.mark.parametrize("kept", [1, 60, 150])
def test_half_a_line_of_a_killed_writer_counts_for_nothing(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "arrivals.jsonl"
    first, second = (named_receipt(number).shard for number in range(2))
    ArrivalsWriter(path).tell([first])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    reader = Arrivals(path)
    assert reader.look() == [first]
    assert reader.look() == []
    ArrivalsWriter(path).tell([second])
    assert reader.look() == [second]
    assert Arrivals(path).look() == [first, second]


@pytest.mark.parametrize("line", ["[]", "{}", "null", '["a", "b", "c", 1]', "nonsense", '["a", 3, "c", 1]'])
def test_a_line_that_names_no_shard_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "arrivals.jsonl").write_text(line + "\n")
    with pytest.raises(CorruptShard, match="is damaged"):
        Arrivals(tmp_path / "arrivals.jsonl").look()


def test_an_open_snapshot_comes_back_as_it_was(tmp_path: Path, store: Store) -> None:
    whole = store.snapshot()
    part = opened(whole, 3)
    assert part.open
    assert not whole.open
    part.write(tmp_path / "part.parquet")
    back = Snapshot.read(tmp_path / "part.parquet")
    assert (back.units, back.refs, back.identity) == (part.units, part.refs, part.identity)
    assert back.digest == part.planned_digest == whole.planned_digest != whole.digest
    assert replace(whole, units=whole.units[:5]).planned_digest != whole.planned_digest
    completed = replace(back, refs=whole.refs)
    assert completed.digest == whole.digest
    completed.write(tmp_path / "completed.parquet")
    whole.write(tmp_path / "whole.parquet")
    assert (tmp_path / "completed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_snapshot_has_the_units_that_are_pending(tmp_path: Path) -> None:
    parts = [random_sequences(np.random.default_rng(seed), 4) for seed in range(3)]
    store = create_store(str(tmp_path), tiny_identity())
    units = [unit_of(part) for part in parts]
    store.save_plan(units)
    store.commit([write_unit(store, parts[0])])
    found = store.snapshot(pending={units[2].id})
    assert found.units == (units[0], units[2])
    assert found.refs.keys() == {units[0].id}
    assert found.open
    assert not store.snapshot().open


@pytest.mark.parametrize("held", [0, 4])
def test_a_stream_waits_for_its_next_unit_and_the_order_is_the_same(
    store: Store, manifest: Manifest, held: int
) -> None:
    whole = store.snapshot()
    asked: list[str] = []

    def arrive(unit: str, gone: object) -> ShardRef:
        asked.append(unit)
        return whole.refs[unit]

    streams = [
        Stream(manifest=manifest, snapshot=snapshot, window=40, epochs=2, await_shard=arrive)
        for snapshot in (whole, opened(whole, held))
    ]
    packs = [list(stream) for stream in streams]
    assert [p.sequences for p in packs[0]] == [p.sequences for p in packs[1]]
    assert all(
        np.array_equal(a.signal.topk.logits, b.signal.topk.logits)
        for a, b in zip(*packs, strict=True)
        if a.signal and a.signal.topk and b.signal and b.signal.topk
    )
    assert streams[0].units() >= set(asked)
    assert len(asked) == len(set(asked)) == len(streams[1].units() - opened(whole, held).refs.keys())


def test_units_are_asked_for_in_the_order_in_which_teachers_score(store: Store, manifest: Manifest) -> None:
    from stillroom.storage.order import unit_order

    whole = store.snapshot()
    asked: list[str] = []

    def arrive(unit: str, gone: object) -> ShardRef:
        asked.append(unit)
        return whole.refs[unit]

    stream = Stream(manifest=manifest, snapshot=opened(whole, 0), window=40, seed=5, epochs=1, await_shard=arrive)
    list(stream)
    assert len(whole.units) < LANES
    assert asked == [whole.units[i].id for i in unit_order([u.id for u in whole.units], 5, 0)]


def test_a_closed_stream_waits_no_longer(store: Store, manifest: Manifest) -> None:
    class Gone(Exception):
        pass

    whole, waiting = store.snapshot(), threading.Event()

    def arrive(unit: str, gone: object) -> ShardRef:
        assert callable(gone)
        waiting.set()
        while not gone():
            pass
        raise Gone

    held = opened(whole, 0)
    first = Stream(manifest=manifest, snapshot=whole, window=40, epochs=1)
    order = [unit.id for unit in whole.units]
    assert first.units() <= set(order)
    begun = replace(held, refs={unit: whole.refs[unit] for unit in first.units(1)})
    packs = iter(Stream(manifest=manifest, snapshot=begun, window=40, epochs=1, await_shard=arrive))
    next(packs)
    assert waiting.wait(10)
    packs.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "stillroom-stream"]


def test_a_full_disk_leaves_no_half_a_line(tmp_path: Path) -> None:
    writer = ArrivalsWriter(tmp_path / "missing" / "arrivals.jsonl")
    with pytest.raises(StoreError, match="cannot write"):
        writer.tell([named_receipt(0).shard])
    assert writer.refs == {}
