"""A server that dies in the middle of a run and comes back: the run finishes, nothing is lost, nothing is double."""

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stillroom.storage.errors import StoreError
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.shard import parse_shard_path, shard_path
from tests.s3_server import BUCKET, S3Server

SCHEMA = pa.schema([pa.field("sequence", pa.string(), nullable=False)])
UNITS = 30


@pytest.fixture
def root(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(20_000)


class Writer(threading.Thread):
    """Writes and commits units one by one up to a gate, and tells how far it is.

    told: what its commits said was theirs. done: its units, those of the other writer among them.
    """

    def __init__(self, root: str, first: int, *, gate: int = UNITS) -> None:
        super().__init__()
        self._files, self._log, self._first = open_files(root), CommitLog.open(root), first
        self._gate = gate
        self.told: list[str] = []
        self.failed, self.done = "", 0
        self._step = threading.Condition()

    def wait_for(self, done: int) -> None:
        """Until that many units are done, or the writer has failed; a minute at most."""
        with self._step:
            assert self._step.wait_for(lambda: self.done >= done or self.failed, 60), f"{self.done} of {done} units"

    def open_to(self, gate: int) -> None:
        """It may go on until that many units are done."""
        with self._step:
            self._gate = gate
            self._step.notify_all()

    def _may_do(self, number: int) -> bool:
        return number < self._gate

    def run(self) -> None:
        try:
            for number in range(UNITS):
                with self._step:
                    assert self._step.wait_for(partial(self._may_do, number), 120)
                unit = f"{self._first + number:032x}"
                data = content(self._first + number)
                path = shard_path(unit, sha256_hex(data))
                self._files.write(path, data)
                ref = ShardRef(unit, path, sha256_hex(data), len(data))
                self.told += [r.shard.path for r in self._log.commit([Receipt(ref, 1, 1, 1, 1, 0.0)])]
                with self._step:
                    self.done += 1
                    self._step.notify_all()
        except StoreError as error:
            with self._step:
                self.failed = str(error)
                self._step.notify_all()


@pytest.mark.real
def test_a_server_killed_in_the_middle_and_restarted(s3_server: S3Server, root: str) -> None:
    """Two writers share half of their units. SIGKILL while both work, twice; each time the server comes back.

    A gate holds the faster one: on a busy machine it was through while the slower had done seven units.
    """
    CommitLog.create(root, SCHEMA)
    writers = [Writer(root, first, gate=UNITS // 3) for first in (0, UNITS // 2)]
    for writer in writers:
        writer.start()
    for gate in (UNITS // 3, 2 * UNITS // 3):
        for writer in writers:
            writer.wait_for(gate - 7)
        s3_server.kill()
        for writer in writers:
            assert writer.done <= gate
            writer.open_to(gate + UNITS // 3)  # before the server is back: one that waited meets a dead server too
        s3_server.start()
    for writer in writers:
        writer.join(120)
    assert [writer.failed for writer in writers] == ["", ""]
    refs = CommitLog.open(root).refs()
    assert sorted(int(unit, 16) for unit in refs) == list(range(UNITS + UNITS // 2))
    assert sorted(path for writer in writers for path in writer.told) == sorted(ref.path for ref in refs.values())
    files = open_files(root)
    written = files.list("shards")
    assert len(written) == len(refs), "both wrote the same bytes under the same name"
    for path in written:
        assert sha256_hex(files.read(path)) == parse_shard_path(path)[1]


@pytest.mark.real
@pytest.mark.slow
def test_a_server_that_stays_away_is_told_and_the_next_run_finishes(
    s3_server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_S3_RETRY_S", "1")
    CommitLog.create(root, SCHEMA)
    writer = Writer(root, 0)
    writer.start()
    writer.wait_for(3)
    s3_server.kill()
    writer.join(60)
    s3_server.start()
    assert "gave up after" in writer.failed
    before = CommitLog.open(root).refs()
    assert set(writer.told) == {ref.path for ref in before.values()} or len(before) == len(writer.told) + 1
    again = Writer(root, 0)
    again.start()
    again.join(60)
    assert again.failed == ""
    assert len(CommitLog.open(root).refs()) == UNITS
