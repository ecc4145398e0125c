"""Where a store's bytes lie: one seam for local folders (here) and object stores (remote/bucket.py).

Enters: a store's URI and names relative to it. Leaves: bytes. Costs: a write is temp, fsync, rename, fsync of the
folder; nothing is visible under its name before it is whole.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from uuid import uuid4

import pyarrow as pa

from stillroom.storage.errors import NoStore, StoreError, StoreFull

#: The file that makes a folder a store.
STORE_MARK = "_stillroom/identity.json"

#: The file that makes a folder a store of generations.
GENERATIONS_MARK = "_stillroom/generations.json"


@dataclass(frozen=True)
class FileInfo:
    """name: relative to the root. modified_s: seconds since 1970, by the disk's or the server's clock."""

    name: str
    size_bytes: int
    modified_s: float


class Files(Protocol):
    """Named byte strings under one root. Names are relative POSIX paths inside it."""

    uri: str

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Put `data` under `name`, whole or not at all. Raises StoreFull, StoreError."""

    def read(self, name: str) -> bytes:
        """All bytes of `name`. Raises StoreError if there is none."""

    def open(self, name: str) -> pa.NativeFile:
        """A random-access reader of `name`. Raises StoreError if there is none."""

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """Names in the folder `prefix` (not below it), sorted; empty if there is no such folder."""

    def walk(self) -> Iterator[FileInfo]:
        """Every file under the root, in no order; temporary files of killed writers too."""

    def delete(self, name: str) -> None:
        """Remove `name`; nothing where there is none. Raises StoreError."""

    def holders(self, *tails: str) -> Iterator[str]:
        """Folders, relative to the root ("" for itself), in which there is a file of one of the names `tails`."""

    def free_bytes(self) -> int | None:
        """Room left, or None where nobody can tell."""


def check_name(name: str) -> PurePosixPath:
    """The name as a path. Raises StoreError if it is absolute or climbs out of the store."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise StoreError(
            f"path {name!r} leads out of the store; the log or a snapshot that names it is not to be trusted"
        )
    return path


class LocalFiles:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def write(self, name: str, data: bytes | memoryview) -> None:
        target = self.root / check_name(name)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_to_disk(target.parent)
        except OSError as error:
            with suppress(OSError):  # the first error is the one to tell; a temporary file counts for nothing
                temporary.unlink()
            raise _explain(error, target, len(data)) from error

    def read(self, name: str) -> bytes:
        path = self.root / check_name(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error

    def open(self, name: str) -> pa.NativeFile:
        path = self.root / check_name(name)
        try:
            return pa.memory_map(str(path))
        except OSError as error:
            raise StoreError(f"cannot read {path}: {os.strerror(error.errno) if error.errno else error}") from error

    def exists(self, name: str) -> bool:
        path = self.root / check_name(name)
        try:
            return path.exists()
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error

    def list(self, prefix: str) -> list[str]:
        folder = self.root / check_name(prefix) if prefix else self.root
        try:
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise StoreError(f"cannot list {folder}: {error.strerror}") from error
        return sorted(f"{prefix}/{name}" if prefix else name for name in names if not name.endswith(".tmp"))

    def walk(self) -> Iterator[FileInfo]:
        for folder, _, names in os.walk(self.root, onerror=_raise_unlistable):
            for name in names:
                path = Path(folder, name)
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue  # removed since it was listed
                yield FileInfo(path.relative_to(self.root).as_posix(), found.st_size, found.st_mtime)

    def delete(self, name: str) -> None:
        path = self.root / check_name(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error.strerror}") from error

    def holders(self, *tails: str) -> Iterator[str]:
        for tail in tails:
            for found in self.root.glob(f"**/{tail}"):
                yield found.relative_to(self.root).as_posix().removesuffix(tail).rstrip("/")

    def free_bytes(self) -> int | None:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def sync_to_disk(path: Path) -> None:
    """fsync a file, or a folder after a rename in it: names reach the disk with their folder, not with the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path, size: int) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(
            f"no room for {size:,} bytes at {target.parent}: free some space and run the same command again"
        )
    return StoreError(f"cannot write {target}: {error.strerror}")


def _raise_unlistable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a root that is not there holds nothing
        raise StoreError(f"cannot list {error.filename}: {error.strerror}") from error


def open_files(uri: str) -> Files:
    """The files of a store: a local folder, `file://` or `s3://bucket/prefix`.

    Raises StoreError for a scheme that is not supported, UsageError where the AWS variables are wrong.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if uri.startswith(("s3:", "file:")):
            raise StoreError(f"store {uri}: expected two slashes after the scheme, as in s3://bucket/prefix")
        return LocalFiles(Path(uri).absolute())
    if scheme == "file":
        return LocalFiles(Path(rest))
    if scheme == "s3":
        # pyarrow.fs takes 30 ms to import and starts threads with its first client: only for those who use it.
        from stillroom.storage.remote.bucket import S3Files

        return S3Files(uri)
    raise StoreError(f"store {uri}: scheme {scheme!r} is not supported, expected a local folder or s3://bucket/prefix")


def find_stores(uri: str) -> list[str]:
    """URIs of the stores of every kind at or below `uri`, sorted.

    Raises NoStore if there is no such folder, StoreError if there is no such bucket.
    """
    files = open_files(uri)
    if isinstance(files, LocalFiles) and not files.root.is_dir():
        raise NoStore(f"{uri} is no folder")
    holders = set(files.holders(STORE_MARK, GENERATIONS_MARK))
    return sorted(f"{files.uri}/{folder}" if folder else files.uri for folder in holders)


def content_digest(name: str) -> str | None:
    """The sha256 that a name states of its own content (`…-<sha256>.<extension>`), or None."""
    found = re.search(r"-([0-9a-f]{64})\.[a-z0-9]+$", name)
    return found.group(1) if found else None


def sha256_hex(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
