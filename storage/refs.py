"""Which shards a log names, as columns: a million of them in 110 MB, and a `ShardRef` only where one is asked for.

Enters: paths and sizes as the log has them. Leaves: a mapping from unit to `ShardRef`. Costs: 0.4 s a million; the
first look-up by unit 0.2 s and 200 MB more.
"""

import zlib
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.errors import StoreError
from stillroom.storage.order import mix
from stillroom.storage.records import ShardRef
from stillroom.storage.shard import parse_shard_path, shard_path

#: A path with a mark where hexadecimal digits stand.
_PATTERN = np.frombuffer(shard_path("*" * 32, "*" * 64).encode(), np.uint8)
_DIGITS = ord("*") == _PATTERN
_UNIT = slice(int(np.argmax(_DIGITS)), int(np.argmax(_DIGITS)) + 32)
_SHA256 = slice(_UNIT.stop + 1, _UNIT.stop + 65)
_ODD = mix(np.arange(13, dtype=np.uint64)) | np.uint64(1)
_HEXADECIMAL = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdef", np.uint8))


class Refs(Mapping[str, ShardRef]):
    """Committed shards by unit, in the log's order. Equal to any mapping with the same items.

    units: S32 [N]. sha256: S64 [N]. sizes: int64 [N], bytes.
    """

    def __init__(self, units: NDArray[np.bytes_], sha256: NDArray[np.bytes_], sizes: NDArray[np.int64]) -> None:
        self.units, self.sha256, self.sizes = units, sha256, sizes

    @staticmethod
    def of(paths: pa.ChunkedArray, sizes: NDArray[np.int64]) -> "Refs":
        """As named, a unit twice where it is named twice. Raises StoreError for a path that is no shard's."""
        parts = [_split(chunk) for chunk in paths.chunks]
        units = np.concatenate([np.zeros(0, "S32"), *(unit for unit, _ in parts)])
        return Refs(units, np.concatenate([np.zeros(0, "S64"), *(sha256 for _, sha256 in parts)]), sizes)

    def once(self) -> "Refs":
        """Of two files of one unit the one with the smaller name. They can only stem from a log edited by hand, and the
        choice must not depend on its order."""
        keys = np.sort(_folded(self.units))
        if not (keys[1:] == keys[:-1]).any():
            return self
        order = np.lexsort((self.sha256, self.units))
        units = self.units[order]
        first = np.sort(order[np.concatenate([[True], units[1:] != units[:-1]])])
        return Refs(self.units[first], self.sha256[first], self.sizes[first])

    def paths(self) -> list[str]:
        return [
            shard_path(unit.decode(), sha256.decode())
            for unit, sha256 in zip(self.units.tolist(), self.sha256.tolist(), strict=True)
        ]

    def without(self, paths: Container[str]) -> "Refs":
        """Those with other paths."""
        stay = np.array([path not in paths for path in self.paths()], bool)
        return Refs(self.units[stay], self.sha256[stay], self.sizes[stay])

    def state(self) -> tuple[int, int]:
        """(N, a sum over units, digests and sizes): the same for the same set in any order, and of two that differ the
        same by chance once in 2^64. `plus` adds two up."""
        keys = mix(_folded(self.units, self.sha256) + self.sizes.astype(np.uint64) * _ODD[-1])
        return len(self), int(keys.sum(dtype=np.uint64))

    @cached_property
    def _places(self) -> dict[bytes, int]:
        return dict(zip(self.units.tolist(), range(len(self.units)), strict=True))

    def __getitem__(self, unit: str) -> ShardRef:
        return self._ref(self._places[unit.encode()])

    def _ref(self, at: int) -> ShardRef:
        unit, sha256 = self.units[at].decode(), self.sha256[at].decode()
        return ShardRef(unit, shard_path(unit, sha256), sha256, int(self.sizes[at]))

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, str) and unit.encode() in self._places

    def __iter__(self) -> Iterator[str]:
        return (unit.decode() for unit in self.units.tolist())

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        return repr(dict(self))


State = tuple[int, int]


def plus(one: State, other: State) -> State:
    """The state of two sets without a common shard, taken together."""
    return one[0] + other[0], (one[1] + other[1]) % 2**64


def state_text(state: State) -> str:
    """As a commit states it: with a checksum of its own, so that damage to it is not taken for damage to the log."""
    said = f"{state[0]}-{state[1]:016x}"
    return f"{said}-{zlib.crc32(said.encode()):08x}"


def is_state_text(text: str) -> bool:
    """Whether its checksum is right."""
    said, _, checksum = text.rpartition("-")
    return checksum == f"{zlib.crc32(said.encode()):08x}"


def _folded(*columns: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """uint64 [N] that differ where one bit of a row does: its words by odd factors."""
    words = np.concatenate([c.view("<u8").reshape(len(c), c.itemsize // 8) for c in columns], axis=1)
    folded = np.zeros(len(words), np.uint64)
    for word, odd in zip(words.T, _ODD, strict=False):
        folded += word * odd
    return folded


def _split(paths: pa.Array) -> tuple[NDArray[np.bytes_], NDArray[np.bytes_]]:
    """(unit, sha256) of each path. Raises StoreError for the first that is not a shard's."""
    paths = paths.cast(pa.string())
    count = len(paths)
    if not count:
        return np.zeros(0, "S32"), np.zeros(0, "S64")
    offsets = np.frombuffer(paths.buffers()[1], np.int32)[paths.offset : paths.offset + count + 1]
    good: Any = np.diff(offsets) == len(_PATTERN)
    if good.all():
        letters = np.frombuffer(paths.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].reshape(count, -1)
        good = _HEXADECIMAL[letters[:, _DIGITS]].all(axis=1) & (letters[:, ~_DIGITS] == _PATTERN[~_DIGITS]).all(axis=1)
    if not good.all():
        parse_shard_path(str(paths[int(np.argmin(good))]))  # says so
        raise StoreError(f"{paths[int(np.argmin(good))]} in the log is no shard's path")
    unit, sha256 = (np.ascontiguousarray(letters[:, part]) for part in (_UNIT, _SHA256))
    return unit.view("S32").ravel(), sha256.view("S64").ravel()
