"""stream.py: what a student is given, in which order, and what it is told when it cannot be given."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage.codecs.signal import SignalCodec
from stillroom.storage.errors import CorruptShard, IdentityMismatch, StoreError, UsageError
from stillroom.storage.manifest import Manifest, ManifestRow
from stillroom.storage.records import Pack, Sequence, Signal
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store
from stillroom.storage.stream import Stream
from tests.strategies import (
    digest_teacher,
    manifest_row,
    random_sequences,
    round_trip,
    tiny_identity,
    tiny_manifest,
    tiny_store,
    topk_of,
    unit_of,
    write_unit,
)

WINDOW = 40


@pytest.fixture(scope="module")
def corpus() -> list[ManifestRow]:
    """90 sequences with random masks and weights; every tenth is held out, two stand in it more than once."""
    rng = np.random.default_rng(0)
    rows = []
    for number, sequence in enumerate(random_sequences(rng, 90)):
        length = len(sequence.input_ids)
        mask = (rng.random(length) < 0.7) & (np.arange(length) >= sequence.context)
        rows.append(
            manifest_row(
                sequence, mask=mask, weight=float(rng.integers(1, 5)), document=number, heldout=number % 10 == 9
            )
        )
    often = rows[50]
    rows.insert(3, often)
    rows.append(replace(often, weight=9.0))
    rows.append(replace(rows[7], mask=~rows[7].mask & (np.arange(len(rows[7].mask)) >= rows[7].sequence.context)))
    return rows


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, corpus: list[ManifestRow]) -> Manifest:
    return tiny_manifest(tmp_path_factory.mktemp("corpus") / "manifest.parquet", corpus)


def distinct(corpus: list[ManifestRow]) -> list[Sequence]:
    return list({row.sequence.digest: row.sequence for row in corpus}.values())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, corpus: list[ManifestRow]) -> Store:
    return tiny_store(tmp_path_factory.mktemp("store"), distinct(corpus), per_unit=4)


@pytest.fixture(scope="module")
def snapshot(store: Store) -> Snapshot:
    return store.snapshot()


def stream(manifest: Manifest, snapshot: Snapshot | None, **options: Any) -> Stream:
    return Stream(**({"manifest": manifest, "snapshot": snapshot, "window": WINDOW, "epochs": 1} | options))


def key(pack: Pack) -> tuple[Any, ...]:
    """Everything that a student sees of a pack, to the bit."""
    arrays: list[Any] = [pack.input_ids, pack.position_ids, pack.segment_ids, pack.positions, pack.labels, pack.weights]
    if pack.signal is not None:
        topk = pack.signal.topk
        assert topk is not None
        arrays += [topk.ids, topk.logits, topk.tail_lse]
    return (pack.epoch, pack.index, pack.sequences, *(a.tobytes() for a in arrays))


def interleaved(streams: list[Stream]) -> list[tuple[Any, ...]]:
    """Packs of all ranks, one from each in turn."""
    lists = [[key(pack) for pack in s] for s in streams]
    return [packs[turn] for turn in range(max(map(len, lists))) for packs in lists if turn < len(packs)]


def trained_tokens(row: ManifestRow) -> list[tuple[int, int]]:
    """(position, label) that a row trains, by the words of the contract and a loop."""
    return [
        (t, int(row.sequence.input_ids[t + 1]))
        for t in range(len(row.sequence.input_ids) - 1)
        if row.mask[t + 1] and t >= row.sequence.first_position
    ]


def test_every_training_row_is_served_once_an_epoch(
    manifest: Manifest, snapshot: Snapshot, corpus: list[ManifestRow]
) -> None:
    expected = Counter(row.sequence.digest for row in corpus if not row.heldout)
    assert max(expected.values()) == 3, "a row that stands three times in the corpus"
    for source in (snapshot, None):
        for epoch in range(3):
            packs = [p for p in stream(manifest, source, epochs=3) if p.epoch == epoch]
            assert Counter(d for p in packs for d in p.sequences) == expected
            assert [p.index for p in packs] == list(range(len(packs)))


def test_held_out_rows_are_served_to_evaluation_and_nothing_else(
    manifest: Manifest, snapshot: Snapshot, corpus: list[ManifestRow]
) -> None:
    served = Counter(d for p in stream(manifest, snapshot, heldout=True) for d in p.sequences)
    assert served == Counter(row.sequence.digest for row in corpus if row.heldout)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("signal", [True, False])
def test_packs_are_what_the_contract_says(
    manifest: Manifest, snapshot: Snapshot, corpus: list[ManifestRow], pack: bool, signal: bool
) -> None:
    """Every pack against a reference made of loops: segments, positions, labels, weights and the teacher's rows."""
    codec = SignalCodec(snapshot.identity.signal, 40)
    rows = [row for row in corpus if not row.heldout]
    left = dict(enumerate(rows))
    for p in stream(manifest, snapshot if signal else None, pack=pack):
        assert len(p.input_ids) == (WINDOW if pack else len(p.input_ids))
        assert len(p.input_ids) == len(p.position_ids) == len(p.segment_ids)
        dtypes = [str(a.dtype) for a in (p.input_ids, p.positions, p.labels, p.weights)]
        assert dtypes == ["int32", "int64", "int32", "float32"]
        at, trained = 0, []
        for number, digest in enumerate(p.sequences):
            length = next(len(r.sequence.input_ids) for r in rows if r.sequence.digest == digest)
            inside = np.flatnonzero((p.positions >= at) & (p.positions < at + length))
            given = list(zip((p.positions[inside] - at).tolist(), p.labels[inside].tolist(), strict=True))
            weights = set(p.weights[inside].tolist())
            found = next(
                n
                for n, r in left.items()
                if r.sequence.digest == digest and trained_tokens(r) == given and weights <= {r.weight}
            )
            row = left.pop(found)
            assert p.input_ids[at : at + length].tolist() == row.sequence.input_ids.tolist()
            assert p.position_ids[at : at + length].tolist() == list(range(length))
            assert p.segment_ids[at : at + length].tolist() == [number] * length
            if signal:
                said = round_trip(codec, Signal(topk_of(digest_teacher(row.sequence, 40), 4)))
                kept = [t - row.sequence.first_position for t, _ in given]
                trained.append(said[np.array(kept, np.int64)])
            at += length
        padding = len(p.input_ids) - at
        assert pack or padding == 0
        assert p.segment_ids[at:].tolist() == [-1] * padding
        assert p.position_ids[at:].tolist() == list(range(padding))
        assert len(p.positions) == len(p.labels) == len(p.weights)
        assert (p.signal is not None) == signal
        if p.signal is not None:
            expected = Signal.concatenate(trained)
            assert len(p.signal) == len(p.positions)
            for name in ("ids", "logits", "tail_lse"):
                assert np.array_equal(getattr(p.signal.topk, name), getattr(expected.topk, name))
    assert not left, "every row was served with its own mask and weight"


def test_overlapping_windows_predict_every_token_once(tmp_path: Path) -> None:
    """A document of 100 ids 0 … 99 in windows of 32 that share 8: labels are 1 … 99, each once."""
    document = np.arange(100, dtype=np.int32)
    windows = [Sequence(document[:32], 0)]
    while (stop := 32 + 24 * len(windows)) < 100 + 24:
        windows.append(Sequence(document[stop - 32 : min(stop, 100)], 8))
    assert len(windows) == 4
    manifest = tiny_manifest(tmp_path / "m.parquet", windows, vocabulary=100)
    store = tiny_store(tmp_path / "s", windows, identity=tiny_identity(vocabulary=100))
    for pack in (True, False):
        for source in (store.snapshot(), None):
            packs = list(stream(manifest, source, pack=pack))
            assert sorted(label for p in packs for label in p.labels.tolist()) == list(range(1, 100))
            assert all((p.input_ids[p.positions] + 1 == p.labels).all() for p in packs)


@pytest.mark.parametrize("signal", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_ranks_interleave_to_one_order(manifest: Manifest, snapshot: Snapshot, signal: bool, pack: bool) -> None:
    source = snapshot if signal else None
    options: dict[str, Any] = {"epochs": 2, "seed": 5, "pack": pack}
    alone = [key(p) for p in stream(manifest, source, **options)]
    assert len(alone) > 20
    for size in (2, 3, 4):
        ranks = [stream(manifest, source, rank=r, world_size=size, **options) for r in range(size)]
        assert interleaved(ranks) == alone


def test_a_resume_continues_exactly_under_any_world_size(manifest: Manifest, snapshot: Snapshot) -> None:
    """From every tenth pack on, across the end of an epoch."""
    alone = [key(p) for p in stream(manifest, snapshot, epochs=2)]
    per_epoch = stream(manifest, snapshot).packs_per_epoch(0)
    for start in sorted({0, 1, per_epoch - 1, per_epoch, per_epoch + 1, len(alone) - 1, *range(0, len(alone), 10)}):
        for size in (1, 2, 4):
            ranks = [stream(manifest, snapshot, epochs=2, start=start, rank=r, world_size=size) for r in range(size)]
            assert interleaved(ranks) == alone[start:], (start, size)


def test_a_cursor_beyond_the_end_gives_nothing(manifest: Manifest, snapshot: Snapshot) -> None:
    total = stream(manifest, snapshot).packs_per_epoch(0)
    assert list(stream(manifest, snapshot, start=total)) == []
    assert list(stream(manifest, snapshot, start=10 * total)) == []


def test_a_stream_iterated_twice_or_twice_at_once_gives_the_same(manifest: Manifest, snapshot: Snapshot) -> None:
    one = stream(manifest, snapshot)
    first = [key(p) for p in one]
    assert [(key(a), key(b)) for a, b in zip(one, one, strict=True)] == [(k, k) for k in first]


def test_without_epochs_it_never_ends(manifest: Manifest, snapshot: Snapshot) -> None:
    endless = stream(manifest, snapshot, epochs=None)
    count = sum(endless.packs_per_epoch(epoch) for epoch in range(3)) + 1
    assert [p.epoch for p in islice(endless, count)][-1] == 3


def test_seeds_and_epochs_differ(manifest: Manifest, snapshot: Snapshot) -> None:
    def sequences(seed: int) -> list[list[tuple[str, ...]]]:
        packs = list(stream(manifest, snapshot, seed=seed, epochs=2))
        return [[p.sequences for p in packs if p.epoch == epoch] for epoch in (0, 1)]

    zero, one = sequences(0), sequences(1)
    assert zero[0] != zero[1]
    assert zero[0] != one[0]
    assert zero[1] != one[1]


def test_a_larger_corpus_of_known_sequences_needs_no_new_shard(
    tmp_path: Path, snapshot: Snapshot, corpus: list[ManifestRow]
) -> None:
    """Another order, another split, other masks, duplicates: the same store serves them."""
    rows = [
        replace(row, mask=np.arange(len(row.mask)) >= max(row.sequence.context, 1), heldout=n % 7 == 0)
        for n, row in enumerate([*corpus[::-1], *corpus[:20]])
    ]
    other = tiny_manifest(tmp_path / "other.parquet", rows)
    served = Counter(d for p in stream(other, snapshot) for d in p.sequences)
    assert served == Counter(row.sequence.digest for row in rows if not row.heldout)


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "stillroom-stream"]


def test_the_thread_ends_with_the_iteration(manifest: Manifest, snapshot: Snapshot) -> None:
    for taken in (1, 3):
        packs = iter(stream(manifest, snapshot, epochs=None, prefetch=1))
        assert len(list(islice(packs, taken))) == taken
        assert _threads() == ["stillroom-stream"]
        packs.close()  # type: ignore[attr-defined]
        assert _threads() == []
    for _ in stream(manifest, snapshot, epochs=None):
        break
    assert _threads() == []
    list(stream(manifest, snapshot))
    assert _threads() == []


def test_a_damaged_shard_is_told_out_of_the_iterator(tmp_path: Path, corpus: list[ManifestRow]) -> None:
    """Also late: what was good is served first, the thread ends, and the error names the file."""
    store = tiny_store(tmp_path / "s", distinct(corpus), per_unit=4)
    manifest = tiny_manifest(tmp_path / "m.parquet", corpus)
    whole = stream(manifest, store.snapshot(), prefetch=1)
    last = list(whole)[-1].sequences[0]
    unit = next(u for u in store.planned() if last in u.sequences)
    path = Path(store.uri, store.committed()[unit.id].path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)
    served: list[Any] = []
    with pytest.raises(CorruptShard, match=path.name):
        served.extend(key(pack) for pack in stream(manifest, store.snapshot()))
    assert served == [key(p) for p in islice(whole, len(served))]
    assert _threads() == []
    path.unlink()
    with pytest.raises(StoreError, match=path.name):
        list(stream(manifest, store.snapshot()))


def test_a_shard_that_holds_other_sequences_than_its_plan_is_told(tmp_path: Path) -> None:
    """A snapshot whose plan swaps two sequences of one length would serve one's signal as the other's."""
    one, two = (Sequence(np.full(6, fill, np.int32)) for fill in (1, 2))
    store = tiny_store(tmp_path / "s", [one, two])
    manifest = tiny_manifest(tmp_path / "m.parquet", [one, two])
    snapshot = store.snapshot()
    (unit,) = snapshot.units
    swapped = unit_of([two, one])
    lying = replace(snapshot, units=(swapped,), refs={swapped.id: snapshot.refs[unit.id]})
    with pytest.raises(CorruptShard, match="holds sequence"):
        list(stream(manifest, lying))


def test_missing_sequences_are_counted_and_the_remedy_told(
    tmp_path: Path, snapshot: Snapshot, corpus: list[ManifestRow]
) -> None:
    unseen = random_sequences(np.random.default_rng(77), 5, shortest=30, longest=40)
    manifest = tiny_manifest(tmp_path / "m.parquet", [*corpus, *unseen])
    training = len(unseen) + sum(not row.heldout for row in corpus)
    with pytest.raises(StoreError, match=rf"lacks 5 of the {training} sequences .*{unseen[0].digest}.*stillroom teach"):
        stream(manifest, snapshot)
    stream(manifest, snapshot, heldout=True)  # what is missing is not of this split
    stream(manifest, None)


def test_a_store_with_nothing_committed_lacks_everything(tmp_path: Path, corpus: list[ManifestRow]) -> None:
    manifest = tiny_manifest(tmp_path / "m.parquet", corpus)
    store = tiny_store(tmp_path / "s", [])
    with pytest.raises(StoreError, match=r"lacks (\d+) of the \1 sequences"):
        stream(manifest, store.snapshot())


def test_a_window_too_small_is_told_with_the_one_needed(manifest: Manifest, snapshot: Snapshot) -> None:
    longest = int(manifest.index().tokens.max())
    with pytest.raises(UsageError, match=rf"{longest} tokens does not fit .* {longest - 1}: .* at least {longest}"):
        stream(manifest, snapshot, window=longest - 1)
    list(stream(manifest, snapshot, window=longest))


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    sequences = random_sequences(np.random.default_rng(0), 3)
    manifest = tiny_manifest(tmp_path / "m.parquet", sequences)
    with pytest.raises(StoreError, match="no sequences in its held-out split"):
        stream(manifest, None, heldout=True)


def test_another_tokenizer_is_refused_with_both_digests(tmp_path: Path, snapshot: Snapshot) -> None:
    sequences = random_sequences(np.random.default_rng(0), 3)
    manifest = tiny_manifest(tmp_path / "m.parquet", sequences, tokenizer="ee" * 16)
    with pytest.raises(IdentityMismatch) as caught:
        stream(manifest, snapshot)
    assert "ee" * 16 in str(caught.value)
    assert snapshot.identity.tokenizer in str(caught.value)


def test_one_token_sequences_train_nothing_and_break_nothing(tmp_path: Path) -> None:
    sequences = [Sequence(np.array([n], np.int32)) for n in range(3)]
    manifest = tiny_manifest(tmp_path / "m.parquet", sequences)
    store = tiny_store(tmp_path / "s", sequences)
    for source in (store.snapshot(), None):
        for pack in (True, False):
            packs = list(stream(manifest, source, pack=pack))
            assert sum(len(p.sequences) for p in packs) == 3
            assert all(len(p.positions) == len(p.labels) == len(p.weights) == 0 for p in packs)
            if source is not None:
                topks = [p.signal.topk for p in packs if p.signal is not None]
                assert [topk.ids.shape for topk in topks if topk is not None] == [(0, 4)] * len(packs)


def test_a_sequence_in_two_units_is_served_once(tmp_path: Path) -> None:
    """Two plans may have scored it twice; the older one serves it, for everybody."""
    sequences = random_sequences(np.random.default_rng(0), 6)
    store = tiny_store(tmp_path / "s", sequences, per_unit=3)
    again = [sequences[5], sequences[0]]
    store.save_plan([unit_of(again)])
    store.commit([write_unit(store, again)])
    manifest = tiny_manifest(tmp_path / "m.parquet", sequences)
    packs = list(stream(manifest, store.snapshot()))
    assert sorted(d for p in packs for d in p.sequences) == sorted(s.digest for s in sequences)


def test_hard_labels_give_the_same_rows_as_the_signal_does(manifest: Manifest, snapshot: Snapshot) -> None:
    """One sequence a pack, so that packs can be compared: ids, labels and weights agree, the order may not."""

    def rows(source: Snapshot | None) -> Counter[tuple[bytes, ...]]:
        return Counter(
            (p.input_ids.tobytes(), p.positions.tobytes(), p.labels.tobytes(), p.weights.tobytes())
            for p in stream(manifest, source, pack=False)
        )

    assert rows(snapshot) == rows(None)
