"""How the tail's mass is shared on average, of the positions that a store keeps in full: `losses.signal: topk+truth`.

Enters: the teacher's full logits at the fidelity sample's positions, and what the store keeps there. Leaves: one share
for each id of the vocabulary; a file beside a student's snapshot. Costs: a softmax a position; 4·V bytes.

    π_i = Σ_t p_t,i · [i not kept at t]  /  Σ_t Σ_j p_t,j · [j not kept at t],      at T = 1

    tail_shares.parquet    beside the snapshot; one column `share`, float32 [V], page checksums

At a position that keeps other ids its tail is taken to be shared as π is over what is left there. The mean over the
sample is then the teacher's own, which is what a student that has not learned the rare words yet needs; a position's
own tail it is not.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.fidelity.measure import Block
from stillroom.storage.records import Float32

_SCHEMA = pa.schema([pa.field("share", pa.float32(), nullable=False)])


def tail_shares(blocks: Iterable[Block], vocabulary: int) -> Float32 | None:
    """π, float32 [V], positive and of sum 1; None without a position. Sums are in float64, in the blocks' order.

    Raises ValueError for blocks without a top-k.
    """
    sums_V, positions = np.zeros(vocabulary), 0
    for block in blocks:
        if block.signal.topk is None:
            raise ValueError("shares of a tail need the ids that a top-k keeps")
        for place, truth_V in enumerate(block.truth):
            p_V = np.exp(truth_V.astype(np.float64) - truth_V.max())
            p_V /= p_V.sum()
            p_V[block.signal.topk.ids[place, : int(block.signal.topk.kept[place])]] = 0.0
            sums_V += p_V
            positions += 1
    if not positions:
        return None
    # No share is zero: an id that the sample keeps everywhere may be in a tail elsewhere. All of these together: 1e-6.
    shares_V = sums_V / max(sums_V.sum(), np.finfo(np.float64).tiny) + 1e-6 / vocabulary
    return np.asarray(shares_V / shares_V.sum(), np.float32)


def shares_path(snapshot: Path) -> Path:
    """Of the snapshot at this path."""
    return snapshot.with_name("tail_shares.parquet")


def write_shares(path: Path, shares: Float32) -> None:
    """Whole or not at all."""
    fresh = path.with_name(path.name + ".tmp")
    pq.write_table(
        pa.table([pa.array(shares)], schema=_SCHEMA), fresh, compression="zstd", use_dictionary=False,
        column_encoding="BYTE_STREAM_SPLIT", write_page_checksum=True,
    )  # fmt: skip
    fresh.rename(path)


def read_shares(path: Path, vocabulary: int) -> Float32:
    """float32 [V]. Raises StoreError where there is no such file, CorruptShard where it is not what was written."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow != _SCHEMA or file.metadata.num_rows != vocabulary:
                raise _corrupt(path, f"has {file.metadata.num_rows:,} rows, expected {vocabulary:,} shares")
            shares = file.read()["share"].to_numpy()
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is not there, which losses.signal topk+truth reads: `stillroom train` makes it of the store's "
            "fidelity sample"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, str(error)) from error
    if not (np.isfinite(shares).all() and (shares >= 0).all() and abs(float(shares.sum(dtype=np.float64)) - 1) < 1e-3):
        raise _corrupt(path, "holds no shares: they are at least 0 and sum to 1")
    return np.array(shares, np.float32)  # a copy: the column's own memory is not to be written, which torch warns of


def _corrupt(path: Path, what: str) -> CorruptShard:
    return CorruptShard(
        f"{path} {' '.join(what.split())}: it was damaged; remove it, and `stillroom train` makes it anew"
    )
