"""Saved plans: which sequences make up which unit. Plans accumulate; nothing in them is ever changed.

Enters: units. Leaves: the same units, in order. Costs: about 40 bytes a sequence on disk.

They are the store's index as well: a sequence is committed when a unit that a plan gives it to is in the log. So
a resume follows the plan that was saved before the first unit was scored, and a grown corpus adds a plan for the
sequences that no unit holds.

    _stillroom/plans/<number>-<digest>.parquet      one row per sequence: unit, sequence, tokens, context
"""

import io
import re
from collections.abc import Sequence as Seq

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import Files
from stillroom.storage.records import Unit
from stillroom.storage.units import Units as Units  # part of what this module offers
from stillroom.storage.units import plan_digest as plan_digest
from stillroom.storage.units import read_units
from stillroom.storage.units import units_table as units_table

FOLDER = "_stillroom/plans"
NAME = FOLDER + r"/\d{5,}-[0-9a-f]{32}\.parquet"


def save_plan(files: Files, units: Seq[Unit]) -> str:
    """Write a plan after those that are there; returns its name."""
    digest = plan_digest(units)
    number = len(files.list(FOLDER)) + 1
    name = f"{FOLDER}/{number:05d}-{digest}.parquet"
    sink = io.BytesIO()
    pq.write_table(units_table(units), sink, compression="zstd", write_page_checksum=True)
    files.write(name, sink.getvalue())
    return name


def load_plans(files: Files) -> Units:
    """Units of all plans, oldest plan first. Raises CorruptShard naming a file that cannot be read."""
    return Units.concatenate([load_plan(files, name) for name in files.list(FOLDER) if re.fullmatch(NAME, name)])


def load_plan(files: Files, name: str) -> Units:
    where = f"{files.uri}/{name}"
    try:
        units, _ = read_units(files.read(name), where)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptShard(f"plan {where} cannot be read: {' '.join(str(error).split())}") from error
    if plan_digest(units) not in name:
        raise CorruptShard(f"plan {where} holds other units than its name says; the file was damaged or renamed")
    return units
