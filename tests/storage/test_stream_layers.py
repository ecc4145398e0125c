"""The stream hands over layers and attention maps with the positions that train, each position's own."""

from pathlib import Path

import numpy as np

from stillroom.storage.records import AttentionSpec, LayersSpec, SignalSpec, TopKSpec
from stillroom.storage.stream import Stream
from tests.strategies import random_sequences, tiny_identity, tiny_manifest, tiny_store

SPEC = SignalSpec(TopKSpec(4), layers=LayersSpec((0, 4), 6), attention=AttentionSpec((1, 3), 32, "per_head", 2))


def test_packs_carry_every_part_of_their_positions(tmp_path: Path) -> None:
    sequences = random_sequences(np.random.default_rng(3), 14)
    store = tiny_store(tmp_path / "store", sequences, identity=tiny_identity(signal=SPEC))
    manifest = tiny_manifest(tmp_path / "corpus.parquet", sequences)
    held = {stored.sequence.digest: stored for stored in store.sequences()}
    seen = 0
    for pack in Stream(manifest=manifest, snapshot=store.snapshot(), window=32, epochs=1):
        assert pack.signal is not None
        assert pack.signal.layers is not None
        assert pack.signal.attention is not None
        assert len(pack.signal.layers) == len(pack.signal.attention) == len(pack.positions)
        for row, at in enumerate(pack.positions):
            stored, t = held[pack.sequences[pack.segment_ids[at]]], int(pack.position_ids[at])
            own = stored.signal
            assert own is not None
            assert own.layers is not None
            assert own.attention is not None
            r = t - stored.sequence.first_position
            np.testing.assert_array_equal(pack.signal.layers[row], own.layers[r])
            one = pack.signal.attention[row : row + 1]
            assert one.widths.tolist() == [t + 1]
            np.testing.assert_array_equal(one.values, own.attention[r : r + 1].values)
            seen += 1
    assert seen > 50


def test_a_student_that_wants_the_output_alone_reads_no_layer(tmp_path: Path) -> None:
    sequences = random_sequences(np.random.default_rng(3), 6)
    store = tiny_store(tmp_path / "store", sequences, identity=tiny_identity(signal=SPEC))
    manifest = tiny_manifest(tmp_path / "corpus.parquet", sequences)
    for parts in (("topk",), ("layers",), ("attention",)):
        for pack in Stream(manifest=manifest, snapshot=store.snapshot(), window=32, epochs=1, parts=parts):
            assert pack.signal is not None
            kept = [n for n in ("topk", "layers", "attention") if getattr(pack.signal, n) is not None]
            assert kept == list(parts)
