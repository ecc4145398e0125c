"""Side files of the hidden tier: the calibration vector, and the name of the teacher's output head.

Enters: a `Calibration`. Leaves: a small Parquet file whose name holds its digest, and back. Costs: 8 bytes a channel.

    _stillroom/calibration-<sha256>.parquet   channel_scale float32 [D], channel_offset float32 [D], uncompressed
    _stillroom/head-<sha256>.safetensors      written by workers/head.py, read by pipeline/student/full_logits.py

The digest of the calibration is part of the store's identity: other vectors would read other numbers out of the same
codes. The head follows from the weights, which are part of the identity already.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.records import Float32

FOLDER = "_stillroom"

#: Of the head's metadata.
HEAD_FORMAT = 1

#: More channels than any model has: what a file may make us allocate.
MOST_CHANNELS = 2**20

SCHEMA = pa.schema([pa.field(name, pa.float32(), nullable=False) for name in ("channel_scale", "channel_offset")])

_HEAD = re.compile(r"_stillroom/head-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a channel's values are measured from, and in which unit.

    channel_scale: float32 [D], positive. channel_offset: float32 [D]. Raises ValueError where they are not.
    """

    channel_scale: Float32
    channel_offset: Float32

    def __post_init__(self) -> None:
        scale, offset = self.channel_scale, self.channel_offset
        if scale.dtype != np.float32 or offset.dtype != np.float32:
            raise ValueError(f"channel_scale {scale.dtype} and channel_offset {offset.dtype}, expected both float32")
        if scale.ndim != 1 or scale.shape != offset.shape or not 1 <= len(scale) <= MOST_CHANNELS:
            raise ValueError(
                f"channel_scale {scale.shape} and channel_offset {offset.shape}, "
                f"expected both [D] with D in 1 … {MOST_CHANNELS:,}"
            )
        good = np.isfinite(scale) & (scale > 0) & np.isfinite(offset)
        if not good.all():
            channel = int(np.argmin(good))
            raise ValueError(
                f"channel {channel} has scale {scale[channel]} and offset {offset[channel]}, "
                "expected a positive and a finite number"
            )

    @property
    def width(self) -> int:
        """D."""
        return len(self.channel_scale)


def calibration_path(sha256: str) -> str:
    return f"{FOLDER}/calibration-{sha256}.parquet"


def head_path(sha256: str) -> str:
    return f"{FOLDER}/head-{sha256}.safetensors"


def head_digest(path: str) -> str:
    """The digest in a head's name. Raises StoreError if it is not one."""
    match = _HEAD.fullmatch(path)
    if match is None:
        raise StoreError(f"{path!r} is not the name of an output head, expected {head_path('<sha256>')}")
    return match[1]


def find_head(files: Files) -> str:
    """The path of the store's output head. Raises StoreError unless there is exactly one."""
    found = [name for name in files.list(FOLDER) if _HEAD.fullmatch(name)]
    if len(found) != 1:
        stated = "no output head" if not found else f"{len(found)} output heads ({', '.join(found)})"
        raise StoreError(
            f"store {files.uri} has {stated} in {FOLDER}/, expected one: the teacher writes it when the hidden tier "
            "is founded; `stillroom verify` says which file was damaged, or copy it back from where the store came"
        )
    return found[0]


def save_calibration(files: Files, calibration: Calibration) -> str:
    """Write the vectors and return their digest. Raises StoreFull, StoreError."""
    columns = [pa.array(values) for values in (calibration.channel_scale, calibration.channel_offset)]
    sink = pa.BufferOutputStream()
    # Without compression, dictionaries or statistics: what the file holds is as long as the file.
    pq.write_table(
        pa.table(columns, schema=SCHEMA), sink, compression="none", use_dictionary=False, write_statistics=False,
        write_page_checksum=True, store_schema=False,
    )  # fmt: skip
    data = sink.getvalue()
    digest = sha256_hex(memoryview(data))
    files.write(calibration_path(digest), memoryview(data))
    return digest


def load_calibration(files: Files, sha256: str) -> Calibration:
    """The vectors of this digest. Raises StoreError if the file is missing, CorruptShard if it is not what it was."""
    where = f"{files.uri}/{calibration_path(sha256)}"
    data = files.read(calibration_path(sha256))
    found = sha256_hex(data)
    if found != sha256:
        raise CorruptShard(
            f"{where} has sha256 {found[:16]}…, the identity states {sha256[:16]}…: the file was damaged or replaced, "
            "and no hidden state can be read without it; put back a copy of it"
        )
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        _require_plain(file)
        table = file.read(use_threads=False)
        return Calibration(*(table.column(name).combine_chunks().to_numpy() for name in SCHEMA.names))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShard(f"{where} is no calibration: {' '.join(str(error).split())}") from error


def _require_plain(file: pq.ParquetFile) -> None:
    """Raises ValueError where reading the file could give something else, or take more memory, than it says."""
    if not file.schema_arrow.equals(SCHEMA):
        columns = ", ".join(f"{field.name} {field.type}" for field in file.schema_arrow)
        raise ValueError(f"it has columns {columns}; expected channel_scale and channel_offset, float32")
    metadata = file.metadata
    chunks = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(len(SCHEMA))]
    if metadata.num_rows > MOST_CHANNELS or any(chunk.compression != "UNCOMPRESSED" for chunk in chunks):
        raise ValueError(f"it holds {metadata.num_rows:,} channels or is compressed; a teacher's file never is")
