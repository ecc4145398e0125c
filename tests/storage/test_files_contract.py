"""What every `Files` promises, folder and bucket alike. What only one of them has is in test_files.py, test_s3.py."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import StoreError
from stillroom.storage.files import STORE_MARK, Files, content_digest, find_stores, open_files, sha256_hex
from stillroom.storage.store import create_store, open_store
from tests.s3_server import BUCKET, S3Server
from tests.strategies import random_sequences, tiny_identity, unit_of, write_unit


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.real)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI under which nothing is, for both kinds."""
    if request.param == "local":
        return str(tmp_path)
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def files(root: str) -> Files:
    return open_files(f"{root}/store")


def test_written_bytes_come_back(files: Files) -> None:
    files.write("a/b/c.bin", b"one")
    files.write("a/b/c.bin", memoryview(b"two"))
    assert files.read("a/b/c.bin") == b"two"
    assert files.open("a/b/c.bin").read() == b"two"
    assert files.exists("a/b/c.bin")
    assert not files.exists("a/b/d.bin")
    assert files.list("a/b") == ["a/b/c.bin"]
    assert files.list("a") == ["a/b"]
    assert files.list("") == ["a"]
    assert files.list("nothing/here") == []


def test_a_file_of_many_parts_is_whole_and_read_in_ranges(files: Files) -> None:
    """12 MiB is a multipart upload in a bucket."""
    data = np.random.default_rng(1).bytes(12 << 20)
    files.write("big.bin", data)
    with files.open("big.bin") as source:
        assert source.size() == len(data)
        assert source.seek(7 << 20) == 7 << 20
        assert source.read(100) == data[7 << 20 : (7 << 20) + 100]
        assert source.read_at(50, 3) == data[3:53]
        source.seek(len(data) - 5)
        assert source.read() == data[-5:]
        source.seek(0)
        assert sha256_hex(memoryview(source.read_buffer())) == sha256_hex(data)
    assert files.read("big.bin") == data


def test_an_empty_file_is_one(files: Files) -> None:
    files.write("empty", b"")
    assert files.read("empty") == b""
    assert files.exists("empty")
    assert [(found.name, found.size_bytes) for found in files.walk()] == [("empty", 0)]


def test_a_footer_is_read_without_the_file(files: Files) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": np.arange(1000)}), sink)
    files.write("t.parquet", memoryview(sink.getvalue()))
    assert pq.read_metadata(files.open("t.parquet")).num_rows == 1000
    assert pq.ParquetFile(files.open("t.parquet")).read(use_threads=False)["a"][999].as_py() == 999


def test_missing_names_are_told(files: Files) -> None:
    files.write("other.bin", b"x")
    for read in (files.read, files.open):
        with pytest.raises(StoreError, match=r"cannot read .*store/gone\.bin: (No such file|there is no such object)"):
            read("gone.bin")


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "a\\b", "a\0b"])
def test_names_that_lead_out_of_the_store_are_refused(files: Files, name: str) -> None:
    acts: list[Callable[[str], object]] = [files.read, files.open, files.exists, files.delete]
    acts.append(lambda n: files.write(n, b"x"))
    acts += [files.list] if name else []
    for act in acts:
        with pytest.raises(StoreError, match="leads out of the store"):
            act(name)


def test_every_file_is_walked_with_its_size_and_age(files: Files) -> None:
    before = time.time()
    for name, size in (("a", 1), ("b/c", 2), ("b/d/e", 3)):
        files.write(name, b"x" * size)
    found = list(files.walk())
    assert sorted((f.name, f.size_bytes) for f in found) == [("a", 1), ("b/c", 2), ("b/d/e", 3)]
    # Servers state whole seconds.
    assert all(before - 1 <= f.modified_s <= time.time() + 1 for f in found)


def test_a_root_that_is_not_there_holds_nothing(root: str) -> None:
    files = open_files(f"{root}/nowhere")
    assert list(files.walk()) == []
    assert list(files.holders(STORE_MARK)) == []
    assert not files.exists("x")


def test_what_is_deleted_is_gone_and_may_be_deleted_again(files: Files) -> None:
    files.write("a/b", b"1")
    files.write("a/c", b"2")
    for _ in range(2):
        files.delete("a/b")
        assert files.list("a") == ["a/c"]
        assert [f.name for f in files.walk()] == ["a/c"]
    files.delete("a/c")
    assert list(files.walk()) == []
    assert not files.exists("a/c")


def test_writers_of_one_name_leave_one_whole_file(files: Files) -> None:
    contents = [bytes([n]) * 300_000 for n in range(4)]
    threads = [threading.Thread(target=files.write, args=("same", data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.read("same") in contents


def test_stores_are_found_below_a_root(root: str) -> None:
    for place in ("one", "deep/er/two", "one/shards"):
        open_files(f"{root}/{place}").write(STORE_MARK, b"{}")
    open_files(f"{root}/none").write("something/else.json", b"{}")
    found = find_stores(root)
    assert {f"{root}/one", f"{root}/deep/er/two"} <= set(found)
    assert found == sorted(found)
    assert find_stores(f"{root}/deep/er/two") == [f"{root}/deep/er/two"]
    assert find_stores(f"{root}/none") == []


def test_a_store_is_founded_filled_and_read(root: str) -> None:
    sequences = random_sequences(np.random.default_rng(2), 12)
    store = create_store(f"{root}/store", tiny_identity())
    parts = [sequences[at : at + 5] for at in range(0, 12, 5)]
    store.save_plan([unit_of(part) for part in parts])
    assert len(store.commit([write_unit(store, part) for part in parts])) == 3
    again = open_store(f"{root}/store")
    assert again.identity == store.identity
    assert {s.sequence.digest for s in again.sequences()} == {s.digest for s in sequences}
    assert len(again.snapshot().refs) == 3
    assert again.snapshot().uri == store.uri == f"{root}/store"
    receipt = write_unit(again, sequences[:5], machine="another")
    assert again.commit([receipt]) == [], "one shard of a unit counts"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        (f"shards/{'0' * 32}-{'ab' * 32}.parquet", "ab" * 32),
        (f"_stillroom/head-{'12' * 32}.safetensors", "12" * 32),
        (f"shards/{'0' * 32}-{'AB' * 32}.parquet", None),
        (f"shards/{'ab' * 32}.parquet", None),
        ("_stillroom/identity.json", None),
    ],
)
def test_names_that_state_their_content(name: str, digest: str | None) -> None:
    assert content_digest(name) == digest
