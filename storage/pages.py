"""What a Parquet file claims to hold, looked at before anything of it is decoded.

Enters: a file's bytes, its footer, and what each column may hold. Leaves: nothing, or ValueError. Costs: 20 µs a page,
a page being about 1 MB: 4 % of decoding it.

A digest says that bytes are those that were committed, not that whoever wrote them meant well. Parquet takes sizes
from two places, the footer and the head of each page, and believes both: a page of a hundred bytes may ask for 2 GB,
or stand for 2^31 values by a dictionary or a run. Our own files have neither, so every value takes its bytes in a page;
what is left to check is that pages and footer say the same, and not too much.

Page heads are Thrift structures in the compact protocol (parquet-format, `parquet.thrift`; thrift-compact-protocol.md).
"""

from collections.abc import Mapping
from typing import Any

#: Of what a row group may be decoded from, all its columns together. A sequence that is alone in its group has a
#: million tokens at k = 64, or 65,536 with int16 hidden states of D = 4,096.
MOST_BYTES = 2**29

_DATA_PAGE = 0
_PLAIN, _BYTE_STREAM_SPLIT = 0, 9
_BINARY, _STRUCT = 8, 12
_DEEPEST = 4


def check_group(data: memoryview, group: Any, value_bytes: Mapping[str, int]) -> None:
    """Look at every page of a row group.

    data: the whole file. group: its metadata, as pyarrow gives it. value_bytes: the least that a value takes, by column
    path. Raises ValueError naming the column that claims more than it may, or something else in its pages than in the
    footer.
    """
    data = data.cast("B")  # Arrow's buffers come as signed bytes
    chunks = [group.column(number) for number in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if size > MOST_BYTES or any(chunk.total_uncompressed_size < 0 for chunk in chunks):
        raise ValueError(f"it claims to hold {size:,} bytes, expected at most {MOST_BYTES:,}")
    for chunk in chunks:
        name, rows = chunk.path_in_schema, group.num_rows
        most = rows + chunk.total_uncompressed_size // value_bytes[name] if "." in name else rows
        if not rows <= chunk.num_values <= most:
            raise ValueError(
                f"column {name} claims {chunk.num_values:,} values in {rows:,} rows and "
                f"{chunk.total_uncompressed_size:,} bytes"
            )
        if chunk.dictionary_page_offset is not None:
            raise ValueError(f"column {name} has a dictionary, which no shard has")
        _check_pages(data, chunk, name)


def _check_pages(data: memoryview, chunk: Any, name: str) -> None:
    at = int(chunk.data_page_offset)
    end = at + int(chunk.total_compressed_size)
    if not 4 <= at <= end <= len(data):
        raise ValueError(f"column {name} lies at {at:,} … {end:,} of a file of {len(data):,} bytes")
    values = size = 0
    while at < end:
        head = _Head(data, at, end)
        try:
            page = head.struct()
            kind, plain, packed = page[1], page[2], page[3]
            count, encoding = page[5][1], page[5][2]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"column {name} has no data page at byte {at:,}") from error
        if kind != _DATA_PAGE or encoding not in (_PLAIN, _BYTE_STREAM_SPLIT) or min(plain, packed, count) < 0:
            raise ValueError(f"column {name} has a page of kind {kind}, encoding {encoding} at byte {at:,}")
        values, size = values + count, size + plain + head.at - at
        at = head.at + packed
    if (values, size, at) != (chunk.num_values, chunk.total_uncompressed_size, end):
        raise ValueError(
            f"column {name} has {values:,} values in {size:,} bytes by its pages, "
            f"{chunk.num_values:,} in {chunk.total_uncompressed_size:,} by the footer"
        )


class _Head:
    """Reads one structure. Raises IndexError at the end of the data, TypeError for what no page head has."""

    def __init__(self, data: memoryview, at: int, end: int) -> None:
        self._data, self.at, self._end = data, at, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by number; integers and structures are kept, all else is passed over."""
        if depth > _DEEPEST:
            raise TypeError("too deep")
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            step, kind = byte >> 4, byte & 15
            number = number + step if step else self._zigzag()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise TypeError("lists and maps are not part of a page head")

    def _skip(self, count: int) -> None:
        self.at += count

    def _byte(self) -> int:
        if self.at >= self._end:
            raise IndexError("page head cut short")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise TypeError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
