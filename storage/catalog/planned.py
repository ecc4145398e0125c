"""What the plans of a store add up to, unit by unit, without a Python object for each sequence.

Enters: a store's files. Leaves: columns. Costs: 0.13 s of a core for 10,000 units of 8 sequences.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage import plans
from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import Files
from stillroom.storage.records import digest128


@dataclass(frozen=True)
class Planned:
    """Units of all plans, each once: units S32; sequences, tokens, rows int64."""

    units: NDArray[np.bytes_]
    sequences: NDArray[np.int64]
    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]


def planned_sums(files: Files) -> Planned:
    """Sums by unit, without making a Python object of each sequence: 20 times as fast as `load_plans`.

    A plan is checked against its name, units against their sequences are not: `verify` does that.
    Raises CorruptShard naming a plan that cannot be read.
    """
    parts = [_of_plan(files, name) for name in files.list(plans.FOLDER) if re.fullmatch(plans.NAME, name)]
    whole = np.concatenate([units for units, _ in parts]) if parts else np.zeros(0, "S32")
    sums = np.concatenate([part for _, part in parts], axis=1) if parts else np.zeros((3, 0), np.int64)
    units, first = np.unique(whole, return_index=True)
    return Planned(units, *sums[:, first])


def _of_plan(files: Files, name: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Units S32 [N], and int64 [3, N]: their sequences, tokens and rows."""
    where = f"{files.uri}/{name}"
    try:
        source = pa.BufferReader(files.read(name))
        table = pq.ParquetFile(source, page_checksum_verification=True).read(
            columns=["unit", "tokens", "context"], use_threads=False
        )
        unit = table["unit"].combine_chunks().dictionary_encode()
        codes = unit.indices.to_numpy()
        tokens, context = (table[column].to_numpy().astype(np.int64) for column in ("tokens", "context"))
        ids: list[str] = unit.dictionary.to_pylist()
        if digest128(b"stillroom.plan.1", *(i.encode() for i in ids)) not in name:
            raise ValueError("it holds other units than its name says")
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptShard(f"plan {where} cannot be read: {' '.join(str(error).split())}") from error
    rows = tokens - np.maximum(context - 1, 0)
    sums = [np.bincount(codes, weights, minlength=len(ids)) for weights in (np.ones(len(codes)), tokens, rows)]
    return np.array(ids, "S32"), np.stack(sums).astype(np.int64)
