"""log.py: a unit counts once, whoever commits it, and nothing counts before."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from stillroom.storage.errors import StoreError
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt
from tests.processes import COMMITTER, at_once
from tests.strategies import named_receipt as receipt

SCHEMA = pa.schema([pa.field("sequence", pa.string(), nullable=False)])


def units(receipts: list[Receipt]) -> list[int]:
    return sorted(int(r.shard.unit, 16) for r in receipts)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    CommitLog.create(str(tmp_path), SCHEMA)
    return str(tmp_path)


def test_a_new_log_is_empty(uri: str) -> None:
    assert CommitLog.open(uri).refs() == {}


def test_what_is_committed_is_read_by_another_handle(uri: str) -> None:
    log, other = CommitLog.open(uri), CommitLog.open(uri)
    assert other.refs() == {}
    assert units(log.commit([receipt(1), receipt(2)])) == [1, 2]
    assert other.refs() == log.refs() == {r.shard.unit: r.shard for r in (receipt(1), receipt(2))}


def test_a_unit_counts_once(uri: str) -> None:
    log = CommitLog.open(uri)
    first = receipt(7)
    log.commit([first])
    assert log.commit([receipt(7), receipt(7, writer=1)]) == []
    assert units(log.commit([receipt(7, writer=1), receipt(8)])) == [8]
    assert log.refs()[first.shard.unit] == first.shard
    assert len(DeltaTable(uri).file_uris()) == 2


def test_a_unit_twice_in_one_commit_counts_once(uri: str) -> None:
    log = CommitLog.open(uri)
    assert units(log.commit([receipt(7), receipt(7, writer=1)])) == [7]
    assert len(DeltaTable(uri).file_uris()) == 1


def test_a_stale_handle_sees_what_others_committed_before_it_commits(uri: str) -> None:
    one, two = CommitLog.open(uri), CommitLog.open(uri)
    two.refs()
    one.commit([receipt(1)])
    assert units(two.commit([receipt(1, writer=1), receipt(2, writer=1)])) == [2]
    assert one.refs() == two.refs()
    assert one.refs()[f"{1:032x}"] == receipt(1).shard


def test_committing_nothing_writes_nothing(uri: str) -> None:
    log = CommitLog.open(uri)
    assert log.commit([]) == []
    assert DeltaTable(uri).version() == 0


def test_threads_that_commit_the_same_units_at_once(uri: str) -> None:
    """Each has its handle and its own file for every unit; what each is told it committed adds up to each unit once."""

    def run(writer: int) -> list[Receipt]:
        log = CommitLog.open(uri)
        mine = [receipt(n, writer=writer) for n in range(6)]
        mine.append(receipt(100 + writer, writer=writer))
        done: list[Receipt] = []
        for at in range(0, len(mine), 2):
            done += log.commit(mine[at : at + 2])
        return done

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(run, range(4)))
    everything = [r for done in told for r in done]
    assert units(everything) == [*range(6), 100, 101, 102, 103]
    assert CommitLog.open(uri).refs() == {r.shard.unit: r.shard for r in everything}
    assert len(DeltaTable(uri).file_uris()) == 10


@pytest.mark.real
def test_processes_that_commit_the_same_units_at_once(uri: str) -> None:
    told = "".join(at_once(COMMITTER, [(uri, writer, 5) for writer in range(3)])).split()
    assert sorted(told) == sorted(ref.path for ref in CommitLog.open(uri).refs().values())
    assert len(told) == 5


def test_handles_that_create_a_log_at_once_share_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        logs = list(pool.map(lambda _: CommitLog.create(str(tmp_path), SCHEMA), range(6)))
    for number, log in enumerate(logs):
        log.commit([receipt(number)])
    assert len(CommitLog.open(str(tmp_path)).refs()) == 6


def test_a_log_outlives_its_checkpoint(uri: str) -> None:
    """delta-rs writes a checkpoint after a hundred commits; an old handle and a new one read on across it."""
    log, old = CommitLog.open(uri), CommitLog.open(uri)
    for number in range(102):
        log.commit([receipt(number)])
    assert list(Path(uri, "_delta_log").glob("*.checkpoint.parquet")), "no checkpoint was written: this test is void"
    assert len(log.refs()) == len(old.refs()) == len(CommitLog.open(uri).refs()) == 102
    assert old.commit([receipt(5)]) == []


def test_where_there_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no commit log"):
        CommitLog.open(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"add": 3}\n', "\0\0\0"])
def test_a_damaged_log_is_told(uri: str, text: str) -> None:
    CommitLog.open(uri).commit([receipt(1)])
    Path(uri, "_delta_log", f"{1:020d}.json").write_text(text)
    with pytest.raises(StoreError, match="cannot be read") as caught:
        CommitLog.open(uri).refs()
    assert uri in str(caught.value)


def test_a_log_that_vanishes_under_a_handle_is_told(uri: str) -> None:
    log = CommitLog.open(uri)
    log.commit([receipt(1)])
    for file in Path(uri, "_delta_log").iterdir():
        file.write_text("gone")
    Path(uri, "_delta_log", f"{2:020d}.json").write_text("gone")
    with pytest.raises(StoreError, match="cannot be read"):
        log.refs()


@pytest.mark.parametrize(
    "path", ["../outside.parquet", "shards/../../outside.parquet", "/etc/passwd", "shards/short-name.parquet"]
)
def test_a_path_that_a_hand_wrote_into_the_log_is_refused(uri: str, path: str) -> None:
    CommitLog.open(uri).commit([receipt(1)])
    add = {"path": path, "size": 1, "partitionValues": {}, "modificationTime": 0, "dataChange": True}
    Path(uri, "_delta_log", f"{2:020d}.json").write_text(json.dumps({"add": add}) + "\n")
    with pytest.raises(StoreError, match="is not shards"):
        CommitLog.open(uri).refs()


def test_two_files_of_a_unit_in_a_hand_edited_log_give_the_same_one_to_everybody(uri: str) -> None:
    """The choice depends on the names, not on the order in which a hand wrote them."""
    chosen = []
    for order in ((0, 1), (1, 0)):
        root = f"{uri}/{order[0]}"
        log = CommitLog.create(root, SCHEMA)
        for version, writer in enumerate(order, start=1):
            ref = receipt(1, writer=writer).shard
            add = {"path": ref.path, "size": ref.size_bytes, "partitionValues": {}, "modificationTime": 0,
                   "dataChange": True}  # fmt: skip
            Path(root, "_delta_log", f"{version:020d}.json").write_text(json.dumps({"add": add}) + "\n")
        chosen.append(log.refs())
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 1


def test_a_thousand_shards_in_one_commit(uri: str) -> None:
    log = CommitLog.open(uri)
    numbers = np.random.default_rng(0).permutation(1000).tolist()
    assert len(log.commit([receipt(n) for n in numbers])) == 1000
    assert DeltaTable(uri).version() == 1
    assert log.refs()[f"{999:032x}"].size_bytes == 1999
