"""What every codec is: a block of signal rows becomes Arrow columns, one list value per sequence, and back.

Enters: a block of all positions of some sequences, laid end to end, and how many each sequence has. Leaves: columns.
Costs: views both ways where the codec's own layout allows it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Block = TypeVar("Block")
Counts = NDArray[np.int64]


class Codec(Protocol[Block]):
    """One part of a signal as columns of its own. Frozen; the same block always gives the same bytes."""

    def fields(self) -> list[pa.Field]:
        """The columns, in the file's order."""

    def encodings(self) -> dict[str, str]:
        """Parquet encodings by column path; a column that is not named is PLAIN."""

    def encode(self, block: Block, rows: Counts) -> list[pa.Array]:
        """Columns of a block, one value per sequence.

        rows: int64 [sequences], R of each; the block has as many positions as they sum to.
        Raises ValueError naming the row where the block breaks the contract.
        """

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Block:
        """The block. Raises ValueError where columns do not have the sizes that `rows` asks for."""


def flat_list(name: str, value: pa.DataType) -> pa.Field:
    """A column of lists without nulls."""
    return pa.field(name, pa.list_(pa.field("element", value, nullable=False)), nullable=False)


def element(name: str) -> str:
    """The path under which Parquet's writer knows a list column's values."""
    return f"{name}.list.element"


def lists(values: NDArray[Any], lengths: NDArray[Any], value: pa.DataType) -> pa.ListArray:
    """A list column of flat values; `lengths` of each list."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=flat_list("", value).type)


def flat(column: pa.ListArray) -> tuple[Any, Any]:
    """(values, lengths) of a list column, as numpy views."""
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], np.diff(offsets)


def require_lengths(name: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Raises ValueError naming the sequence where a column's lists are not as long as they must be."""
    wrong = np.flatnonzero(found != expected) if len(found) == len(expected) else np.zeros(1, np.int64)
    if len(wrong):
        at = int(wrong[0])
        got = int(found[at]) if at < len(found) else 0
        raise ValueError(f"column {name} has {got:,} values for sequence {at}, expected {int(expected[at]):,}")
