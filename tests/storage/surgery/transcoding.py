"""Stores to transcode, and what the tests of it look at in the results."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.calibration import Calibration, head_path, save_calibration
from stillroom.storage.care.verify import verify_store
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import HiddenSpec, Sequence, Signal, SignalSpec, TopK, TopKSpec
from stillroom.storage.store import Store, open_store
from tests.strategies import tiny_identity

V = 40

#: Half a code of the tail, twice, and float32's rounding (codecs/tail.py).
TAIL_ERROR = 1e-3


def topk_identity(k: int = 12, gap_step: float | None = 1 / 8, **fields: Any) -> Identity:
    return tiny_identity(signal=SignalSpec(TopKSpec(k, gap_step, **fields)))


def found_hidden(files: LocalFiles, dtype: str = "int8") -> HiddenSpec:
    """The hidden part of a store at `files`, with the side files that it needs."""
    head = b"the output head, whatever is in it"
    files.write(head_path(sha256_hex(head)), head)
    if dtype == "bfloat16":
        return HiddenSpec(6, "bfloat16")
    rng = np.random.default_rng(0)
    calibration = Calibration(rng.uniform(0.5, 2.0, 6).astype(np.float32), rng.normal(0.0, 1.0, 6).astype(np.float32))
    return HiddenSpec(6, "int8", save_calibration(files, calibration))


def hashes(uri: str | Path) -> dict[str, str]:
    root = Path(uri)
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def signals(store: Store) -> dict[str, Signal]:
    found = {s.sequence.digest: s.signal for s in store.sequences()}
    assert None not in found.values()
    return found  # type: ignore[return-value]


def tops(store: Store) -> dict[str, TopK]:
    return {digest: signal.topk for digest, signal in signals(store).items() if signal.topk is not None}


def columns(store: Store, *names: str) -> dict[str, list[pa.Array]]:
    """The raw columns of every sequence, by digest."""
    found: dict[str, list[pa.Array]] = {}
    for ref in store.committed().values():
        table = pq.read_table(Path(store.uri) / ref.path)
        for row, digest in enumerate(table["sequence"].to_pylist()):
            found[digest] = [table[name][row].as_py() for name in names]
    return found


def require_sound(uri: str | Path) -> Store:
    assert verify_store(str(uri))["problems"] == []
    return open_store(str(uri))


def digests(some: list[Sequence]) -> list[str]:
    return sorted(s.digest for s in some)


class Stopped(Exception):
    """What a test stops a run with."""


def stop_after(units: int) -> Callable[[int, int], None]:
    calls = iter(range(units))

    def progress(done: int, total: int) -> None:
        assert 0 < done <= total
        if next(calls, None) == units - 1:
            raise Stopped

    return progress
