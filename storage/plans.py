"""Saved plans: which sequences make up which unit. Plans accumulate; nothing in them is ever changed.

Enters: units. Leaves: the same units, in order. Costs: about 40 bytes a sequence on disk.

They are the store's index as well: a sequence is committed when a unit that a plan gives it to is in the log. So
a resume follows the plan that was saved before the first unit was scored, and a grown corpus adds a plan for the
sequences that no unit holds.

    _stillroom/plans/<number>-<digest>.parquet      one row per sequence: unit, sequence, tokens, context
"""

import io
import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import Files
from stillroom.storage.records import Unit, digest128

FOLDER = "_stillroom/plans"
NAME = FOLDER + r"/\d{5,}-[0-9a-f]{32}\.parquet"
_SCHEMA = pa.schema([("unit", pa.string()), ("sequence", pa.string()), ("tokens", pa.int32()), ("context", pa.int32())])


def units_table(units: Iterable[Unit]) -> pa.Table:
    """One row per sequence, in order."""
    units = list(units)
    return pa.table(
        [
            pa.array(np.repeat([u.id for u in units], [len(u.sequences) for u in units]) if units else []).cast(
                pa.string()
            ),
            pa.array([s for u in units for s in u.sequences], pa.string()),
            pa.array([t for u in units for t in u.tokens], pa.int32()),
            pa.array([c for u in units for c in u.contexts], pa.int32()),
        ],
        schema=_SCHEMA,
    )


def units_of_table(table: pa.Table, where: str) -> list[Unit]:
    """The units back; rows of one unit are adjacent. Raises CorruptShard if an id is not its sequences' digest."""
    ids = table["unit"].to_pylist()
    sequences, tokens, contexts = (table[n].to_pylist() for n in ("sequence", "tokens", "context"))
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
    units = []
    for start, stop in zip(starts, [*starts, len(ids)][1:], strict=True):
        unit = Unit(tuple(sequences[start:stop]), tuple(tokens[start:stop]), tuple(contexts[start:stop]))
        if unit.id != ids[start]:
            raise CorruptShard(f"{where}: unit {ids[start]} does not match its sequences; the file was damaged")
        units.append(unit)
    return units


def save_plan(files: Files, units: Seq[Unit]) -> str:
    """Write a plan after those that are there; returns its name."""
    digest = plan_digest(units)
    number = len(files.list(FOLDER)) + 1
    name = f"{FOLDER}/{number:05d}-{digest}.parquet"
    sink = io.BytesIO()
    pq.write_table(units_table(units), sink, compression="zstd", write_page_checksum=True)
    files.write(name, sink.getvalue())
    return name


def plan_digest(units: Seq[Unit]) -> str:
    return digest128(b"stillroom.plan.1", *(u.id.encode() for u in units))


def load_plans(files: Files) -> list[Unit]:
    """Units of all plans, oldest plan first. Raises CorruptShard naming a file that cannot be read."""
    units: list[Unit] = []
    for name in files.list(FOLDER):
        if re.fullmatch(NAME, name):
            units += load_plan(files, name)
    return units


def load_plan(files: Files, name: str) -> list[Unit]:
    where = f"{files.uri}/{name}"
    try:
        # Not read_table: with it 10 of 480 runs of `stillroom inspect` ended with "terminate called" (pyarrow 26; why
        # is not known), without it 0 of 240.
        source = pa.BufferReader(files.read(name))
        table = pq.ParquetFile(source, page_checksum_verification=True).read(use_threads=False)
        units = units_of_table(table.cast(_SCHEMA), where)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptShard(f"plan {where} cannot be read: {' '.join(str(error).split())}") from error
    if plan_digest(units) not in name:
        raise CorruptShard(f"plan {where} holds other units than its name says; the file was damaged or renamed")
    return units
