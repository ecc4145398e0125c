"""store.py: whole stores are counted, and what does not grow with them is stated apart."""

from pathlib import Path

import numpy as np

from stillroom.storage.catalog.uses import load_taught
from stillroom.storage.catalog.views import texts_of, token_table
from stillroom.storage.records import Sequence, SignalSpec, TopKSpec
from tests.bench.store import build, describe
from tests.bench.teacher import TOKENS, Scored
from tests.strategies import digest_teacher, signal_of, tiny_identity
from tests.tiny import tiny_tokenizer


def test_everything_on_disk_is_counted_but_the_token_table(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    identity = tiny_identity(vocabulary=len(tokenizer), signal=SignalSpec(TopKSpec(8, None)))
    sequences = [Sequence((np.arange(20) + n).astype(np.int32)) for n in range(20)]
    signals = [signal_of(sequence, identity) for sequence in sequences]
    truth = [digest_teacher(sequence, identity.vocabulary)[[3, 7]].astype(np.float32) for sequence in sequences]
    data = Scored(identity, tmp_path / "tokenizer", sequences, signals, [3, 7], truth)
    store = build(data, SignalSpec(TopKSpec(8)), tmp_path / "store")
    assert len(texts_of(store.files) or []) == identity.vocabulary
    assert [run.tokens for run in load_taught(store.files)] == [400]
    found = describe(data, store)
    whole = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert found["token_table_bytes"] == (tmp_path / "store" / (token_table(store.files) or "")).stat().st_size > 0
    assert found["bytes_per_token"] == round((whole - found["token_table_bytes"]) / TOKENS, 2)
    assert found["head_bytes"] == 0
    assert "topk" in found["fidelity"]
