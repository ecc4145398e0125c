"""Layers and attention maps are carried over as they are, cut out with their sequences, and left out when asked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import UsageError
from stillroom.storage.records import AttentionSpec, LayersSpec, Sequence, Signal, SignalSpec, TopKSpec
from stillroom.storage.store import Store, open_store
from stillroom.storage.surgery.changes import Changes
from stillroom.storage.surgery.transcode import transcode
from tests.strategies import next_token_teacher, random_sequences, tiny_identity, tiny_store

SPEC = SignalSpec(TopKSpec(8), layers=LayersSpec((0, 4), 6), attention=AttentionSpec((1, 3), 32, "per_head", 2))


@pytest.fixture
def source(tmp_path: Path) -> Store:
    sequences = sorted(random_sequences(np.random.default_rng(5), 12), key=lambda s: s.digest)
    identity = tiny_identity(signal=SPEC)
    return tiny_store(tmp_path / "source", sequences, identity=identity, teacher=next_token_teacher)


def held(store: Store) -> dict[str, tuple[Sequence, Signal]]:
    found = {}
    for stored in store.sequences():
        assert stored.signal is not None
        found[stored.sequence.digest] = stored.sequence, stored.signal
    return found


def test_they_are_the_same_numbers_in_units_cut_anew(tmp_path: Path, source: Store) -> None:
    wanted = frozenset(sorted(held(source))[1:8])
    transcode([source.uri], str(tmp_path / "result"), Changes(k=4), sequences=wanted, unit_tokens=30)
    result = open_store(str(tmp_path / "result"))
    assert result.identity.signal == replace(SPEC, topk=TopKSpec(4))
    assert result.identity.format == 3
    assert verify_store(result.uri)["problems"] == []
    before, after = held(source), held(result)
    assert set(after) == wanted
    for digest, (_, signal) in after.items():
        old = before[digest][1]
        assert signal.attention is not None
        assert old.attention is not None
        np.testing.assert_array_equal(signal.layers, old.layers)
        np.testing.assert_array_equal(signal.attention.values, old.attention.values)


def test_what_is_left_without_them_is_a_store_that_older_releases_read(tmp_path: Path, source: Store) -> None:
    transcode([source.uri], str(tmp_path / "result"), Changes(drop=("layers", "attention")))
    result = open_store(str(tmp_path / "result"))
    assert result.identity.signal == SignalSpec(TopKSpec(8))
    assert result.identity.format == 2
    assert verify_store(result.uri)["problems"] == []
    alone = transcode([source.uri], str(tmp_path / "maps"), Changes(only=("attention",)))
    assert alone["signal"] == "attention 1,3 (uint8, 2 heads, up to 32 tokens)"
    assert verify_store(alone["store"])["problems"] == []


def test_what_was_not_kept_cannot_be_made(tmp_path: Path, source: Store) -> None:
    transcode([source.uri], str(tmp_path / "plain"), Changes(only=("topk",)))
    with pytest.raises(UsageError, match=r"part layers is not in the store.*inner hidden states cannot be had"):
        transcode([str(tmp_path / "plain")], str(tmp_path / "result"), Changes(only=("layers",)))
