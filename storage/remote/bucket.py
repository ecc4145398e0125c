"""A store's bytes in a bucket: `Files` over pyarrow's S3 filesystem.

Enters: names relative to s3://bucket/prefix. Leaves: bytes. Costs: one request to write up to 5 MiB, two to read; a
listing takes one for 1,000 names.

A write is one PUT, or for large objects a multipart upload: in both cases nothing is visible before all is. A killed
multipart upload leaves parts that a bucket's lifecycle rule (AbortIncompleteMultipartUpload) removes.
"""

import io
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from stillroom.storage.errors import StoreError
from stillroom.storage.files import FileInfo, check_name
from stillroom.storage.remote.s3 import Connection, Location, connect

T = TypeVar("T")


class S3Files:
    """Objects below a prefix of a bucket."""

    def __init__(self, uri: str, connection: Connection | None = None) -> None:
        self._at = Location.parse(uri)
        self._connection = connection or connect()
        self._filesystem = self._connection.filesystem
        self._bucket_seen = False
        self.uri = self._at.uri

    def write(self, name: str, data: bytes | memoryview) -> None:
        key = self._key(name)

        def put() -> None:
            with self._filesystem.open_output_stream(key) as sink:
                sink.write(data)

        self._call("write", name, put, patient=True)

    def read(self, name: str) -> bytes:
        key = self._key(name)

        def get() -> bytes:
            with self._filesystem.open_input_file(key) as source:
                return bytes(source.readall())

        return self._call("read", name, get)

    def open(self, name: str) -> pa.NativeFile:
        """A reader that fetches the ranges asked for, each with retries."""
        key = self._key(name)
        source = self._call("read", name, lambda: self._filesystem.open_input_file(key))
        return pa.PythonFile(_Ranges(source, lambda action: self._call("read", name, action)), mode="r")

    def exists(self, name: str) -> bool:
        info = self._info(name)
        if info.type == fs.FileType.NotFound:
            self._require_bucket()
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        found = self._select(prefix, recursive=False)
        names = [self._name(info.path) for info in found if not info.path.endswith(".tmp")]
        return sorted(names)

    def walk(self) -> Iterator[FileInfo]:
        for info in self._select("", recursive=True):
            if info.type == fs.FileType.File:
                yield FileInfo(self._name(info.path), int(info.size), info.mtime_ns / 1e9)

    def delete(self, name: str) -> None:
        key = self._key(name)

        def remove() -> None:
            try:
                self._filesystem.delete_file(key)
            except FileNotFoundError:
                return  # by an earlier attempt whose answer was lost, or by somebody else: it is gone

        self._call("delete", name, remove)

    def holders(self, *tails: str) -> Iterator[str]:
        """By folders, and not below a holder: a store's shards are not listed to find the store beside it."""
        waiting = [""]
        while waiting:
            folder = waiting.pop(0)
            names = [f"{folder}/{tail}" if folder else tail for tail in tails]
            if any(self._info(name).type == fs.FileType.File for name in names):
                yield folder
                continue
            found = self._select(folder, recursive=False)
            waiting += sorted(self._name(info.path) for info in found if info.type == fs.FileType.Directory)

    def free_bytes(self) -> int | None:
        return None

    def _key(self, name: str) -> str:
        return f"{self._at.path}/{check_name(name)}"

    def _name(self, path: str) -> str:
        return str(path.removeprefix(self._at.path + "/"))

    def _info(self, name: str) -> fs.FileInfo:
        key = self._key(name)
        return self._call("read", name, lambda: self._filesystem.get_file_info(key))

    def _select(self, prefix: str, *, recursive: bool) -> Seq[fs.FileInfo]:
        folder = self._key(prefix) if prefix else self._at.path
        selector = fs.FileSelector(folder, recursive=recursive, allow_not_found=True)
        found = self._call("list", prefix, lambda: self._filesystem.get_file_info(selector))
        if not found:
            self._require_bucket()
        return list(found)

    def _require_bucket(self) -> None:
        """pyarrow takes a bucket that is not there for one without the object."""
        if not self._bucket_seen:
            info = self._call("read", "", lambda: self._filesystem.get_file_info(self._at.bucket))
            if info.type == fs.FileType.NotFound:
                raise StoreError(
                    f"store {self.uri}: there is no bucket {self._at.bucket} at "
                    f"{self._connection.settings.endpoint or 'AWS'}; create it or correct the URI"
                )
        self._bucket_seen = True

    def _call(self, doing: str, name: str, action: Callable[[], T], *, patient: bool = False) -> T:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            return self._connection.call(doing, where, action, patient=patient)
        except FileNotFoundError as error:
            self._require_bucket()
            raise StoreError(f"cannot {doing} {where}: there is no such object") from error


class _Ranges(io.RawIOBase):
    """A Python file over an object, so that every range read can be tried again."""

    def __init__(self, source: pa.NativeFile, call: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._source, self._call = source, call
        self._size = int(source.size())
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at
        wanted = max(0, min(size if size >= 0 else self._size, self._size - start))
        data = self._call(lambda: bytes(self._source.read_at(wanted, start))) if wanted else b""
        self._at = start + len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()
