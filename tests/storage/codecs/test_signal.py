"""codecs/signal.py: the parts side by side, none of them missing, and how many positions share a row group."""

from dataclasses import replace

import numpy as np
import pytest

from stillroom.storage.codecs.columns import flat
from stillroom.storage.codecs.signal import VALUES_PER_GROUP, SignalCodec, positions_per_group, rows_of
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import (
    PARTS,
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from tests.strategies import columns_of, round_trip, signal_of, tiny_identity

ALL = SignalSpec(
    TopKSpec(4, None, NucleusSpec(0.9)),
    SampledSpec(7),
    HiddenSpec(6, "bfloat16"),
    LayersSpec((0, 3), 6),
    AttentionSpec((1,), 16, dtype="float32"),
)
CODEC = SignalCodec(ALL, 40)


@pytest.fixture
def signal() -> Signal:
    return signal_of(Sequence(np.arange(5, dtype=np.int32)), tiny_identity(signal=ALL))


@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        (SignalSpec(TopKSpec(64)), 4096),
        (SignalSpec(TopKSpec(64, nucleus=NucleusSpec(0.5))), 4096),
        (SignalSpec(TopKSpec(1)), VALUES_PER_GROUP),
        (SignalSpec(TopKSpec(VALUES_PER_GROUP + 1)), 1),
        (SignalSpec(sampled=SampledSpec(50)), VALUES_PER_GROUP // 50),
        (SignalSpec(hidden=HiddenSpec(576, "int8")), 8 * VALUES_PER_GROUP // 576),
        (SignalSpec(TopKSpec(64), SampledSpec(50), HiddenSpec(576, "int8")), 8 * VALUES_PER_GROUP // 576),
        (SignalSpec(TopKSpec(64, layout="packed")), 8 * 4096),
        (SignalSpec(TopKSpec(64, layout="packed"), SampledSpec(50)), 4096),
        (SignalSpec(TopKSpec(64), SampledSpec(90)), VALUES_PER_GROUP // 90),
        (SignalSpec(TopKSpec(64), layers=LayersSpec((0, 4, 8), 576)), 8 * VALUES_PER_GROUP // (3 * 576)),
        (SignalSpec(attention=AttentionSpec((0, 3), 1023)), 8 * VALUES_PER_GROUP // 1024),
        (SignalSpec(attention=AttentionSpec((0, 3), 1023, "per_head", 8)), VALUES_PER_GROUP // 1024),
        (SignalSpec(attention=AttentionSpec(tuple(range(30)), 2**20, "per_head", 64)), 1),
        (SignalSpec(TopKSpec(64, layout="packed"), layers=LayersSpec((1,), 16)), 4096),
    ],
)
def test_a_row_groups_positions_follow_from_the_widest_part(spec: SignalSpec, positions: int) -> None:
    assert positions_per_group(spec) == positions


def test_rows_are_the_positions_from_the_last_of_the_context_on() -> None:
    assert rows_of([5, 5, 5, 1], [0, 1, 4, 0]).tolist() == [5, 5, 2, 1]
    assert rows_of(np.array([5], np.int32), np.array([3], np.int32)).dtype == np.int64


def test_columns_of_all_parts_stand_in_order_and_under_names_of_their_own() -> None:
    names = [field.name for field in CODEC.fields()]
    assert names[:5] == [field.name for field in TopKCodec(TopKSpec(4, None, NucleusSpec(0.9)), 40).fields()]
    assert len(set(names)) == len(names)
    assert {path.partition(".")[0] for path in CODEC.encodings()} <= set(names)
    alone = [SignalCodec(SignalSpec(**{part: getattr(ALL, part)}), 40) for part in PARTS]
    assert [field for codec in alone for field in codec.fields()] == CODEC.fields()


def test_every_part_comes_back_as_its_own_codec_gives_it(signal: Signal) -> None:
    back = round_trip(CODEC, signal, np.array([2, 3]))
    assert len(back) == 5
    for part in PARTS:
        one = SignalSpec(**{part: getattr(ALL, part)})
        alone = getattr(round_trip(SignalCodec(one, 40), Signal(**{part: getattr(signal, part)}), np.array([5])), part)
        for name in ("ids", "logits", "tail_lse", "counts"):
            got, wanted = (getattr(block, name, None) for block in (getattr(back, part), alone))
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                np.testing.assert_array_equal(got, wanted)
    assert back.hidden is not None
    assert signal.hidden is not None
    assert np.abs(back.hidden - signal.hidden).max() <= np.abs(signal.hidden).max() * 2**-8
    assert flat(columns_of(CODEC, signal, np.array([2, 3]))["top_logit"])[1].tolist() == [2, 3]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_refused_by_name(signal: Signal, part: str) -> None:
    with pytest.raises(ValueError, match=f"^{part}: 0 rows, expected 5$"):
        columns_of(CODEC, replace(signal, **{part: None}), np.array([5]))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_too_many_is_refused_by_name(signal: Signal, part: str) -> None:
    """Dropped without a word, it would be missed years later."""
    others = SignalSpec(**{other: getattr(ALL, other) for other in PARTS if other != part})
    with pytest.raises(ValueError, match=f"^{part}: not part of this signal"):
        columns_of(SignalCodec(others, 40), signal, np.array([5]))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_other_rows_is_refused_by_name(signal: Signal, part: str) -> None:
    with pytest.raises(ValueError, match=f"^{part}: 4 rows, expected 5$"):
        columns_of(CODEC, replace(signal, **{part: getattr(signal, part)[:4]}), np.array([5]))


def test_what_a_part_refuses_carries_its_name(signal: Signal) -> None:
    assert signal.topk is not None
    signal.topk.logits[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"^topk: row 3 is not"):
        columns_of(CODEC, signal)


@pytest.mark.parametrize(
    "spec",
    [
        SignalSpec(TopKSpec(40)),
        SignalSpec(TopKSpec(4), SampledSpec(0)),
        SignalSpec(TopKSpec(4), hidden=HiddenSpec(6, "int8")),
    ],
)
def test_a_spec_that_cannot_be_is_refused_before_anything_is_encoded(spec: SignalSpec) -> None:
    with pytest.raises(ValueError, match=r"k=40|draws=0|int8"):
        SignalCodec(spec, 40)
