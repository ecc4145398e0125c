"""records.py: parts of a signal side by side, and what a store keeps as a spec that JSON can hold."""

import json

import numpy as np
import pytest

from stillroom.storage.records import (
    HiddenSpec,
    NucleusSpec,
    Sampled,
    SampledSpec,
    Signal,
    SignalSpec,
    TopK,
    TopKSpec,
)
from tests.strategies import nucleus_of, ragged_topk_of, random_logits, random_topk, sampled_of


def logits(seed: int, rows: int) -> np.ndarray:
    return random_logits(np.random.default_rng(seed), rows, 40)


def ragged(seed: int, *counts: int) -> TopK:
    return ragged_topk_of(logits(seed, len(counts)), np.array(counts, np.int32))


def assert_equal(one: TopK, other: TopK) -> None:
    for name in ("ids", "logits", "tail_lse"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.kept, other.kept)
    assert (one.counts is None) == (other.counts is None)


class TestTopK:
    def test_blocks_of_different_widths_are_filled_up_to_the_widest(self) -> None:
        narrow, wide = ragged(0, 1, 2), ragged(1, 5, 3, 1)
        whole = TopK.concatenate([narrow, wide])
        assert whole.counts is not None
        assert whole.counts.tolist() == [1, 2, 5, 3, 1]
        assert [str(a.dtype) for a in (whole.ids, whole.logits, whole.counts)] == ["int32", "float32", "int32"]
        assert whole.ids.shape == whole.logits.shape == (5, 5)
        unused = np.arange(5) >= whole.counts[:, None]
        assert (whole.ids[unused] == -1).all()
        assert (whole.logits[unused] == -np.inf).all()
        assert_equal(whole, ragged_topk_of(np.concatenate([logits(0, 2), logits(1, 3)]), whole.counts))

    def test_beside_a_nucleus_a_plain_block_keeps_all_its_ids(self) -> None:
        plain, cut = random_topk(np.random.default_rng(3), 2, 4, 40), ragged(4, 2)
        whole = TopK.concatenate([plain, cut])
        assert whole.counts is not None
        assert whole.counts.tolist() == [4, 4, 2]
        assert_equal(TopK(whole.ids[:2], whole.logits[:2], whole.tail_lse[:2]), plain)

    def test_plain_blocks_have_no_counts(self) -> None:
        blocks = [random_topk(np.random.default_rng(seed), 3, 4, 40) for seed in range(2)]
        whole = TopK.concatenate(blocks)
        assert whole.counts is None
        assert whole.kept.tolist() == [4] * 6
        assert_equal(whole[3:], blocks[1])

    @pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 0), np.array([2, 0]), np.array([], np.int64)])
    def test_rows_take_their_counts_along(self, rows: slice | np.ndarray) -> None:
        block = ragged(5, 2, 4, 1)
        part = block[rows]
        assert block.counts is not None
        assert part.counts is not None
        assert part.counts.tolist() == block.counts[rows].tolist()
        assert part.ids.tolist() == block.ids[rows].tolist()
        assert part.tail_lse.tolist() == block.tail_lse[rows].tolist()
        assert len(part) == len(part.counts)

    def test_pieces_put_together_are_the_block(self) -> None:
        block = nucleus_of(logits(6, 9), 12, 0.8)
        assert_equal(TopK.concatenate([block[:2], block[2:2], block[2:5], block[5:]]), block)


class TestSignal:
    @pytest.fixture
    def signal(self) -> Signal:
        rng, z = np.random.default_rng(7), logits(7, 6)
        return Signal(nucleus_of(z, 8, 0.9), sampled_of(rng, z, 9), rng.normal(size=(6, 5)).astype(np.float32))

    def test_all_parts_are_cut_and_put_together_row_by_row(self, signal: Signal) -> None:
        assert signal.topk is not None
        assert signal.sampled is not None
        assert signal.hidden is not None
        pieces = [signal[:1], signal[np.array([1, 2])], signal[3:]]
        assert [len(piece) for piece in pieces] == [1, 2, 3]
        whole = Signal.concatenate(pieces)
        assert whole.topk is not None
        assert whole.sampled is not None
        assert_equal(whole.topk, signal.topk)
        np.testing.assert_array_equal(whole.sampled.ids, signal.sampled.ids)
        np.testing.assert_array_equal(whole.sampled.counts, signal.sampled.counts)
        np.testing.assert_array_equal(whole.hidden, signal.hidden)
        swapped = signal[np.array([4, 0])]
        np.testing.assert_array_equal(swapped.hidden, signal.hidden[[4, 0]])
        assert swapped.sampled is not None
        np.testing.assert_array_equal(swapped.sampled.ids, signal.sampled.ids[[4, 0]])

    @pytest.mark.parametrize("part", ["topk", "sampled", "hidden"])
    def test_one_part_is_a_signal(self, signal: Signal, part: str) -> None:
        alone = Signal(**{part: getattr(signal, part)})
        whole = Signal.concatenate([alone[:4], alone[4:]])
        assert len(alone) == len(whole) == 6
        assert [name for name in ("topk", "sampled", "hidden") if getattr(whole, name) is not None] == [part]

    def test_draws_of_different_widths_are_filled_up_to_the_widest(self) -> None:
        one, two = Sampled(*_pair([[3]], [[9]])), Sampled(*_pair([[1, 7]], [[4, 5]]))
        whole = Sampled.concatenate([one, two])
        assert whole.ids.tolist() == [[3, -1], [1, 7]]
        assert whole.counts.tolist() == [[9, 0], [4, 5]]
        assert whole.ids.dtype == whole.counts.dtype == np.int32

    def test_blocks_of_different_signals_are_a_bug(self, signal: Signal) -> None:
        with pytest.raises(AssertionError, match="different signals"):
            Signal.concatenate([signal, Signal(signal.topk)])


def _pair(*parts: list[list[int]]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(part, np.int32) for part in parts)


#: Spec, its dictionary as identity.json has it, and its words.
SPECS = [
    (
        SignalSpec(TopKSpec(64)),
        {"topk": {"k": 64, "gap_step": 0.125, "layout": "plain"}},
        "top-64 (1/8 nat)",
    ),
    (
        SignalSpec(TopKSpec(8, None)),
        {"topk": {"k": 8, "gap_step": None, "layout": "plain"}},
        "top-8 (float32)",
    ),
    (
        SignalSpec(TopKSpec(50, 1 / 16, NucleusSpec(0.98), "packed")),
        {
            "topk": {
                "k": 50,
                "gap_step": 0.0625,
                "nucleus": {"mass": 0.98, "temperature": 1.0},
                "layout": "packed",
            }
        },
        "top-50 (1/16 nat, nucleus 0.98, packed)",
    ),
    (SignalSpec(TopKSpec(8, 0.1)), {"topk": {"k": 8, "gap_step": 0.1, "layout": "plain"}}, "top-8 (0.1 nat)"),
    (SignalSpec(sampled=SampledSpec(50)), {"sampled": {"draws": 50}}, "50 draws"),
    (
        SignalSpec(hidden=HiddenSpec(576, "bfloat16")),
        {"hidden": {"width": 576, "dtype": "bfloat16"}},
        "hidden bfloat16 (576)",
    ),
    (
        SignalSpec(TopKSpec(64), SampledSpec(12), HiddenSpec(576, "int8", "ab" * 32)),
        {
            "topk": {"k": 64, "gap_step": 0.125, "layout": "plain"},
            "sampled": {"draws": 12},
            "hidden": {"width": 576, "dtype": "int8", "calibration": "ab" * 32},
        },
        "top-64 (1/8 nat) + 12 draws + hidden int8 (576)",
    ),
]


class TestSignalSpec:
    @pytest.mark.parametrize(("spec", "fields", "words"), SPECS, ids=[words for _, _, words in SPECS])
    def test_as_json_and_back(self, spec: SignalSpec, fields: dict[str, object], words: str) -> None:
        assert spec.as_dict() == fields
        assert SignalSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
        assert spec.in_words() == words

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"k": 4, "gap_step": 0.125},
            {"topk": {"k": 4}, "logits": {}},
            {"topk": {"k": 4, "gap": 1}},
            {"topk": {"gap_step": 0.125}},
            {"topk": {"k": 4, "nucleus": {"share": 0.9}}},
            {"topk": None},
            {"sampled": {"draws": 4, "temperature": 2}},
            {"hidden": {"width": 4}},
        ],
    )
    def test_fields_that_no_part_has_are_refused(self, fields: dict[str, object]) -> None:
        with pytest.raises(TypeError):
            SignalSpec.from_dict(fields)

    def test_the_dictionary_given_is_left_alone(self) -> None:
        fields = {"topk": {"k": 4, "nucleus": {"mass": 0.5, "temperature": 2.0}}}
        SignalSpec.from_dict(fields)
        assert fields == {"topk": {"k": 4, "nucleus": {"mass": 0.5, "temperature": 2.0}}}
