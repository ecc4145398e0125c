"""Stores that older code wrote are read bit for bit by today's. tests/golden/make.py tells how they were made."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage.care.verify import verify_store
from stillroom.storage.identity import READABLE_FORMATS
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence, SignalSpec, TopKSpec
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import create_store, open_store
from stillroom.storage.stream import Stream
from tests.golden.make import (
    HERE,
    PINNED,
    SIGNALS,
    WITH_SIDE_FILES,
    contents,
    golden_sequences,
    of_version,
    snapshot_contents,
)
from tests.strategies import tiny_identity, unit_of, write_unit

EXPECTED = {path.parent.name: json.loads(path.read_text()) for path in sorted(HERE.glob("*/expected.json"))}
BESIDE = {"manifest", "snapshot"}
STORES = [(version, name) for version in EXPECTED for name in EXPECTED[version] if name not in BESIDE]
#: Versions that have a student's snapshot.
PINNING = [version for version in EXPECTED if "snapshot" in EXPECTED[version]]

#: Over the files of a version, by `_digest`. They are not made anew for anything; one that is added changes the digest.
RELEASED = {
    "v1": "9bf5008c07ef643031c9fa825e6f43c34e45a3c533356b272824bfabfbbd89da",
    "v2": "5b3807182373878c4e0379e4e4f3e5d78903e95ace63dc24aafb508dd044393a",
    "v3": "b20bbe5ec045498bb1f15f56002cb1102b782ff8f2bd1befb507b3a2e0aabf89",
}

#: Identities of the stores of format 1. Every shard of theirs states one.
V1_IDS = {"int16": "2260e4ab4c183430ee34c1073cb540ae", "float32": "727ce5d8ae7f7ae1d4ff3698fdb54bc6"}


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(
            f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return found.hexdigest()


def copy(version: str, to: Path) -> Path:
    """Reading must not need to write, but a failing test must not change the original."""
    return Path(shutil.copytree(HERE / version, to / version))


def test_there_is_one_of_every_format_and_signal() -> None:
    assert sorted(EXPECTED) == [f"v{number}" for number in READABLE_FORMATS]
    for number in READABLE_FORMATS:
        assert set(EXPECTED[f"v{number}"]) - {"snapshot"} == {*of_version(number), "manifest"}
    assert PINNING == ["v2"]
    kept = [SIGNALS[name] for version, name in STORES]
    assert {spec.topk.layout for spec in kept if spec.topk} == {"plain", "packed"}
    assert {spec.hidden.dtype for spec in kept if spec.hidden} == {"bfloat16", "int8", "int16"}
    assert [name for version, name in STORES if "truth" in EXPECTED[version][name]] == [WITH_SIDE_FILES]


@pytest.mark.parametrize("version", RELEASED)
def test_what_was_released_is_untouched(version: str) -> None:
    assert _digest(HERE / version) == RELEASED[version]


@pytest.mark.parametrize(("version", "name"), STORES)
def test_a_store_is_read_bit_for_bit(tmp_path: Path, version: str, name: str) -> None:
    store, expected = open_store(str(copy(version, tmp_path) / name)), EXPECTED[version][name]
    assert f"v{store.identity.format}" == version
    assert store.identity.signal == SIGNALS[name]
    assert contents(store) == expected
    assert verify_store(store.uri)["problems"] == []
    assert len(expected["sequences"]) == len(golden_sequences())


@pytest.mark.parametrize(("version", "name"), STORES)
def test_its_manifest_and_stream_are_read(tmp_path: Path, version: str, name: str) -> None:
    folder = copy(version, tmp_path)
    manifest = Manifest.open(folder / "manifest.parquet")
    manifest.verify()
    assert manifest.digest == EXPECTED[version]["manifest"]
    snapshot = open_store(str(folder / name)).snapshot()
    packs = list(Stream(manifest=manifest, snapshot=snapshot, window=16, epochs=1))
    assert sorted(d for p in packs for d in p.sequences) == sorted(
        s.digest for n, s in enumerate(golden_sequences()) if n != 3
    )
    assert all(p.signal is not None and len(p.signal) == len(p.positions) for p in packs)


@pytest.mark.parametrize("version", PINNING)
def test_a_snapshot_is_read_and_trained_from(tmp_path: Path, version: str) -> None:
    folder = copy(version, tmp_path)
    snapshot = Snapshot.read(folder / "snapshot.parquet")
    assert snapshot_contents(snapshot) == EXPECTED[version]["snapshot"]
    store = open_store(str(folder / PINNED))
    assert snapshot.identity == store.identity
    assert snapshot.refs == store.committed()
    placed = replace(snapshot, uri=store.uri)
    packs = list(Stream(manifest=Manifest.open(folder / "manifest.parquet"), snapshot=placed, window=16, epochs=1))
    assert sum(len(pack.sequences) for pack in packs) == len(golden_sequences()) - 1


@pytest.mark.parametrize("name", V1_IDS)
def test_the_identity_of_format_1_stays(name: str) -> None:
    identity = open_store(str(HERE / "v1" / name)).identity
    assert (identity.id, identity.format) == (V1_IDS[name], 1)
    assert EXPECTED["v1"][name]["identity"] == V1_IDS[name]


@pytest.mark.parametrize("name", V1_IDS)
def test_a_store_of_format_1_grows_in_its_own_format(tmp_path: Path, name: str) -> None:
    """A recipe asks for today's format. The store keeps its own, and old and new shards are read side by side."""
    uri = str(copy("v1", tmp_path) / name)
    step = SIGNALS[name].topk.gap_step  # type: ignore[union-attr]
    store = create_store(uri, tiny_identity(signal=SignalSpec(TopKSpec(4, step))))
    assert (store.identity.id, store.identity.format) == (V1_IDS[name], 1)
    late = [Sequence(np.arange(20, 27, dtype=np.int32))]
    store.save_plan([unit_of(late)])
    (receipt,) = store.commit([write_unit(store, late)])
    footer: dict[str, Any] = store.reader(receipt.shard).footer
    assert (footer["format"], footer["identity"]) == (1, V1_IDS[name])
    assert footer["signal"] == {"k": 4, "gap_step": step}
    again = open_store(uri)
    digests = [s.sequence.digest for s in again.sequences()]
    assert sorted(digests) == sorted(s.digest for s in [*golden_sequences(), *late])
    assert verify_store(uri)["problems"] == []
    again.snapshot().write(tmp_path / "snapshot.parquet")
    assert Snapshot.read(tmp_path / "snapshot.parquet").identity == again.identity
