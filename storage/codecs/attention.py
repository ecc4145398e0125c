"""The `attention` codec: attention maps of chosen layers, the lower triangle of each, a column for each layer.

Enters: an `Attention` of R positions. Leaves: plain Arrow columns, and back. Costs: about five passes each way.

    attention_<i>         int16 (uint8's codes) or float32   heads · (t + 1) for position t: head by head
    attention_<i>_scale   float32   with uint8: heads a position, rounded up to bfloat16

    uint8:     weight = attention_scale · (code / 255)²
    float32:   weight = attention_<i>

Where a position's numbers lie follows from the counts: position t of a sequence that is kept from first_position on has
heads · (t + 1), so nothing about it is stored. `first_position` itself follows from the length of a sequence's list.

Error of uint8, with s the row's scale (its largest weight, at most 2⁻⁷ more) and w the weight:
√(w s) / 255 + s / 260,100, so at most s / 254; of float32 none.

Why square roots: a trained teacher's heads look at the first token with most of their weight, and at everything else
with a little of it. In 255 equal steps of the row's scale (error ≤ s / 510) that little is rounded away. SmolLM2-135M,
2,048 positions of CPython's documentation, T = 512, mean over heads, layers 7, 15, 22: total variation between stored
and exact rows 0.025 … 0.038 with 1 … 3 % of the mass gone in equal steps, at 57 … 81 bytes a position and layer; 0.004
… 0.005 with 0.03 % in steps of the root, at 150 … 167. For each of its 9 heads apart 460 … 640 and 1,260 … 1,405 bytes.
Before zstd, 256.5 and 2,308.5. Fewer steps of the root lose as much at each size as equal steps do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.attention import Attention
from stillroom.storage.codecs.columns import Counts, element, flat, flat_list, lists, require_lengths
from stillroom.storage.codecs.hidden import require_good, round_up
from stillroom.storage.codecs.layers import require_rising
from stillroom.storage.records import AttentionSpec, Float32

#: The largest code.
STEPS = 255

#: Softmax rows sum to 1; in bfloat16 a weight may be rounded up from below it, and a sum of heads in float32.
_MOST = 1 + 2.0**-7


@dataclass(frozen=True)
class AttentionCodec:
    """Encodes attention maps of one spec. Raises ValueError for a spec that cannot be."""

    spec: AttentionSpec

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.dtype not in ("uint8", "float32"):
            raise ValueError(f"attention.dtype is {spec.dtype!r}, expected uint8 or float32")
        if spec.heads not in ("mean", "per_head") or (spec.heads == "per_head") != (spec.head_count is not None):
            raise ValueError(f"attention.heads is {spec.heads!r} with head_count {spec.head_count}")
        if spec.max_tokens < 1 or spec.rows < 1:
            raise ValueError(f"attention.max_tokens is {spec.max_tokens} and attention.head_count {spec.head_count}")
        require_rising("attention.layers", spec.layers)

    @property
    def _scaled(self) -> bool:
        return self.spec.dtype == "uint8"

    def fields(self) -> list[pa.Field]:
        value = pa.int16() if self._scaled else pa.float32()
        found = []
        for layer in self.spec.layers:
            found.append(flat_list(f"attention_{layer}", value))
            found += [flat_list(f"attention_{layer}_scale", pa.float32())] if self._scaled else []
        return found

    def encodings(self) -> dict[str, str]:
        return {element(field.name): "BYTE_STREAM_SPLIT" for field in self.fields()}

    def encode(self, block: Attention, rows: Counts) -> list[pa.Array]:
        """See `Codec`. Rows that are not those of consecutive positions of a sequence would be read as others, so
        they are refused here."""
        self._check(block, rows)
        lengths = _sums(block.widths * block.heads, rows)
        columns: list[pa.Array] = []
        for layer, values in zip(self.spec.layers, block.values, strict=True):
            self._require_weights(f"attention_{layer}", values, block.widths)
            if not self._scaled:
                columns.append(lists(values, lengths, pa.float32()))
                continue
            per_row = np.repeat(block.widths, block.heads)
            scale = round_up(_maxima(values, per_row))
            columns.append(lists(_codes(values, scale, per_row), lengths, pa.int16()))
            columns.append(lists(scale, rows * block.heads, pa.float32()))
        return columns

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Attention:
        """The block. Raises ValueError where a list does not have the length of some first position."""
        heads = self.spec.rows
        _, lengths = flat(columns[f"attention_{self.spec.layers[0]}"])
        widths = self._widths(lengths, rows, f"attention_{self.spec.layers[0]}")
        values_nN = np.empty((len(self.spec.layers), heads * int(widths.sum())), np.float32)
        for i, layer in enumerate(self.spec.layers):
            name = f"attention_{layer}"
            found, lengths = flat(columns[name])
            require_lengths(name, lengths, _sums(widths * heads, rows))
            values_nN[i] = found
            if self._scaled:
                scale, lengths = flat(columns[f"{name}_scale"])
                require_lengths(f"{name}_scale", lengths, rows * heads)
                require_good(f"{name}_scale", (scale >= 0) & (scale <= _MOST), "a weight")
                low, high = found.min(initial=0), found.max(initial=0)
                if low < 0 or high > STEPS:
                    raise ValueError(f"column {name} holds {low} … {high}, expected 0 … {STEPS}")
                values_nN[i] /= np.float32(STEPS)
                values_nN[i] *= values_nN[i]
                values_nN[i] *= np.repeat(scale, np.repeat(widths, heads))
            self._require_weights(name, values_nN[i], widths)
        return Attention(values_nN, widths, heads)

    def _widths(self, lengths: NDArray[Any], rows: Counts, name: str) -> NDArray[np.int64]:
        """t + 1 of each position: a list of N numbers over R rows begins at first = (N / heads − R (R + 1) / 2) / R."""
        if len(lengths) != len(rows):
            raise ValueError(f"column {name} has {len(lengths):,} sequences, expected {len(rows):,}")
        before = lengths.astype(np.int64) - self.spec.rows * (rows * (rows + 1) // 2)
        first = before // np.maximum(rows * self.spec.rows, 1)
        wrong = (first < 0) | (first * rows * self.spec.rows != before) | (first + rows > self.spec.max_tokens)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(
                f"column {name} has {int(lengths[at]):,} values for sequence {at}, which are no maps of "
                f"{int(rows[at]):,} positions in at most {self.spec.max_tokens:,} tokens"
            )
        starts = np.repeat(first - (np.cumsum(rows) - rows), rows)
        widths: NDArray[np.int64] = starts + np.arange(len(starts)) + 1
        return widths

    def _check(self, block: Attention, rows: Counts) -> None:
        if block.values.dtype != np.float32 or block.layers != len(self.spec.layers) or block.heads != self.spec.rows:
            raise ValueError(
                f"maps of {block.layers} layers, {block.heads} heads, {block.values.dtype}; expected "
                f"{len(self.spec.layers)}, {self.spec.rows}, float32"
            )
        if (block.widths < 1).any() or (block.widths > self.spec.max_tokens).any():
            row = int(np.argmax((block.widths < 1) | (block.widths > self.spec.max_tokens)))
            raise ValueError(
                f"row {row} looks at {int(block.widths[row]):,} positions, expected at most {self.spec.max_tokens:,} "
                "(signal.attention.max_tokens)"
            )
        following = np.ones(len(block), bool)
        following[1:] = np.diff(block.widths) == 1
        following[np.cumsum(rows)[:-1][np.cumsum(rows)[:-1] < len(block)]] = True
        if not following.all():
            raise ValueError(f"row {int(np.argmin(following))} does not follow the position before it")

    def _require_weights(self, name: str, values: Float32, widths: NDArray[np.int64]) -> None:
        good = (values >= 0) & (values <= np.float32(_MOST))
        if not good.all():
            ends = np.cumsum(widths * self.spec.rows)
            row = int(np.searchsorted(ends, int(np.argmin(good)), side="right"))
            found = float(values[np.argmin(good)])
            raise ValueError(f"column {name}, row {row}: a weight of {found}, expected 0 … 1")


def _sums(counts: NDArray[np.int64], rows: Counts) -> NDArray[np.int64]:
    """Of each sequence's positions."""
    ends = np.concatenate([[0], np.cumsum(counts)])[np.concatenate([[0], np.cumsum(rows)])]
    sums: NDArray[np.int64] = np.diff(ends)
    return sums


def _maxima(values: Float32, counts: NDArray[np.int64]) -> Float32:
    """The largest of each run of `counts` numbers, none of which is empty."""
    if not len(counts):
        return np.zeros(0, np.float32)
    largest: Float32 = np.maximum.reduceat(values, np.cumsum(counts) - counts)
    return largest


def _codes(values: Float32, scale: Float32, counts: NDArray[np.int64]) -> NDArray[np.int16]:
    steps = values / np.repeat(np.where(scale == 0, np.float32(1), scale), counts)
    np.sqrt(steps, out=steps)
    steps *= np.float32(STEPS)
    codes: NDArray[np.int16] = np.rint(steps, out=steps).astype(np.int16)
    return codes
