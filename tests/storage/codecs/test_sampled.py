"""codecs/sampled.py: what comes back from the file, what is never let into it, and the keys of the draws. No torch."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillroom.storage.codecs.sampled import MOST_DRAWS, SampledCodec, position_keys
from stillroom.storage.records import Sampled, SampledSpec, Sequence

CODEC = SampledCodec(SampledSpec(10), 40)


def random_sampled(rng: np.random.Generator, rows: int, draws: int, vocabulary: int) -> Sampled:
    """Independent draws from a few likely ids: any block that the contract allows may come out."""
    blocks = []
    for _ in range(rows):
        support = rng.integers(0, vocabulary, rng.integers(1, draws + 2))
        ids, counts = np.unique(rng.choice(support, draws), return_counts=True)
        blocks.append(Sampled(ids[None].astype(np.int32), counts[None].astype(np.int32)))
    return Sampled.concatenate(blocks)


def block_of(*rows: dict[int, int]) -> Sampled:
    """Rows as {id: count}, padded to the widest."""
    width = max(map(len, rows))
    ids = [[*row] + [-1] * (width - len(row)) for row in rows]
    counts = [[*row.values()] + [0] * (width - len(row)) for row in rows]
    return Sampled(np.array(ids, dtype=np.int32), np.array(counts, dtype=np.int32))


def columns_of(codec: SampledCodec, block: Sampled, rows: NDArray[np.int64]) -> dict[str, pa.Array]:
    return {field.name: a for field, a in zip(codec.fields(), codec.encode(block, rows), strict=True)}


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    draws=st.sampled_from([1, 2, 50, MOST_DRAWS]),
    vocabulary=st.sampled_from([1, 2, 40, 262_144]),
    lengths=st.lists(st.integers(0, 5), max_size=5),
)
def test_round_trip_through_parquet(seed: int, draws: int, vocabulary: int, lengths: list[int]) -> None:
    rows = np.array([*lengths, 1], dtype=np.int64)
    rng = np.random.default_rng(seed)
    if draws == MOST_DRAWS and vocabulary > 40:
        vocabulary = 40  # rows of 30,000 ids each are no more of a test
    block = random_sampled(rng, int(rows.sum()), draws, vocabulary)
    codec = SampledCodec(SampledSpec(draws), vocabulary)
    table = pa.Table.from_arrays(codec.encode(block, rows), schema=pa.schema(codec.fields()))
    file = io.BytesIO()
    pq.write_table(table, file, use_dictionary=False, column_encoding=codec.encodings())
    read = pq.read_table(file).combine_chunks()
    back = codec.decode({name: read[name].combine_chunks() for name in read.column_names}, rows)
    assert back.ids.dtype == back.counts.dtype == np.int32
    np.testing.assert_array_equal(back.ids, block.ids)
    np.testing.assert_array_equal(back.counts, block.counts)


def test_the_stated_expression_is_the_decoding() -> None:
    """sampled_ids and sampled_draws / N, cut by sampled_count, as FORMAT.md tells other readers."""
    block = block_of({3: 7, 5: 3}, {0: 10}, {1: 1, 2: 2, 39: 7})
    columns = {name: array.to_pylist() for name, array in columns_of(CODEC, block, np.array([2, 1])).items()}
    assert columns["sampled_ids"] == [[3, 5, 0], [1, 2, 39]]
    assert columns["sampled_draws"] == [[7, 3, 10], [1, 2, 7]]
    assert columns["sampled_count"] == [[2, 1], [3]]


def test_a_slice_of_a_longer_column_decodes() -> None:
    """Readers hand over slices whose offsets do not start at 0."""
    block = random_sampled(np.random.default_rng(0), 9, 10, 40)
    rows = np.array([2, 3, 4])
    columns = {name: array[1:] for name, array in columns_of(CODEC, block, rows).items()}
    back = CODEC.decode(columns, rows[1:])
    width = back.ids.shape[1]
    np.testing.assert_array_equal(back.ids, block.ids[2:, :width])
    np.testing.assert_array_equal(back.counts, block.counts[2:, :width])
    assert not block.counts[2:, width:].any()


def test_a_wider_block_than_needed_is_the_same_file() -> None:
    """U is a matter of the batch that a row was drawn in, so it must not show in the bytes."""
    block = block_of({3: 7, 5: 3}, {0: 10})
    wide = Sampled(np.pad(block.ids, ((0, 0), (0, 5)), constant_values=-1), np.pad(block.counts, ((0, 0), (0, 5))))
    rows = np.array([1, 1])
    for narrow_column, wide_column in zip(CODEC.encode(block, rows), CODEC.encode(wide, rows), strict=True):
        assert narrow_column.equals(wide_column)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({5: 5, 3: 5}, "row 1 is not rising ids below 40"),
        ({-2: 5, 3: 5}, "row 1 is not rising ids below 40"),
        ({3: 5, 40: 5}, "row 1 is not rising ids below 40"),
        ({3: 11, 5: -1}, "row 1 is not rising ids below 40 with counts of at least 1"),
        ({3: 5, 5: 4}, "row 1: counts sum to 9, expected 10 draws"),
        ({3: 5, 5: 6}, "row 1: counts sum to 11, expected 10 draws"),
        ({3: 2**31 - 1, 5: 11 - 2**31}, "row 1 is not rising ids below 40 with counts of at least 1"),
        ({3: 0, 5: 10}, "row 1: unused slots are not the last ones"),
        ({3: 10, 5: 0}, "row 1: unused slots are not the last ones"),
        ({-1: 10}, "row 1: unused slots are not the last ones"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_row(row: dict[int, int], message: str) -> None:
    good = {3: 7, 5: 3}
    with pytest.raises(ValueError, match=message):
        CODEC.encode(block_of(good, row, good), np.array([3]))


def test_repeated_ids_empty_rows_and_other_types_are_refused() -> None:
    good = block_of({3: 7, 5: 3}, {1: 4, 2: 6})
    rows = np.array([2])
    repeated = Sampled(np.array([[3, 5], [2, 2]], dtype=np.int32), good.counts)
    with pytest.raises(ValueError, match="row 1 is not rising"):
        CODEC.encode(repeated, rows)
    empty = block_of({3: 7, 5: 3}, {})
    with pytest.raises(ValueError, match="row 1 has no ids"):
        CODEC.encode(empty, rows)
    with pytest.raises(ValueError, match="ids int64 and counts int32"):
        CODEC.encode(Sampled(good.ids.astype(np.int64), good.counts), rows)
    with pytest.raises(ValueError, match="expected both"):
        CODEC.encode(Sampled(good.ids[:, :1], good.counts), rows)


@pytest.mark.parametrize("draws", [0, -1, MOST_DRAWS + 1])
def test_draws_beyond_int16_are_refused(draws: int) -> None:
    with pytest.raises(ValueError, match="expected 1 … 32,767"):
        SampledCodec(SampledSpec(draws), 40)


HOSTILE: dict[str, dict[str, list[list[int]]]] = {
    "one id more": {"sampled_ids": [[1, 2, 3, 4], [9]]},
    "one id less": {"sampled_ids": [[1, 2], [9]]},
    "one count more": {"sampled_draws": [[3, 7, 10, 1], [10]]},
    "one sequence less": {"sampled_draws": [[3, 7, 10]]},
    "a position without ids": {"sampled_count": [[0, 3], [1]]},
    "a negative count of ids": {"sampled_count": [[-1, 4], [1]]},
    "a position more": {"sampled_count": [[1, 1, 1], [1]]},
    "a position less": {"sampled_count": [[3], [1]]},
    "a position of the next sequence": {"sampled_count": [[2], [1, 1]]},
    "more ids than draws": {"sampled_count": [[2, 32_767], [1]]},
    "ids that do not rise": {"sampled_ids": [[2, 1, 3], [9]]},
    "an id beyond the vocabulary": {"sampled_ids": [[1, 2, 3], [40]]},
    "a negative id": {"sampled_ids": [[-1, 2, 3], [9]]},
    "counts that sum to less": {"sampled_draws": [[3, 6, 10], [10]]},
    "counts that sum to more": {"sampled_draws": [[3, 8, 10], [10]]},
    "counts whose sum is N in int16 alone": {
        "sampled_ids": [[1, 2, 3, 4], [9]], "sampled_draws": [[32_767, 32_767, 12, 10], [10]],
        "sampled_count": [[3, 1], [1]],
    },
    "a count of zero": {"sampled_draws": [[10, 0, 10], [10]]},
    "ids shifted to the next position": {"sampled_count": [[1, 2], [1]]},
}  # fmt: skip


@pytest.mark.parametrize("changed", HOSTILE.values(), ids=HOSTILE.keys())
def test_columns_that_cannot_be_are_refused(changed: dict[str, list[list[int]]]) -> None:
    plain = {"sampled_ids": [[1, 2, 3], [9]], "sampled_draws": [[3, 7, 10], [10]], "sampled_count": [[2, 1], [1]]}
    types = {field.name: field.type for field in CODEC.fields()}
    rows = np.array([2, 1])

    def arrays(lists: dict[str, list[list[int]]]) -> dict[str, pa.Array]:
        return {name: pa.array(values, types[name]) for name, values in lists.items()}

    assert CODEC.decode(arrays(plain), rows).ids.tolist() == [[1, 2], [3, -1], [9, -1]]
    with pytest.raises(ValueError, match=r"column|row"):
        CODEC.decode(arrays(plain | changed), rows)


@pytest.mark.parametrize(("count", "found"), [([[0, 3], [1]], "0 … 3"), ([[2, 11], [1]], "1 … 11")])
def test_counts_of_ids_out_of_range_are_named(count: list[list[int]], found: str) -> None:
    columns = columns_of(CODEC, block_of({1: 3, 2: 7}, {3: 10}, {9: 10}), np.array([2, 1]))
    columns["sampled_count"] = pa.array(count, columns["sampled_count"].type)
    with pytest.raises(ValueError, match=f"column sampled_count holds {found}, expected 1 … 10"):
        CODEC.decode(columns, np.array([2, 1]))


def test_no_rows_at_all() -> None:
    nothing = Sampled(np.zeros((0, 1), dtype=np.int32), np.zeros((0, 1), dtype=np.int32))
    rows = np.zeros(2, dtype=np.int64)
    assert len(CODEC.decode(columns_of(CODEC, nothing, rows), rows)) == 0


def test_keys_are_these_numbers_for_ever() -> None:
    """Draws that a store holds are made again by `verify`, years later: worked out apart, in Python's integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    digest, positions = "0123456789abcdeffedcba9876543210", [0, 1, 511, 2**31 - 1]
    base = mix(mix(0x0123456789ABCDEF) ^ 0xFEDCBA9876543210)
    keys = position_keys(digest, np.array(positions))
    assert keys.dtype == np.uint64
    assert keys.tolist() == [mix(base ^ mix(t)) for t in positions]
    assert keys[0] == 15271597333163602083


def test_keys_are_of_the_sequence_and_its_absolute_position_alone() -> None:
    sequence = Sequence(np.arange(20, dtype=np.int32))
    whole = position_keys(sequence.digest, np.arange(20))
    np.testing.assert_array_equal(position_keys(sequence.digest, np.arange(12, 20)), whole[12:])
    np.testing.assert_array_equal(position_keys(sequence.digest, np.array([7, 3])), whole[[7, 3]])
    for other in (Sequence(sequence.input_ids, 3), Sequence(sequence.input_ids[:19]), Sequence(sequence.input_ids[1:])):
        assert not np.isin(position_keys(other.digest, np.arange(20)), whole).any()


def test_keys_are_spread_evenly() -> None:
    """u = key / 2^64 over 64 sequences × 256 positions: each of 64 cells has 256 ± 5 · 16, along positions as along
    sequences, and neighbours are not correlated (|r| < 5 / √n)."""
    rng = np.random.default_rng(0)
    digests = [Sequence(rng.integers(0, 99, 8).astype(np.int32)).digest for _ in range(64)]
    keys = np.stack([position_keys(digest, np.arange(256)) for digest in digests])
    assert len(np.unique(keys)) == keys.size
    u = keys / 2.0**64
    for cells in (u, u * 2**20 % 1):
        counts = np.bincount((cells * 64).astype(int).ravel(), minlength=64)
        assert np.abs(counts - 256).max() <= 5 * 16
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
