"""A disk that is full at any moment: a clear StoreFull, an intact store, and going on once there is room."""

from pathlib import Path

import pytest

from tests.processes import on_small_disk

#: Each step is tried with less and less room, until it fails; then the store must be what it was, and with room the
#: same step must do. Argument: the folder on the small disk.
STEPS = """
import os
import sys
from pathlib import Path
import numpy as np
from stillroom.storage.errors import StillroomError, StoreFull
from stillroom.storage.log import CommitLog
from stillroom.storage.store import create_store, open_store
from stillroom.storage.fidelity.truth import Truth, write_truth
from stillroom.storage.care.verify import verify_store
from tests.strategies import digest_teacher, next_token_teacher, random_sequences, tiny_identity, unit_of, write_unit

root = Path(sys.argv[1])
filler = root / "filler"
sequences = random_sequences(np.random.default_rng(0), 4, shortest=20, longest=40)
identity = tiny_identity(k=8, vocabulary=4096)
uri = str(root / "store")
create_store(uri, identity)


def fill(leave):
    filler.unlink(missing_ok=True)
    free = os.statvfs(root)
    size = max(free.f_bavail * free.f_frsize - leave, 0)
    filler.write_bytes(bytes(size))


def contents():
    store = open_store(uri)
    assert verify_store(uri)["problems"] == []
    return store.committed().keys(), [u.id for u in store.planned()], len(list(store.sequences()))


def until_full(name, step):
    before = contents()
    for leave in range(64 << 10, -1, -4096):
        fill(leave)
        try:
            step(dry=True)
        except StoreFull as error:
            assert "free some space" in str(error) and "\\n" not in str(error), error
            told = str(error)
            break
        filler.unlink(missing_ok=True)
        before = contents()
    else:
        raise SystemExit(f"{name} never failed")
    assert contents() == before, f"{name} left something behind"
    temporary = [p for p in Path(uri).rglob("*.tmp") if "_delta_log" not in p.parts]
    assert temporary == [], temporary
    filler.unlink()
    step(dry=False)
    assert verify_store(uri)["problems"] == []
    print(name, "|", told)


part = sequences[:4]
receipts = []


def plan(dry):
    open_store(uri).save_plan([unit_of([s]) for s in part] if dry else [unit_of(part)])


def shard(dry):
    receipts.append(write_unit(open_store(uri), part, next_token_teacher))


def truth(dry):
    first = part[0]
    rows = digest_teacher(first, 4096)[:2].astype(np.float32)
    positions = np.arange(first.first_position, first.first_position + 2).astype(np.int32)
    noise = rows + np.random.default_rng(os.getpid()).normal(size=rows.shape).astype(np.float32)
    block = Truth((first.digest,) * 2, positions, noise, noise[:0], np.zeros(0, np.int64))
    write_truth(open_store(uri).files, unit_of(part), block, open_store(uri).identity)


def commit(dry):
    open_store(uri).commit(receipts)
    if dry:  # it stood, so the next try is to commit it again
        filler.unlink()
        CommitLog.open(uri).remove([r.shard for r in receipts])


until_full("plan", plan)
until_full("shard", shard)
until_full("truth", truth)
until_full("commit", commit)
assert len(list(open_store(uri).sequences())) == 4
print("whole")
"""


@pytest.mark.real
def test_a_disk_that_fills_up_while_a_store_is_written(tmp_path: Path) -> None:
    lines = on_small_disk(STEPS, tmp_path, "4m").splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["plan", "shard", "truth", "commit", "whole"], lines
    assert all("no room for" in line for line in lines[:-1])
