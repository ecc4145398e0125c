"""A local cache of shards: what a student reads from a bucket again and again lies on its disk once.

Enters: files whose names state their sha256. Leaves: memory maps of local copies. Costs: a fetch hashes what it writes,
and a copy is hashed again when a process opens it for the first time (about 1 GB/s); room up to a limit, least recently
used first out. What is being fetched comes on top of the limit.

    <cache>/shards/lock               held while room is made and a copy becomes visible
    <cache>/shards/bytes              how much all copies take, or a little more
    <cache>/shards/<aa>/lock          held while a file of these first two digits is fetched: two students fetch it once
    <cache>/shards/<aa>/<sha256>      a copy; its mtime is its last use

Names are content, so stores share copies and a copy is never stale. A copy that is evicted while it is mapped stays
readable until its reader lets go. Killed processes leave a temporary file at most, which the next fetch removes.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pyarrow as pa

from stillroom.storage.errors import CorruptShard, StoreError, StoreFull, UsageError
from stillroom.storage.files import FileInfo, Files, LocalFiles, content_digest

LIMIT_BYTES = 10_000_000_000
_CHUNK_BYTES = 16 << 20
_NAME_LENGTH = 64
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """`$STILLROOM_CACHE`, else `$XDG_CACHE_HOME/stillroom`, else `~/.cache/stillroom`."""
    named = os.environ.get("STILLROOM_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom"


def cache_limit() -> int:
    """`$STILLROOM_CACHE_BYTES`, else 10 GB. Raises UsageError."""
    text = os.environ.get("STILLROOM_CACHE_BYTES", "").strip()
    if not text:
        return LIMIT_BYTES
    if not text.isdigit():
        raise UsageError(f"STILLROOM_CACHE_BYTES is {text!r}, expected a number of bytes")
    return int(text)


def cached_files(files: Files) -> Files:
    """`files` behind this machine's cache; a local folder as it is."""
    if isinstance(files, LocalFiles):
        return files
    return CachedFiles(files, ShardCache(cache_folder() / "shards", cache_limit()))


class CachedFiles:
    """Opens files that are named by their content through a cache; all else passes through."""

    def __init__(self, files: Files, cache: "ShardCache") -> None:
        self._files, self._cache = files, cache
        self.uri = files.uri

    def open(self, name: str) -> pa.NativeFile:
        sha256 = content_digest(name)
        return self._files.open(name) if sha256 is None else self._cache.open(self._files, name, sha256)

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._files.write(name, data)

    def read(self, name: str) -> bytes:
        return self._files.read(name)

    def exists(self, name: str) -> bool:
        return self._files.exists(name)

    def list(self, prefix: str) -> list[str]:
        return self._files.list(prefix)

    def walk(self) -> Iterator[FileInfo]:
        return self._files.walk()

    def delete(self, name: str) -> None:
        self._files.delete(name)

    def holders(self, *tails: str) -> Iterator[str]:
        return self._files.holders(*tails)

    def free_bytes(self) -> int | None:
        return self._files.free_bytes()


class ShardCache:
    """A folder of copies, shared by threads and processes of one machine.

    limit_bytes: of all copies together. slack: the part of the limit that is freed at once when it is reached, since
    finding the least recently used of 5,000 copies takes 33 ms.
    """

    def __init__(self, folder: Path, limit_bytes: int, slack: float = 0.05) -> None:
        self._folder, self._limit, self._slack = folder, limit_bytes, slack
        self._verified: dict[str, tuple[int, int]] = {}  # sha256 → (inode, bytes) of copies this process has hashed

    def open(self, files: Files, name: str, sha256: str) -> pa.NativeFile:
        """A memory map of `name`, fetched unless a good copy is here.

        Raises CorruptShard where the store's own bytes do not have the digest, StoreFull where the cache's disk is
        full, StoreError.
        """
        stripe = self._folder / sha256[:2]
        path = stripe / sha256
        try:
            stripe.mkdir(parents=True, exist_ok=True)
            found = self._mapped(path, sha256)
            if found is not None:
                return found
            with _locked(stripe / "lock"):
                found = self._mapped(path, sha256)  # fetched by another while we waited
                return found if found is not None else self._fetched(files, name, sha256, path)
        except OSError as error:
            raise self._explained(error, name) from error

    def _mapped(self, path: Path, sha256: str) -> pa.NativeFile | None:
        """The copy, if there is one and it is good; a damaged one is removed."""
        try:
            source = pa.memory_map(str(path))
            found = path.stat()
        except FileNotFoundError:
            return None
        state = found.st_ino, found.st_size
        if self._verified.get(sha256) != state:
            if hashlib.sha256(memoryview(source.read_buffer())).hexdigest() != sha256:
                source.close()
                path.unlink(missing_ok=True)
                return None
            source.seek(0)
            self._verified[sha256] = state
        with suppress(FileNotFoundError):  # evicted in between: the map holds its bytes
            _touch(path)
        return source

    def _fetched(self, files: Files, name: str, sha256: str, path: Path) -> pa.NativeFile:
        for stale in path.parent.glob("*.tmp"):  # we hold the stripe's lock: their writers are dead
            stale.unlink(missing_ok=True)
        temporary = path.with_name(f"{sha256}.{uuid4().hex}.tmp")
        try:
            with files.open(name) as source:
                size = int(source.size())
                if size > self._limit:
                    raise StoreError(
                        f"{files.uri}/{name} has {size:,} bytes, more than the whole cache may hold ({self._limit:,}): "
                        "raise STILLROOM_CACHE_BYTES"
                    )
                found = self._copied(source, temporary)
            if found != sha256:
                raise CorruptShard(
                    f"{files.uri}/{name} has sha256 {found[:16]}…, its name says {sha256[:16]}…: the object was "
                    "damaged or replaced; put back a copy of it, or run `stillroom verify` on the store"
                )
            _touch(temporary)
            mapped, state = pa.memory_map(str(temporary)), temporary.stat()
            with _locked(self._folder / "lock"):
                self._reserve(size)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._verified[sha256] = state.st_ino, state.st_size
        return mapped

    def _copied(self, source: pa.NativeFile, target: Path) -> str:
        """Copy and return the sha256. On a full disk all other copies make way once, then the error is raised."""
        try:
            return _copy(source, target)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        target.unlink(missing_ok=True)
        with _locked(self._folder / "lock"):
            self._evict(self._limit)
        source.seek(0)
        return _copy(source, target)

    def _reserve(self, size: int) -> None:
        """Count `size` more bytes, after making room for them where they would not fit."""
        counter = self._folder / "bytes"
        try:
            total = int(counter.read_text())
        except (FileNotFoundError, ValueError):
            total = self._limit
        if total + size > self._limit:
            total = self._evict(size)
        counter.write_text(str(total + size))  # before the copy is there: who dies in between has counted too much

    def _evict(self, size: int) -> int:
        """Where the limit would be passed, remove copies, least recently used first, until `size` more bytes leave the
        slack free. Returns the bytes that stay."""
        copies = []
        for stripe in self._folder.iterdir():
            if stripe.is_dir():
                copies += [(e.stat(), e.path) for e in os.scandir(stripe) if len(e.name) == _NAME_LENGTH]
        total = sum(found.st_size for found, _ in copies)
        goal = self._limit * (1 - self._slack) if total + size > self._limit else self._limit
        for found, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if total + size <= goal:
                break
            Path(path).unlink(missing_ok=True)
            total -= found.st_size
        return total

    def _explained(self, error: OSError, name: str) -> StoreError:
        if error.errno in _FULL:
            return StoreFull(
                f"no room for a copy of {name} in the cache {self._folder}: free some space, point STILLROOM_CACHE at "
                "another disk, or lower STILLROOM_CACHE_BYTES"
            )
        return StoreError(f"cannot use the cache {self._folder}: {error.strerror or error}; set STILLROOM_CACHE")


def _touch(path: Path) -> None:
    """Used now. The kernel's own stamps are 4 ms coarse."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _copy(source: pa.NativeFile, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("xb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among threads and processes. The kernel lets go when a holder dies."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
