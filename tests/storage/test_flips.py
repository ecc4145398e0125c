"""A flipped bit anywhere in a store is reported, or changes nothing; and no reader gets other numbers by it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import HiddenSpec, SampledSpec, Signal, SignalSpec, TopKSpec
from stillroom.storage.store import Store, open_store
from tests.strategies import next_token_teacher, random_sequences, tiny_identity, tiny_store, unit_of, write_unit

#: How much of the damage goes where: by size alone the log would have nearly none of it.
SHARES = {"shards": 0.4, "_delta_log": 0.35, "_stillroom": 0.25}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All three parts, a unit dropped and committed again, side files of every kind."""
    root = tmp_path_factory.mktemp("flips") / "store"
    files = open_files(str(root))
    sha256 = save_calibration(files, Calibration(np.full(8, 0.5, np.float32), np.zeros(8, np.float32)))
    files.write(f"_stillroom/head-{sha256_hex(b'head')}.safetensors", b"head")
    signal = SignalSpec(TopKSpec(4), SampledSpec(9), HiddenSpec(8, "int8", sha256))
    sequences = random_sequences(np.random.default_rng(3), 12, shortest=10, longest=24)
    store = tiny_store(
        root, sequences[:9], identity=tiny_identity(signal=signal), per_unit=3, teacher=next_token_teacher
    )
    store.save_plan([unit_of(sequences[9:])])
    receipt = write_unit(store, sequences[9:], next_token_teacher)
    store.commit([receipt])
    CommitLog.open(store.uri).remove([receipt.shard])
    store.commit([receipt])
    assert verify_store(store.uri)["problems"] == []
    return store


def numbers(signal: Signal) -> str:
    assert signal.topk is not None
    assert signal.sampled is not None
    assert signal.hidden is not None
    parts = (signal.topk.ids, signal.topk.logits, signal.topk.tail_lse, signal.sampled.ids, signal.sampled.counts)
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in (*parts, signal.hidden))).hexdigest()


Contents = tuple[dict[str, str], object]


def contents(uri: str) -> Contents:
    """What a reader gets: every sequence's numbers, and what is planned."""
    store = open_store(uri)
    held = {s.sequence.digest: numbers(s.signal) for s in store.sequences() if s.signal is not None}
    return held, store.planned()


def read(uri: str) -> tuple[Contents | None, str]:
    """Contents, or None and what was said."""
    try:
        return contents(uri), ""
    except StillroomError as error:
        return None, str(error)


def check(store: Store, path: Path, damaged: bytes, whole: Contents) -> None:
    before = path.read_bytes()
    path.write_bytes(damaged)
    try:
        found, told = read(store.uri)
        assert found is not None or any(word in told for word in (store.uri, "shards/"))
        if found is not None:  # fewer sequences where the log names fewer; never other numbers
            assert found[0].items() <= whole[0].items()
        problems = verify_store(store.uri)["problems"]
        assert problems or found == whole, f"{path.name}: nobody has noticed"
    finally:
        path.write_bytes(before)


def damage(store: Store, count: int, seed: int) -> None:
    """`count` flipped bits, and a fifth as many truncations."""
    rng = np.random.default_rng(seed)
    whole = contents(store.uri)
    held = {part: sorted(p for p in Path(store.uri, part).rglob("*") if p.is_file()) for part in SHARES}
    for number in range(count + count // 5):
        part = rng.choice(list(SHARES), p=list(SHARES.values()))
        sizes = np.array([path.stat().st_size for path in held[part]], float)
        path = held[part][int(rng.choice(len(sizes), p=sizes / sizes.sum()))]
        data = bytearray(path.read_bytes())
        at = int(rng.integers(len(data)))
        if number < count:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[at:]
        check(store, path, bytes(data), whole)


def test_a_hundred_flipped_bits(store: Store) -> None:
    damage(store, 100, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits(store: Store) -> None:
    damage(store, 1000, seed=1)
