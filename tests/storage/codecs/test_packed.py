"""codecs/packed.py: the plain codec's block to the bit, smaller, and nothing but ValueError for damaged bytes."""

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.codecs.entropy import CLASSES, Model, Reader, Writer, class_range, classify
from stillroom.storage.codecs.packed import PackedCodec, canonical
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import BETAS, NucleusSpec, TopK, TopKSpec
from tests.strategies import columns_of, ragged_topk_of, random_logits, random_topk, round_trip, topk_of

STEPS = (1 / 8, 1 / 16, None)


def assert_same(found: TopK, expected: TopK) -> None:
    for name in ("ids", "logits", "tail_lse", "counts"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            assert a.tobytes() == b.tobytes(), name


def assert_as_plain(spec: TopKSpec, vocabulary: int, block: TopK, rows: Any = None) -> None:
    """What packed gives back is what plain gives back, ties by rising id."""
    plain = round_trip(TopKCodec(spec, vocabulary), block, rows)
    assert_same(round_trip(PackedCodec(spec, vocabulary), block, rows), canonical(plain, spec.gap_step))


def speech(rng: np.random.Generator, rows: int, k: int, vocabulary: int) -> TopK:
    """Skewed as teachers are: a few hundred kinds of position, likely ids among the low ones, noise on top."""
    kinds = rng.normal(0, 2, (40, vocabulary)) - 1.5 * np.log(np.arange(1, vocabulary + 1))
    noisy = kinds[rng.integers(0, len(kinds), rows)] + rng.normal(0, 0.7, (rows, vocabulary))
    return topk_of(noisy.astype(np.float32), k)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_it_gives_back_what_the_plain_codec_does(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([2, 3, 17, 40, 300]))
    k = data.draw(st.integers(1, min(vocabulary - 1, 24)))
    rows = np.array(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)), np.int64)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = random_logits(rng, int(rows.sum()), vocabulary, spread=data.draw(st.sampled_from([0.05, 1.0, 30.0])))
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    nucleus = data.draw(st.sampled_from([None, NucleusSpec(0.9)]))
    spec = TopKSpec(k, data.draw(st.sampled_from(STEPS)), nucleus, "packed")
    counts = rng.integers(1, k + 1, len(logits)).astype(np.int32)
    block = ragged_topk_of(logits, counts) if nucleus else topk_of(logits, k)
    assert_as_plain(spec, vocabulary, block, rows)


@pytest.mark.parametrize("step", STEPS)
def test_many_batches_of_positions_that_resemble_each_other(step: float | None) -> None:
    block = speech(np.random.default_rng(1), 400, 16, 500)
    assert_as_plain(TopKSpec(16, step), 500, block, np.array([150, 0, 250]))


def test_it_is_smaller_than_plain_columns_under_zstd() -> None:
    block = speech(np.random.default_rng(2), 600, 32, 2000)
    spec, rows = TopKSpec(32, 1 / 8), np.array([600])
    packed = sum(array.nbytes for array in columns_of(PackedCodec(spec, 2000), block, rows).values())
    plain = sum(
        len(pa.compress(array.values.buffers()[1], codec="zstd", asbytes=True))
        for array in columns_of(TopKCodec(spec, 2000), block, rows).values()
    )
    assert packed < 0.6 * plain


def test_equal_blocks_give_equal_bytes() -> None:
    spec = TopKSpec(8, 1 / 8)
    one, two = (columns_of(PackedCodec(spec, 300), speech(np.random.default_rng(3), 90, 8, 300)) for _ in range(2))
    assert one["topk_packed"].equals(two["topk_packed"])


def test_the_order_of_ties_is_not_kept() -> None:
    """Two orders of ids whose gaps round to the same code are one block."""
    spec, codec = TopKSpec(3, 1 / 8), PackedCodec(TopKSpec(3, 1 / 8), 40)
    tail = np.zeros((1, len(BETAS)), np.float32)
    blocks = [
        TopK(np.array([ids], np.int32), np.array([[5, 3.01, 3.0]], np.float32), tail) for ids in ([7, 9, 2], [7, 2, 9])
    ]
    assert columns_of(codec, blocks[0])["topk_packed"].equals(columns_of(codec, blocks[1])["topk_packed"])
    assert round_trip(codec, blocks[0]).ids.tolist() == [[7, 2, 9]]
    assert canonical(blocks[0], spec.gap_step).ids.tolist() == [[7, 2, 9]]
    assert canonical(blocks[0], None).ids.tolist() == [[7, 9, 2]]


def test_gaps_as_wide_as_their_types() -> None:
    block = random_topk(np.random.default_rng(4), 30, 4, 60)
    logits = block.logits.copy()
    logits[::3, 3] = logits[::3, 0] - np.float32(32767 / 8)
    assert_as_plain(TopKSpec(4, 1 / 8), 60, TopK(block.ids, logits, block.tail_lse))
    logits[::3, 3] = -1e38
    assert_as_plain(TopKSpec(4, None), 60, TopK(block.ids, logits, block.tail_lse))


def test_tails_far_from_any_curve() -> None:
    block = random_topk(np.random.default_rng(5), 30, 4, 60)
    tail = np.random.default_rng(6).uniform(-2e5, 2e5, block.tail_lse.shape).astype(np.float32)
    assert_as_plain(TopKSpec(4, 1 / 8), 60, TopK(block.ids, block.logits, tail))


def test_ids_above_two_to_the_seventeenth() -> None:
    rng, vocabulary = np.random.default_rng(7), 262_144
    ids = np.stack([rng.choice(vocabulary, 5, replace=False) for _ in range(60)]).astype(np.int32)
    logits = -np.sort(-rng.normal(0, 5, (60, 5)).astype(np.float32), axis=1)
    block = TopK(ids, logits, np.zeros((60, len(BETAS)), np.float32))
    assert_as_plain(TopKSpec(5, 1 / 8), vocabulary, block)


@pytest.mark.parametrize("rows", [[], [0], [0, 0], [0, 1, 0]])
def test_few_positions_or_none(rows: list[int]) -> None:
    block = random_topk(np.random.default_rng(8), sum(rows), 4, 40)
    assert_as_plain(TopKSpec(4, 1 / 8), 40, block, np.array(rows, np.int64))


def test_it_refuses_what_the_plain_codec_refuses() -> None:
    block = random_topk(np.random.default_rng(9), 5, 4, 40)
    ids = block.ids.copy()
    ids[3, 1] = 40
    with pytest.raises(ValueError, match="row 3 is not 4 distinct ids below 40"):
        columns_of(PackedCodec(TopKSpec(4, 1 / 8), 40), TopK(ids, block.logits, block.tail_lse))
    with pytest.raises(ValueError, match="k=40 of a vocabulary of 40"):
        PackedCodec(TopKSpec(40, 1 / 8), 40)


VICTIMS = [
    (TopKSpec(6, 1 / 8), 70),
    (TopKSpec(6, None), 70),
    (TopKSpec(6, 1 / 8, NucleusSpec(0.9)), 70),
]


@lru_cache
def _victim(spec: TopKSpec, vocabulary: int) -> bytes:
    rng = np.random.default_rng(10)
    logits = random_logits(rng, 60, vocabulary)
    counts = rng.integers(1, 7, 60).astype(np.int32)
    block = ragged_topk_of(logits, counts) if spec.nucleus else topk_of(logits, 6)
    return bytes(columns_of(PackedCodec(spec, vocabulary), block)["topk_packed"][0].as_py())


def _read(spec: TopKSpec, vocabulary: int, data: bytes, rows: int = 60) -> TopK:
    return PackedCodec(spec, vocabulary).decode({"topk_packed": pa.array([data], pa.binary())}, np.array([rows]))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_make_a_block_of_the_contract(data: st.DataObject) -> None:
    spec, vocabulary = data.draw(st.sampled_from(VICTIMS))
    packed = bytearray(_victim(spec, vocabulary))
    how = data.draw(st.sampled_from(["change", "cut", "extend", "random", "weights"]))
    if how == "cut":
        packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    elif how == "extend":
        packed += data.draw(st.binary(min_size=1, max_size=9))
    elif how == "random":
        noise = np.random.default_rng(data.draw(st.integers(0, 2**32))).bytes(data.draw(st.integers(0, 3000)))
        packed = packed[: data.draw(st.sampled_from([0, 1, 261, 277]))] + noise
    else:
        last = 260 if how == "weights" else len(packed) - 1
        for at in data.draw(st.lists(st.integers(1, last), min_size=1, max_size=8)):
            packed[at] = data.draw(st.integers(0, 255))
    rows = data.draw(st.sampled_from([60, 60, 60, 59, 61, 1]))
    try:
        block = _read(spec, vocabulary, bytes(packed), rows)
    except ValueError:
        return
    assert len(block) == rows
    columns_of(TopKCodec(spec, vocabulary), TopK(block.ids, block.logits, np.zeros_like(block.tail_lse), block.counts))


@pytest.mark.parametrize("change", [b"", b"\x02", b"\x01" + bytes(300)])
def test_bytes_of_no_writer_are_refused(change: bytes) -> None:
    with pytest.raises(ValueError, match="packed data"):
        _read(TopKSpec(6, 1 / 8), 70, change)


def test_bytes_where_none_belong_are_refused() -> None:
    codec, packed = PackedCodec(TopKSpec(6, 1 / 8), 70), _victim(*VICTIMS[0])
    for values, rows in (([packed, b"x"], [60, 0]), ([packed], [0]), ([b"", packed], [60, 0])):
        with pytest.raises(ValueError, match="packed"):
            codec.decode({"topk_packed": pa.array(values, pa.binary())}, np.array(rows))
    with pytest.raises(ValueError, match="has 2 values, expected 1"):
        codec.decode({"topk_packed": pa.array([packed, b""], pa.binary())}, np.array([60]))


def test_classes_cover_every_number_once() -> None:
    powers = 2 ** np.arange(42)
    numbers = np.concatenate([np.arange(5000), powers, powers - 1, powers + 1])
    classes, widths, rest = classify(numbers)
    lowest, same_widths = class_range(classes)
    assert np.array_equal(lowest + rest, numbers)
    assert np.array_equal(widths, same_widths)
    assert classes.max() < CLASSES


def test_the_coder_comes_within_a_percent_of_the_entropy() -> None:
    symbols = np.random.default_rng(11).geometric(0.3, 100_000).clip(max=15).astype(np.int64)
    contexts = np.zeros(1000, np.int64)
    writer, model = Writer(64), Model(contexts[:1], 16)
    for part in symbols.reshape(-1, 1000):
        writer.symbols(model, contexts, part)
        writer.learn()
    data = writer.finish()
    share = np.bincount(symbols) / len(symbols)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8
    assert len(data) < 1.01 * entropy * len(symbols)
    reader, model = Reader(memoryview(data), 64), Model(contexts[:1], 16)
    back = []
    for _ in range(100):
        back.append(reader.symbols(model, contexts, None))
        reader.learn()
    reader.finish()
    assert np.array_equal(np.concatenate(back), symbols)
