"""A flipped bit or a cut anywhere in a store of any kind: told by name, or nothing that is read is another.

A reader gets exactly what was there, the same units too, or an error; where it gets fewer units, `verify` says why.
Every kind of signal and side file is in.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.cli import main
from stillroom.pipeline.progress_file import ProgressFile
from stillroom.storage import shard
from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog.stores import FIDELITY, kept_fidelity
from stillroom.storage.catalog.uses import TaughtRun, Use, load_taught, load_uses, record_taught, record_use, seal
from stillroom.storage.catalog.views import TokenRow, texts_of, write_token_table
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
    side_files(store)
    store.snapshot().write(root / "snapshot.parquet")
    assert verify_store(store.uri)["problems"] == []
    return store


def side_files(store: Store) -> None:
    """Those that no number of a shard depends on: texts, what was measured, the account, how far a run is."""
    write_token_table(store.files, (TokenRow(n, f"Ġt{n}", f" t{n}" if n % 3 else f"{n}") for n in range(40)))
    row = {"tier": "topk", "temperature": 1.0, "retained_mass": 0.75, "gradient_angle_deg": 3.5}
    store.files.write(FIDELITY, seal({"sample": "00" * 16, "reference_student": "none", "rows": [row], "noise": None}))
    record_taught(store.files, "ab" * 16, TaughtRun("run", "2026-01-01T00:00:00Z", 3, 9, 150, 2.5, 3.5, 1, "cpu"))
    record_use(store.files, "cd" * 16, Use("cut", "run", "2026-01-02T00:00:00Z", "topk", 1.0, 9, 300, 250, 4, 2.0))
    ProgressFile(store.files, "run", print).update(lambda: {"units": {"planned": 3, "scored": 3}}, news=True)


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
    measured = kept_fidelity(store.files) or {}
    beside = (
        texts_of(store.files), load_uses(store.files), load_taught(store.files),
        [measured[key] for key in ("sample", "reference_student", "rows", "noise")],
    )  # fmt: skip
    snapshot = pinned.digest, pinned.units, pinned.refs, pinned.identity
    return store.identity, held, planned, committed, truth, beside, snapshot


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
            # The log is many files that say one thing: which of them is damaged, `verify` says where it can be told.
            told = path.name in message or (path.parent.name == "_delta_log" and store.uri in message)
            assert told, f"{name}: {message}"
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


def test_commands_say_it_in_lines(stores: list[Store], capsys: pytest.CaptureFixture[str]) -> None:
    """A flip in each kind of side file and some at random: no command ends in a traceback, and `verify` finds what
    reading finds. Another exception than ours would come out of `main` as it is."""
    rng = np.random.default_rng(7)
    store = stores[0]
    sides = sorted(path for path in Path(store.uri, "_stillroom").rglob("*") if path.is_file())
    kinds = {(path.parent.name, re.split("[0-9a-f]{16}", path.name)[0]): path for path in sides}
    cases = [(store, path, flipped(path)) for path in kinds.values()]
    cases += [(each, path, data) for each in stores for path, data in damages(each, 2, rng)]
    assert len(cases) >= 20
    for each, path, data in cases:
        before, name = path.read_bytes(), path.relative_to(each.uri).as_posix()
        path.write_bytes(data)
        try:
            silent = path.name in ("progress.json", "snapshot.parquet") or not _says_something(each)
            for command in (["verify", "--json"], ["verify"], ["inspect"]):
                code = main([*command, each.uri])
                out, err = capsys.readouterr()
                assert code in (0, 1, 2), f"{name}: {command} ended with {code}"
                assert "Traceback" not in out + err, f"{name}: {err}"
                if "--json" in command:  # tables fold names
                    assert silent or code == 1, f"{name}: verify found nothing"
                    assert silent or path.name in out + err or path.parent.name == "_delta_log", out + err
        finally:
            path.write_bytes(before)
    assert verify_store(store.uri)["problems"] == []


def flipped(path: Path) -> bytes:
    """One bit of another in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


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


def test_a_last_entry_cut_off_reads_as_fewer_units_and_verify_tells(stores: list[Store], tmp_path: Path) -> None:
    """At the start, in each line and at its end. Without its last line, which counts the commit, nothing is missing."""
    store = open_store(str(shutil.copytree(stores[0].uri, tmp_path / "copy")))
    last, whole = max(Path(store.uri, "_delta_log").glob("*.json")), store.committed()
    data = last.read_bytes()
    ends = [at for at, byte in enumerate(data, start=1) if byte == ord("\n")]
    said = []
    for at in sorted({0, 9, *ends, *(end - 1 for end in ends), *(end + 9 for end in ends if end + 9 < len(data))}):
        last.write_bytes(data[:at])
        try:
            held = open_store(store.uri).committed()
        except StillroomError as error:
            said.append(store.uri in str(error))
        else:
            assert held.items() <= whole.items()
            said.append(held == whole or _says_something(store))
    assert all(said), said
    last.unlink()
    assert len(open_store(store.uri).committed()) == len(whole) - 1
    report = verify_store(store.uri)
    assert (report["problems"], report["uncommitted_files"]) == ([], 1)


def test_a_commit_of_another_program_is_taken_as_it_is(stores: list[Store]) -> None:
    """It says nothing of what the log names: then nothing is known, and nothing is refused."""
    store = stores[0]
    last = max(Path(store.uri, "_delta_log").glob("*.json"))
    before = last.read_text()
    assert '"stillroom.state"' in before
    last.write_text(before.replace('"stillroom.state"', '"somebody.elses"'))
    assert len(list(open_store(store.uri).sequences())) == 9
    last.write_text(before)
