"""cache.py: what is fetched once is read from here, is what its name says, and stays within its limit."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import CorruptShard, StoreError, UsageError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.remote.cache import (
    LIMIT_BYTES,
    CachedFiles,
    ShardCache,
    cache_folder,
    cache_limit,
    cached_files,
)
from tests.processes import at_once, on_small_disk

SIZE = 10_000


class Remote(LocalFiles):
    """A folder in a bucket's place that remembers what was fetched from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[str] = []

    def open(self, name: str) -> pa.NativeFile:
        self.fetched.append(name)
        return super().open(name)


def content(number: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(number).bytes(size)


def shard_name(number: int, size: int = SIZE) -> str:
    return f"shards/{number:032x}-{sha256_hex(content(number, size))}.parquet"


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    files = Remote(tmp_path / "remote")
    for number in range(8):
        files.write(shard_name(number), content(number))
    return files


def cached(remote: Remote, folder: Path, copies: int = 100, slack: float = 0.0) -> CachedFiles:
    return CachedFiles(remote, ShardCache(folder / "cache", copies * SIZE, slack))


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").rglob("*") if len(path.name) == 64)


def test_a_shard_is_fetched_once(remote: Remote, tmp_path: Path) -> None:
    for _ in range(2):  # the second cache is another process' to the first
        files = cached(remote, tmp_path)
        for _ in range(2):
            with files.open(shard_name(0)) as source:
                assert source.tell() == 0
                assert source.read() == content(0)
    assert remote.fetched == [shard_name(0)]
    assert copies(tmp_path) == [sha256_hex(content(0))]


def test_what_states_no_content_passes_through(remote: Remote, tmp_path: Path) -> None:
    files = cached(remote, tmp_path)
    files.write("_stillroom/identity.json", b"{}")
    assert files.open("_stillroom/identity.json").read() == files.read("_stillroom/identity.json") == b"{}"
    assert files.exists("_stillroom/identity.json")
    assert files.list("_stillroom") == ["_stillroom/identity.json"]
    assert list(files.holders("_stillroom/identity.json")) == [""]
    assert len(list(files.walk())) == 9
    files.delete("_stillroom/identity.json")
    assert not files.exists("_stillroom/identity.json")
    assert files.uri == remote.uri
    assert files.free_bytes() is not None
    assert copies(tmp_path) == []


def test_the_least_recently_used_makes_way_and_its_readers_read_on(remote: Remote, tmp_path: Path) -> None:
    files = cached(remote, tmp_path, copies=3)
    first = files.open(shard_name(0))
    for number in (1, 2, 1, 0, 3):  # 2 is now the oldest
        files.open(shard_name(number))
    assert copies(tmp_path) == sorted(sha256_hex(content(n)) for n in (0, 1, 3))
    for number in (4, 5, 6):
        files.open(shard_name(number))
    assert sha256_hex(content(0)) not in copies(tmp_path)
    assert first.read() == content(0), "a mapped copy outlives its name"
    assert files.open(shard_name(0)).read() == content(0), "and is fetched again"
    assert remote.fetched.count(shard_name(0)) == 2


@settings(deadline=None, max_examples=40)
@given(used=st.lists(st.integers(0, 7), max_size=30), limit=st.integers(1, 5))
def test_the_cache_holds_the_last_used(tmp_path_factory: pytest.TempPathFactory, used: list[int], limit: int) -> None:
    folder = tmp_path_factory.mktemp("lru")
    remote = Remote(folder / "remote")
    for number in set(used):
        remote.write(shard_name(number), content(number))
    files = cached(remote, folder, copies=limit)
    held: list[int] = []  # the model: most recently used last
    fetches = 0
    for number in used:
        assert files.open(shard_name(number)).read() == content(number)
        fetches += number not in held
        held = [*(n for n in held if n != number), number][-limit:]
    assert copies(folder) == sorted(sha256_hex(content(n)) for n in held)
    assert len(remote.fetched) == fetches


def test_room_is_made_for_several_at_once(remote: Remote, tmp_path: Path) -> None:
    files = cached(remote, tmp_path, copies=6, slack=0.5)
    for number in range(6):
        files.open(shard_name(number))
    assert len(copies(tmp_path)) == 6, "the limit itself may be used"
    files.open(shard_name(6))
    assert copies(tmp_path) == sorted(sha256_hex(content(n)) for n in (4, 5, 6))


@pytest.mark.parametrize("count", [None, "", "many", "0", "999999999"])
def test_a_wrong_count_costs_a_look_and_no_more(remote: Remote, tmp_path: Path, count: str | None) -> None:
    """A count that is lost or too large is put right. One that is too small (nobody writes such) is, once reached."""
    files = cached(remote, tmp_path, copies=3)
    for number in range(3):
        files.open(shard_name(number))
    counter = tmp_path / "cache" / "bytes"
    counter.unlink() if count is None else counter.write_text(count)
    for number in range(3, 8):
        files.open(shard_name(number))
    assert copies(tmp_path) == sorted(sha256_hex(content(n)) for n in (5, 6, 7))
    assert counter.read_text() == str(3 * SIZE)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grown"])
def test_a_damaged_copy_is_fetched_again(remote: Remote, tmp_path: Path, damage: str) -> None:
    cached(remote, tmp_path).open(shard_name(0)).close()
    (copy,) = (tmp_path / "cache").rglob(sha256_hex(content(0)))
    data = bytearray(copy.read_bytes())
    data[5000] ^= 1
    copy.write_bytes({"flip": bytes(data), "cut": bytes(data[:100]), "empty": b"", "grown": content(0) + b"x"}[damage])
    assert cached(remote, tmp_path).open(shard_name(0)).read() == content(0)
    assert remote.fetched == [shard_name(0)] * 2
    assert copy.read_bytes() == content(0)


def test_a_damaged_object_is_refused_and_not_kept(remote: Remote, tmp_path: Path) -> None:
    remote.write(shard_name(0), content(1))
    with pytest.raises(CorruptShard, match=r"remote/shards/0+-.*has sha256 .*its name says .*stillroom verify"):
        cached(remote, tmp_path).open(shard_name(0))
    assert copies(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_missing_object_is_told(remote: Remote, tmp_path: Path) -> None:
    remote.delete(shard_name(0))
    with pytest.raises(StoreError, match=r"cannot read .*remote/shards/"):
        cached(remote, tmp_path).open(shard_name(0))


def test_a_file_larger_than_the_limit_is_told(remote: Remote, tmp_path: Path) -> None:
    files = cached(remote, tmp_path, copies=1)
    files.open(shard_name(0))
    big = f"shards/big-{sha256_hex(content(9, SIZE + 1))}.parquet"
    remote.write(big, content(9, SIZE + 1))
    with pytest.raises(StoreError, match=r"has 10,001 bytes, more than .*\(10,000\): raise STILLROOM_CACHE_BYTES"):
        files.open(big)
    assert copies(tmp_path) == [sha256_hex(content(0))], "nothing made way for it"


def test_what_a_killed_fetch_left_is_removed(remote: Remote, tmp_path: Path) -> None:
    sha256 = sha256_hex(content(0))
    stale = tmp_path / "cache" / sha256[:2] / f"{'1' * 64}.abc.tmp"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    cached(remote, tmp_path).open(shard_name(0))
    assert not stale.exists()


def test_a_cache_folder_that_cannot_be_is_told(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot use the cache .*cache: .*set STILLROOM_CACHE"):
        cached(remote, tmp_path).open(shard_name(0))


def test_where_and_how_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STILLROOM_CACHE", "STILLROOM_CACHE_BYTES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "stillroom"
    assert cache_limit() == LIMIT_BYTES
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "stillroom"
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("STILLROOM_CACHE_BYTES", "123456")
    assert cache_folder() == tmp_path / "here"
    assert cache_limit() == 123456
    monkeypatch.setenv("STILLROOM_CACHE_BYTES", "10 GB")
    with pytest.raises(UsageError, match="STILLROOM_CACHE_BYTES is '10 GB', expected a number of bytes"):
        cache_limit()
    local = LocalFiles(tmp_path)
    assert cached_files(local) is local, "a folder needs no copies"


READERS = """
import sys
from pathlib import Path
import numpy as np
from tests.storage.remote.test_cache import Remote, cached, content, shard_name
folder, seed, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
remote = Remote(folder / "remote")
files = cached(remote, folder, copies=limit)
print("ready", flush=True)
sys.stdin.readline()
for number in np.random.default_rng(seed).integers(0, 8, 100).tolist():
    assert files.open(shard_name(number)).read() == content(number)
print(len(remote.fetched))
"""


@pytest.mark.real
@pytest.mark.parametrize("limit", [3, 8])
def test_processes_share_a_cache(remote: Remote, tmp_path: Path, limit: int) -> None:
    """Every read is right while others evict; with room for all, each shard is fetched once in all."""
    fetched = [int(said) for said in at_once(READERS, [(tmp_path, seed, limit) for seed in range(3)])]
    assert len(copies(tmp_path)) == limit
    if limit == 8:
        assert sum(fetched) == 8


FULL = """
import sys
from pathlib import Path
from stillroom.storage.errors import StoreFull
from tests.storage.remote.test_cache import Remote, cached, content, copies, shard_name
room = Path(sys.argv[1])
remote = Remote(room.parent / "remote")
files = cached(remote, room)
for number in range(8):
    with files.open(shard_name(number)) as source:
        assert source.read() == content(number)
print(len(copies(room)))
for copy in list((room / "cache").rglob("?" * 64)):
    copy.unlink()
try:
    with (room / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 1024):
            pass
except OSError:
    pass
try:
    files.open(shard_name(0))
except StoreFull as error:
    print(error)
"""


@pytest.mark.real
def test_a_full_disk_makes_copies_give_way_and_then_is_told(remote: Remote, tmp_path: Path) -> None:
    """A real full disk: a tmpfs of 64 KiB holds five of the eight copies; then something else fills it."""
    room = tmp_path / "room"
    room.mkdir()
    held, told = on_small_disk(FULL, room, "64k").splitlines()
    assert 1 <= int(held) < 8
    assert f"no room for a copy of {shard_name(0)} in the cache {room}/cache: free some space" in told
