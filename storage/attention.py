"""Attention maps of some positions, as flat numbers.

Enters: numpy arrays. Leaves: `Attention`. Costs: a cumulative sum over the positions where rows are taken; slices are
views where all positions are wanted, copies where some are.

The row of position t has t + 1 numbers, what it gives to the positions 0 … t of its sequence; what would lie above the
diagonal is zero in a causal model, and is not there.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Attention:
    """What R positions attend to, in n layers.

    values: float32 [n, heads · Σ widths]. In each layer position by position, of a position head by head, of a head
        the weights on positions 0 … t, which sum to 1.
    widths: int64 [R], t + 1 of each position.
    heads: rows of each position, 1 for the mean over heads.

    Raises ValueError where these do not belong together.
    """

    values: NDArray[np.float32]
    widths: NDArray[np.int64]
    heads: int

    def __post_init__(self) -> None:
        expected = self.heads * int(self.widths.sum())
        if self.values.ndim != 2 or self.values.shape[1] != expected:
            raise ValueError(f"attention {list(self.values.shape)}, expected [layers, {expected:,}]")

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def layers(self) -> int:
        """n."""
        return len(self.values)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "Attention":
        ends = np.cumsum(self.widths * self.heads)
        widths = self.widths[rows]
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            first = int(ends[start - 1]) if start else 0
            last = max(int(ends[stop - 1]) if stop else 0, first)
            return Attention(self.values[:, first:last], widths, self.heads)
        counts, ends = widths * self.heads, ends[rows]
        # Where a row's numbers begin in the whole, less where they begin in the result.
        shift = np.repeat(ends - np.cumsum(counts), counts)
        return Attention(self.values[:, shift + np.arange(len(shift))], widths, self.heads)

    @staticmethod
    def concatenate(blocks: Seq["Attention"]) -> "Attention":
        assert len({b.heads for b in blocks}) == 1, "blocks of different signals"
        values = np.concatenate([b.values for b in blocks], axis=1)
        return Attention(values, np.concatenate([b.widths for b in blocks]), blocks[0].heads)

    @staticmethod
    def of(maps_nHRT: NDArray[np.float32], first_position: int) -> "Attention":
        """The lower triangle of whole maps.

        maps_nHRT: float32 [n, heads, R, T], of positions first_position … first_position + R − 1, T at least as wide as
        the last of them. What lies above the diagonal is left out.
        """
        layers, heads, rows, columns = maps_nHRT.shape
        widths = np.arange(first_position + 1, first_position + 1 + rows)
        below_RHT = np.repeat((np.arange(columns) < widths[:, None])[:, None], heads, axis=1)
        values = np.empty((layers, heads * int(widths.sum())), np.float32)
        for layer, maps_HRT in enumerate(maps_nHRT):
            values[layer] = maps_HRT.swapaxes(0, 1)[below_RHT]
        return Attention(values, widths, heads)

    def dense(self) -> NDArray[np.float32]:
        """float32 [n, heads, R, widest]: whole rows, with zeros above the diagonal."""
        widest = int(self.widths.max(initial=0))
        below_RHT = np.repeat((np.arange(widest) < self.widths[:, None])[:, None], self.heads, axis=1)
        maps_nRHT = np.zeros((self.layers, *below_RHT.shape), np.float32)
        maps_nRHT[:, below_RHT] = self.values
        return maps_nRHT.swapaxes(1, 2)
