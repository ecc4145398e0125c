"""A flipped bit or a cut anywhere in a store of any kind: told by name, or nothing that is read is another.

A reader gets exactly what was there, the same units too, or an error; where it gets fewer units, `verify` says why.
Every kind of signal and side file is in.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage import shard
from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import StillroomError
from stillroom.storage.fidelity.truth import Truth, truth_blocks, write_truth
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import (
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
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, open_store
from tests.storage.damage import edit_entry
from tests.strategies import (
    digest_teacher,
    next_token_teacher,
    random_sequences,
    tiny_identity,
    tiny_store,
    unit_of,
    write_unit,
)

SHARES = {"shards": 0.35, "_delta_log": 0.3, "_stillroom": 0.25, "snapshot.parquet": 0.1}


def found_store(root: Path, signal: SignalSpec, sequences: list[Sequence]) -> Store:
    """Two commits, a unit dropped and scored again, a truth sample, a snapshot beside it."""
    store = tiny_store(
        root, sequences[:6], identity=tiny_identity(signal=signal), per_unit=3, teacher=next_token_teacher
    )
    store.save_plan([unit_of(sequences[6:])])
    receipt = write_unit(store, sequences[6:], next_token_teacher)
    store.commit([receipt])
    CommitLog.open(store.uri).remove([receipt.shard])
    store.commit([receipt])
    unit, first = unit_of(sequences[:3]), sequences[0]
    logits_RV = digest_teacher(first, store.identity.vocabulary)[:2].astype(np.float32)
    positions = np.arange(first.first_position, first.first_position + 2).astype(np.int32)
    truth = Truth((first.digest,) * 2, positions, logits_RV, logits_RV[:1] + 1, np.zeros(1, np.int64))
    write_truth(store.files, unit, truth, store.identity)
    store.snapshot().write(root / "snapshot.parquet")
    assert verify_store(store.uri)["problems"] == []
    return store


def checkpointed(store: Store) -> None:
    """A checkpoint, and an entry after it."""
    from deltalake import DeltaTable

    DeltaTable(store.uri).create_checkpoint()
    late = random_sequences(np.random.default_rng(99), 2, shortest=5)
    store.save_plan([unit_of(late)])
    store.commit([write_unit(store, late, next_token_teacher)])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    root = tmp_path_factory.mktemp("flips")
    sequences = random_sequences(np.random.default_rng(3), 9, shortest=10, longest=24)
    sha256 = _calibrated(root / "all")
    assert _calibrated(root / "int8") == sha256
    signals = {
        "all": SignalSpec(TopKSpec(4), SampledSpec(9), HiddenSpec(8, "int16", sha256)),
        "packed": SignalSpec(TopKSpec(4, layout="packed")),
        "nucleus": SignalSpec(TopKSpec(6, 1 / 16, NucleusSpec(0.9, 2.0)), None, HiddenSpec(8, "bfloat16")),
        "int8": SignalSpec(None, SampledSpec(9), HiddenSpec(8, "int8", sha256)),
        "layers": SignalSpec(TopKSpec(4), layers=LayersSpec((0, 2), 8), attention=AttentionSpec((1,), 64)),
    }
    made = [found_store(root / name, signal, sequences) for name, signal in signals.items()]
    checkpointed(made[2])
    return made


def _calibrated(root: Path) -> str:
    """Side files of a hidden part; returns the calibration's digest."""
    files = open_files(str(root))
    files.write(f"_stillroom/head-{sha256_hex(b'head')}.safetensors", b"head")
    return save_calibration(files, Calibration(np.full(8, 0.01, np.float32), np.zeros(8, np.float32)))


def contents(store_uri: str) -> tuple[Any, ...]:
    """Everything that a reader gets: numbers of every sequence, what is planned and committed, truth, snapshot."""
    shard._calibrations.clear()  # as in a process that has not read it
    store = open_store(store_uri)
    held = {s.sequence.digest: _digest(s.signal) for s in store.sequences() if s.signal is not None}
    planned = tuple(store.planned())
    blocks = list(truth_blocks(store.files, planned, store.identity))
    truth = [(b.keys, b.logits.tobytes(), b.alone.tobytes(), b.alone_rows.tobytes()) for b in blocks]
    pinned = Snapshot.read(Path(store_uri, "snapshot.parquet"))
    committed = {unit: ref.path for unit, ref in store.committed().items()}
    return store.identity, held, planned, committed, truth, pinned.digest, pinned.units, pinned.refs, pinned.identity


def _digest(signal: Signal) -> str:
    parts: list[Any] = [signal.hidden, signal.layers]
    if signal.attention:
        parts += [signal.attention.values, signal.attention.widths]
    if signal.topk:
        parts += [signal.topk.ids, signal.topk.logits, signal.topk.tail_lse, signal.topk.counts]
    if signal.sampled:
        parts += [signal.sampled.ids, signal.sampled.counts]
    data = [np.ascontiguousarray(part).tobytes() for part in parts if part is not None]
    return hashlib.sha256(b"".join(data)).hexdigest()


def damages(store: Store, count: int, rng: np.random.Generator) -> Iterator[tuple[Path, bytes]]:
    """`count` flipped bits, and a fifth as many truncations."""
    root = Path(store.uri)
    held = {
        part: sorted(p for p in [root / part, *(root / part).rglob("*")] if p.is_file() and p.suffix != ".crc")
        for part in SHARES
    }
    for number in range(count + -(-count // 5)):
        part = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        path = held[part][int(rng.integers(len(held[part])))]
        data = bytearray(path.read_bytes())
        at = int(rng.integers(len(data)))
        if number < count:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[at:]
        yield path, bytes(data)


def check(store: Store, path: Path, data: bytes, whole: tuple[Any, ...], summary: dict[str, int]) -> None:
    before = path.read_bytes()
    path.write_bytes(data)
    name = path.relative_to(store.uri).as_posix()
    try:
        try:
            found = contents(store.uri)
        except StillroomError as error:
            message = str(error)
            assert "\n" not in message
            assert path.name in message or store.uri in message or "identity" in message, f"{name}: {message}"
            summary["told when read"] += 1
            found = None
            # The snapshot is a student's, and no part of the store.
            assert path.name == "snapshot.parquet" or _says_something(store), f"{name}: verify is silent on {message}"
        if found is not None:
            if found != whole:  # a last entry that is cut off or gone: what it committed is pending again, as before it
                assert path.parent.name == "_delta_log", f"{name}: something else was read, and nobody was told"
                assert found[1].items() <= whole[1].items()
                assert found[3].items() <= whole[3].items()
                assert _says_something(store), f"{name}: nobody was told"
                summary["fewer units, told by verify"] += 1
            else:
                summary["harmless"] += 1
                _says_something(store)  # which raises nothing but our own errors
    finally:
        path.write_bytes(before)


def _says_something(store: Store) -> bool:
    """`verify` has problems, or one is raised; nothing else comes out of it."""
    try:
        return bool(verify_store(store.uri)["problems"])
    except StillroomError:
        return True


def damage(stores: list[Store], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    summary = dict.fromkeys(("told when read", "fewer units, told by verify", "harmless"), 0)
    for number, store in enumerate(stores):
        whole = contents(store.uri)
        share = count // len(stores) + (number < count % len(stores))
        for path, data in damages(store, share, rng):
            check(store, path, data, whole, summary)
        assert contents(store.uri) == whole
    print(summary)
    assert sum(summary.values()) >= count
    assert summary["told when read"] > 0.5 * count


def test_a_hundred_flips_over_all_kinds_of_stores(stores: list[Store]) -> None:
    damage(stores, 100, seed=0)


@pytest.mark.slow
def test_a_thousand_flips_over_all_kinds_of_stores(stores: list[Store]) -> None:
    damage(stores, 1000, seed=1)


@pytest.mark.parametrize(
    ("version", "word", "other"),
    [(1, '{"add"', '{"ade"'), (1, '"size":', '"size":1'), (5, '{"remove"', '{"remoue"'), (5, '{"remove"', '{"add"')],
)
def test_an_action_that_is_another_is_told_when_read(
    stores: list[Store], tmp_path: Path, version: int, word: str, other: str
) -> None:
    """delta-rs passes over what it does not know. The last commit says what the log names, and that is compared."""
    store = open_store(str(shutil.copytree(stores[0].uri, tmp_path / "copy")))
    CommitLog.open(store.uri).remove([store.committed()[store.planned()[0].id]])
    assert len(list(store.sequences())) == 6
    edit_entry(store, version, lambda text: text.replace(word, other))
    with pytest.raises(StillroomError, match=r"commit log of .* (names other shards|cannot be read)"):
        list(open_store(store.uri).sequences())
    with pytest.raises(StillroomError, match="commit log of"):
        open_store(store.uri).snapshot()


def test_a_last_entry_of_an_unknown_kind_is_told_by_its_store(stores: list[Store], tmp_path: Path) -> None:
    """delta-rs lists the shards all the same; it is when the last commit's words are read that it notices."""
    store = open_store(str(shutil.copytree(stores[0].uri, tmp_path / "copy")))
    last = max(Path(store.uri, "_delta_log").glob("*.json"))
    last.write_text(last.read_text().replace('{"commitInfo"', '{"commitInvo"'))
    with pytest.raises(StillroomError, match=f"commit log of {store.uri} cannot be read"):
        list(open_store(store.uri).sequences())
    assert _says_something(store)


def test_a_commit_of_another_program_is_taken_as_it_is(stores: list[Store]) -> None:
    """It says nothing of what the log names: then nothing is known, and nothing is refused."""
    store = stores[0]
    last = max(Path(store.uri, "_delta_log").glob("*.json"))
    before = last.read_text()
    assert '"stillroom.state"' in before
    last.write_text(before.replace('"stillroom.state"', '"somebody.elses"'))
    assert len(list(open_store(store.uri).sequences())) == 9
    last.write_text(before)
