"""truth.py, sample.py: the fidelity sample is chosen by content, kept whole, and never read wrong."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import CorruptShard, StillroomError
from stillroom.storage.fidelity.sample import LIMIT, PER_SEQUENCE, SEQUENCES, choose
from stillroom.storage.fidelity.truth import (
    FOLDER,
    Truth,
    read_positions,
    read_truth,
    truth_blocks,
    truth_bytes,
    write_truth,
)
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.records import Unit, digest128
from tests.strategies import tiny_identity

IDENTITY = tiny_identity()
V = IDENTITY.vocabulary

#: Chosen of three sequences, ten wanted.
PINNED = {
    "6e251853d85ebdb05f9ccaa7d2767317": (8, 12, 18, 19, 20, 21, 24, 26),
    "9948dce1f43708da1614b7619d5d9ec7": (4, 12),
}


def digest_of(number: int) -> str:
    return digest128(str(number).encode())


def unit_of(numbers: list[int], *, tokens: int = 30, context: int = 5) -> Unit:
    count = len(numbers)
    return Unit(tuple(digest_of(n) for n in numbers), (tokens,) * count, (context,) * count)


def truth_of(unit: Unit, per_sequence: int = 3, *, seed: int = 0, every: int = 2) -> Truth:
    """Random logits at the first rows of each sequence, in no order; every second one scored alone too."""
    rng = np.random.default_rng(seed)
    keys = [
        (sequence, tokens - rows + place)
        for sequence, tokens, rows in zip(unit.sequences, unit.tokens, unit.rows, strict=True)
        for place in range(min(per_sequence, rows))
    ]
    keys = [keys[i] for i in rng.permutation(len(keys))]
    alone_rows = np.arange(0, len(keys), every)
    logits = rng.normal(size=(len(keys), V)).astype(np.float32)
    alone = logits[alone_rows] + rng.normal(size=(len(alone_rows), V)).astype(np.float32)
    return Truth(tuple(k[0] for k in keys), np.array([k[1] for k in keys], np.int32), logits, alone, alone_rows)


def as_dict(truth: Truth) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    seconds = {int(row): truth.alone[i].tobytes() for i, row in enumerate(truth.alone_rows)}
    return {key: (truth.logits[row].tobytes(), seconds.get(row, b"")) for row, key in enumerate(truth.keys)}


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path)


# ---- which positions -----------------------------------------------------------------------------------------------

corpora = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda tc: (tc[0], min(tc[1], tc[0] - 1))),
    min_size=8,
    max_size=60,
)
#: Few enough to run out often.
amounts = st.integers(0, 60) | st.just(LIMIT)


def units_over(corpus: list[tuple[int, int]], order: list[int], per_unit: int) -> list[Unit]:
    parts = [order[at : at + per_unit] for at in range(0, len(order), per_unit)]
    return [
        Unit(tuple(digest_of(n) for n in part), tuple(corpus[n][0] for n in part), tuple(corpus[n][1] for n in part))
        for part in parts
    ]


@settings(max_examples=60, deadline=None)
@given(corpora, amounts, st.data())
def test_a_choice_depends_on_nothing_but_the_sequences(
    corpus: list[tuple[int, int]], wanted: int, data: st.DataObject
) -> None:
    order = list(range(len(corpus)))
    chosen = choose(units_over(corpus, order, 7), wanted=wanted)
    other = choose(units_over(corpus, data.draw(st.permutations(order)), 3), wanted=wanted)
    assert chosen == other
    assert sum(map(len, chosen.values())) <= wanted
    assert len(chosen) <= SEQUENCES
    spans = {digest_of(n): (max(context - 1, 0), tokens) for n, (tokens, context) in enumerate(corpus)}
    for sequence, positions in chosen.items():
        first, tokens = spans[sequence]
        assert list(positions) == sorted(set(positions))
        assert 1 <= len(positions) <= min(PER_SEQUENCE, tokens - first)
        assert all(first <= t < tokens for t in positions), "only positions whose row is kept"
    rows = sorted((min(PER_SEQUENCE, tokens - first) for first, tokens in spans.values()), reverse=True)
    if len(spans) <= SEQUENCES:
        assert sum(map(len, chosen.values())) == min(wanted, sum(rows)), "no room is left unused"


@settings(max_examples=60, deadline=None)
@given(corpora, amounts, st.data())
def test_a_resumed_run_chooses_what_it_would_have_chosen(
    corpus: list[tuple[int, int]], wanted: int, data: st.DataObject
) -> None:
    """Some units are committed, with their truth; the rest is chosen from again."""
    units = units_over(corpus, list(range(len(corpus))), 4)
    whole = choose(units, wanted=wanted)
    done = data.draw(st.sets(st.integers(0, len(units) - 1)))
    held = {s: whole[s] for i in done for s in units[i].sequences if s in whole}
    left = choose([unit for i, unit in enumerate(units) if i not in done], wanted=wanted, held=held)
    if sum(map(len, whole.values())) == wanted or len(corpus) <= SEQUENCES:
        assert {s: len(p) for s, p in {**held, **left}.items()} == {s: len(p) for s, p in whole.items()}
    assert not held.keys() & left.keys()
    assert sum(map(len, held.values())) + sum(map(len, left.values())) <= wanted


def test_growth_never_passes_the_limit_and_keeps_what_is_held() -> None:
    held: dict[str, tuple[int, ...]] = {}
    for at in range(0, 200, 10):
        new = choose([unit_of(list(range(at, at + 10)))], held=held)
        assert not new.keys() & held.keys()
        held |= new
    assert sum(map(len, held.values())) == LIMIT
    assert len(held) == SEQUENCES
    assert held.keys() == {digest_of(n) for n in range(40)} & held.keys(), "the first sequences fill a growing store"
    assert choose([unit_of(list(range(500, 600)))], held=held) == {}


def test_what_is_held_takes_sequences_and_positions() -> None:
    """Each limit by itself: of 32 sequences where rows are few, of positions where they are not."""
    short = unit_of(list(range(100)), tokens=6, context=5)  # two rows each
    held = choose([unit_of(list(range(50, 70)), tokens=6, context=5)])
    assert (len(held), sum(map(len, held.values()))) == (20, 40)
    assert len(choose([short], held=held)) == SEQUENCES - 20
    held = choose([unit_of([1, 2])], wanted=20)
    assert sum(map(len, held.values())) == 16
    more = choose([unit_of(list(range(50)))], wanted=20, held=held)
    assert sum(map(len, more.values())) == 4


def test_a_choice_is_spread_over_sequences_and_positions() -> None:
    """Units hold sequences sorted by digest: the smallest digests alone would all lie in the first one."""
    numbers = sorted(range(4000), key=digest_of)
    units = [unit_of(numbers[at : at + 100], tokens=1000, context=0) for at in range(0, 4000, 100)]
    chosen = choose(units)
    touched = sum(any(s in chosen for s in unit.sequences) for unit in units)
    assert touched > 15
    positions = np.array([t for p in chosen.values() for t in p])
    assert abs(positions.mean() - 500) < 60
    assert len(set(positions.tolist())) > 200, "not the same positions in every sequence"


def test_a_choice_is_pinned() -> None:
    """It may not move between releases: a resumed run would score other positions than it began with."""
    assert choose([unit_of([1, 2, 3])], wanted=10) == PINNED


@pytest.mark.parametrize("wanted", [-1, LIMIT + 1])
def test_more_than_a_store_keeps_is_refused(wanted: int) -> None:
    with pytest.raises(ValueError, match="0 … 256"):
        choose([unit_of([1])], wanted=wanted)


def test_nothing_to_choose_from() -> None:
    assert choose([]) == {}
    assert choose([unit_of([1])], wanted=0) == {}


# ---- the files -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 2, 1000]), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sequences: int, per_sequence: int, every: int, seed: int
) -> None:
    files = LocalFiles(tmp_path_factory.mktemp("truth"))
    unit = unit_of(list(range(sequences)))
    truth = truth_of(unit, per_sequence, seed=seed, every=every)
    name = write_truth(files, unit, truth, IDENTITY)
    back = read_truth(files, [unit], IDENTITY)
    assert back is not None
    assert as_dict(back) == as_dict(truth)
    assert back.keys == sorted(truth.keys), "sorted by sequence and position"
    held = read_positions(files, [unit], IDENTITY)
    assert sorted((s, p) for s, positions in held.items() for p in positions) == sorted(truth.keys)
    together, alone, keys = back.twice
    assert len(together) == len(alone) == len(keys) == len(truth.alone_rows)
    assert all(
        as_dict(truth)[key] == (a.tobytes(), b.tobytes()) for key, a, b in zip(keys, together, alone, strict=True)
    )
    assert truth_bytes(files) == (files.root / name).stat().st_size


def test_equal_truth_gives_equal_bytes_under_its_digest(files: LocalFiles, tmp_path: Path) -> None:
    unit = unit_of([1, 2, 3])
    truth = truth_of(unit)
    turned = np.arange(len(truth))[::-1]
    place = {int(row): i for i, row in enumerate(truth.alone_rows)}
    alone_rows = np.array([at for at, row in enumerate(turned) if int(row) in place])
    other = Truth(
        truth.sequences[::-1],
        truth.positions[turned],
        truth.logits[turned],
        truth.alone[[place[int(turned[at])] for at in alone_rows]],
        alone_rows,
    )
    name = write_truth(files, unit, truth, IDENTITY)
    assert name == write_truth(LocalFiles(tmp_path / "b"), unit, other, IDENTITY)
    assert name == f"{FOLDER}/{unit.id}-{sha256_hex(files.read(name))}.parquet"


def test_only_committed_units_count_and_of_two_files_the_smaller_name(files: LocalFiles) -> None:
    one, two, three = unit_of([1]), unit_of([2]), unit_of([3])
    first = [write_truth(files, unit, truth_of(unit), IDENTITY) for unit in (one, two, three)]
    second = write_truth(files, one, truth_of(one, seed=9), IDENTITY)
    back = read_truth(files, [one, two, unit_of([4])], IDENTITY)
    assert back is not None
    expected = as_dict(truth_of(one, seed=0 if first[0] < second else 9)) | as_dict(truth_of(two))
    assert as_dict(back) == expected
    assert truth_bytes(files) == sum((files.root / name).stat().st_size for name in [*first, second])


def test_a_store_without_a_sample(files: LocalFiles) -> None:
    assert read_truth(files, [unit_of([1])], IDENTITY) is None
    assert read_positions(files, [unit_of([1])], IDENTITY) == {}
    assert truth_bytes(files) == 0


def test_blocks_are_small_and_stop_at_the_limit(files: LocalFiles) -> None:
    """Two runs that grow one store at once may leave more than 256 together."""
    units = [unit_of(list(range(at, at + 20))) for at in range(0, 60, 20)]
    for unit in units:
        write_truth(files, unit, truth_of(unit, 8), IDENTITY)
    blocks = list(truth_blocks(files, units, IDENTITY))
    assert {len(block) for block in blocks} == {PER_SEQUENCE}
    assert sum(map(len, blocks)) == LIMIT
    assert len({key for block in blocks for key in block.keys}) == LIMIT
    again = list(truth_blocks(files, units[::-1], IDENTITY))
    assert [block.keys for block in again] == [block.keys for block in blocks], "by name, not by the units' order"


def with_change(truth: Truth, **change: Any) -> Truth:
    return Truth(**{**truth.__dict__, **change})


def nan_at(array: Any, row: int) -> Any:
    array = array.copy()
    array[row, 3] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: with_change(t, logits=t.logits[:, :-1]), "expected"),
        (lambda t: with_change(t, logits=nan_at(t.logits, 1)), "NaN"),
        (lambda t: with_change(t, alone=nan_at(t.alone, 0)), "NaN"),
        (lambda t: with_change(t, logits=t.logits.astype(np.float64)), "float64"),
        (lambda t: with_change(t, positions=t.positions - 4), "rows are 4"),
        (lambda t: with_change(t, positions=t.positions + 26), "rows are 4"),
        (lambda t: with_change(t, sequences=("ff" * 16,) * len(t)), "is not in unit"),
        (lambda t: with_change(t, positions=np.full(len(t), 10, np.int32)), "twice"),
        (lambda t: with_change(t, alone_rows=t.alone_rows * 0), "alone_rows"),
        (lambda t: with_change(t, positions=t.positions[:-1]), "positions for"),
    ],
)
def test_what_would_not_be_read_back_is_not_written(
    files: LocalFiles, change: Callable[[Truth], Truth], message: str
) -> None:
    unit = unit_of([1, 2])
    with pytest.raises(ValueError, match=message):
        write_truth(files, unit, change(truth_of(unit)), IDENTITY)
    assert files.list(FOLDER) == []


# ---- damage and malice ---------------------------------------------------------------------------------------------


def read_all(files: LocalFiles, unit: Unit) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    back = read_truth(files, [unit], IDENTITY)
    assert back is not None
    return as_dict(back)


def test_every_flipped_bit_and_every_cut_is_found(files: LocalFiles) -> None:
    unit = unit_of([1, 2, 3])
    name = write_truth(files, unit, truth_of(unit), IDENTITY)
    data = files.read(name)
    rng = np.random.default_rng(0)
    damaged = [data[:length] for length in rng.choice(len(data), 60, replace=False).tolist()] + [b"", data + b"x"]
    for offset in rng.choice(len(data), 200, replace=False).tolist():
        flipped = bytearray(data)
        flipped[offset] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for broken in damaged:
        files.write(name, broken)
        for read in (read_truth, read_positions):
            with pytest.raises(StillroomError, match=name):
                read(files, [unit], IDENTITY)
    files.write(name, data)
    assert read_all(files, unit) == as_dict(truth_of(unit))


def test_a_renamed_file_is_found(files: LocalFiles) -> None:
    one, two = unit_of([1]), unit_of([2])
    name = write_truth(files, one, truth_of(one), IDENTITY)
    files.write(name.replace(one.id, two.id), files.read(name))
    with pytest.raises(CorruptShard, match=f"{two.id}.*says it is.*{one.id}"):
        read_truth(files, [two], IDENTITY)


def test_a_file_of_another_store_is_found(files: LocalFiles) -> None:
    unit = unit_of([1])
    write_truth(files, unit, truth_of(unit), IDENTITY)
    with pytest.raises(CorruptShard, match="says it is"):
        read_truth(files, [unit], tiny_identity(weights="99" * 16))


def test_other_files_in_the_folder_are_not_read(files: LocalFiles) -> None:
    unit = unit_of([1])
    files.write(f"{FOLDER}/notes.txt", b"hello")
    files.write(f"{FOLDER}/{unit.id}-{'0' * 63}.parquet", b"short name")
    assert read_truth(files, [unit], IDENTITY) is None


def forge(
    files: LocalFiles,
    unit: Unit,
    columns: dict[str, list[Any]],
    *,
    stated: Any = None,
    schema: pa.Schema | None = None,
    rows: int = 8,
) -> None:
    """A file that is whole and rightly named, but made by somebody else."""
    element = pa.list_(pa.field("element", pa.float32(), nullable=False))
    schema = schema or pa.schema(
        [
            pa.field("sequence", pa.string(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("logits", element, nullable=False),
            pa.field("alone", element, nullable=False),
        ]
    )
    if stated is None:
        stated = json.dumps({"truth": 1, "unit": unit.id, "identity": IDENTITY.id, "vocabulary": V})
    sink = io.BytesIO()
    table = pa.table(columns, schema=schema).replace_schema_metadata({"stillroom": stated})
    pq.write_table(table, sink, row_group_size=rows, compression="zstd")
    files.write(f"{FOLDER}/{unit.id}-{sha256_hex(sink.getvalue())}.parquet", sink.getvalue())


def honest(unit: Unit, count: int = 4) -> dict[str, list[Any]]:
    return {
        "sequence": [unit.sequences[0]] * count,
        "position": list(range(4, 4 + count)),
        "logits": [[0.5] * V] * count,
        "alone": [[]] * count,
    }


def test_an_honest_forgery_is_read(files: LocalFiles) -> None:
    """Anybody may write such files; what is refused below is refused for its content."""
    unit = unit_of([1])
    forge(files, unit, honest(unit))
    assert len(read_all(files, unit)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[0.5] * V] * 3 + [[0.5] * (V - 1)]}, "expected 40"),
        ({"logits": [[0.5] * (V + 1), [0.5] * (V - 1), [0.5] * V, [0.5] * V]}, "expected 40"),
        ({"logits": [[]] * 4}, "expected 40"),
        ({"alone": [[0.5] * V] * 3 + [[0.5]]}, "expected 40"),
        ({"logits": [[float("nan")] * V] * 4}, "NaN"),
        ({"alone": [[float("inf")] * V] * 4}, "NaN or infinite"),
        ({"position": [3, 4, 5, 6]}, "position 3 of sequence"),
        ({"position": [27, 28, 29, 30]}, "position 30 of sequence"),
        ({"position": [-1, 4, 5, 6]}, "position -1"),
        ({"position": [4, 4, 5, 6]}, "twice"),
        ({"sequence": ["x" * 5000] * 4}, "is not in unit"),
        ({"logits": [[0.5] * 200_000] * 4}, "800,000 values"),
        ({"sequence": ["y" * 10**6] * 4}, "bytes in a row group"),
    ],
)
def test_hostile_content_is_refused(files: LocalFiles, change: dict[str, list[Any]], message: str) -> None:
    unit = unit_of([1])
    forge(files, unit, honest(unit) | change)
    with pytest.raises(CorruptShard, match=rf"{FOLDER}/{unit.id}.*{message}") as caught:
        read_truth(files, [unit], IDENTITY)
    assert len(str(caught.value)) < 700, "a message does not repeat what a stranger put in"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        ({"stated": "{}"}, "says it is"),
        ({"stated": "not json"}, "cannot be read"),
        ({"stated": "[" * 100_000}, "cannot be read"),
        ({"stated": json.dumps(["z" * 10_000])}, "says it is"),
        ({"rows": 100}, "rows in a row group"),
        ({"schema": pa.schema([("sequence", pa.string()), ("position", pa.int32())])}, "other columns"),
    ],
)
def test_hostile_files_are_refused(files: LocalFiles, forgery: dict[str, Any], message: str) -> None:
    unit = unit_of([1])
    columns = honest(unit, 20)
    if "schema" in forgery:
        columns = {name: columns[name] for name in ("sequence", "position")}
    forge(files, unit, columns, **forgery)
    for read in (read_truth, read_positions):
        with pytest.raises(CorruptShard, match=rf"{FOLDER}/{unit.id}.*{message}") as caught:
            read(files, [unit], IDENTITY)
        assert len(str(caught.value)) < 900


def test_too_many_rows_are_refused(files: LocalFiles) -> None:
    unit = unit_of([1], tokens=400)
    forge(files, unit, honest(unit, LIMIT + 1))
    with pytest.raises(CorruptShard, match="257 rows, expected 1 … 256"):
        read_truth(files, [unit], IDENTITY)


def test_no_rows_are_refused(files: LocalFiles) -> None:
    unit = unit_of([1])
    forge(files, unit, honest(unit, 0))
    with pytest.raises(CorruptShard, match="0 rows"):
        read_truth(files, [unit], IDENTITY)


def test_a_huge_file_is_refused_unread(files: LocalFiles) -> None:
    unit = unit_of([1])
    name = f"{FOLDER}/{unit.id}-{'0' * 64}.parquet"
    files.write(name, b"x")
    with (files.root / name).open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CorruptShard, match=r"has 1,099,511,627,776 bytes"):
        read_truth(files, [unit], IDENTITY)
