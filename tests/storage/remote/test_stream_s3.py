"""A student's stream from a bucket: the same packs as from a folder, through the local cache. A real server."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.store import create_store
from stillroom.storage.stream import Stream
from tests.s3_server import BUCKET, S3Server
from tests.strategies import random_sequences, tiny_identity, tiny_manifest, unit_of, write_unit


@pytest.mark.real
def test_a_student_streams_a_bucket_through_the_cache(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same packs as from a folder; a second epoch, and a second student, read copies alone."""
    for name, value in (s3_server.environment | {"STILLROOM_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    sequences = random_sequences(np.random.default_rng(5), 24)
    manifest = tiny_manifest(tmp_path / "manifest.parquet", sequences)

    def packs_of(stream: Stream) -> list[tuple[int, tuple[str, ...], bytes]]:
        return [(p.epoch, p.sequences, p.input_ids.tobytes()) for p in stream]

    packs = []
    for uri in (str(tmp_path / "store"), f"s3://{BUCKET}/{tmp_path.name}/store"):
        store = create_store(uri, tiny_identity())
        parts = [sequences[at : at + 6] for at in range(0, 24, 6)]
        store.save_plan([unit_of(part) for part in parts])
        store.commit([write_unit(store, part) for part in parts])
        snapshot = store.snapshot()
        packs.append(packs_of(Stream(manifest=manifest, snapshot=snapshot, window=40, epochs=2)))
    assert packs[0] == packs[1]
    copies = [path for path in (tmp_path / "cache").rglob("*") if len(path.name) == 64]
    assert len(copies) == 4
    for ref in snapshot.refs.values():
        store.files.delete(ref.path)
    assert packs_of(Stream(manifest=manifest, snapshot=snapshot, window=40, epochs=2)) == packs[1]
