"""The `layers` codec: hidden states of chosen layers, a column each.

Enters: hidden states of R positions, float32 [R, n, D]. Leaves: plain Arrow columns, and back. Costs: four passes to
encode; a copy to decode.

    layer_<i>   float32   D a position, of `hidden_states[i]`; rounded to bfloat16, or as it is

Error: of bfloat16 at most 2⁻⁸ of the value, and none where the teacher ran in bfloat16; of float32 none.

A column for each layer, since layers differ in size, embeddings repeat, and another reader may want one. Measured on
SmolLM2-135M (D = 576), layers 0, 4 … 28 in bfloat16: 6,028 bytes a position, and 6,255 in one column; one layer takes
about 830, the embeddings 228 (of 2,048 positions); in float32 14,270. bfloat16 lies in float32 columns, whose two low
byte planes are zeros, as in codecs/hidden.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from stillroom.storage.codecs.columns import Counts, element, flat, flat_list, lists, require_lengths
from stillroom.storage.codecs.hidden import require_good, to_bfloat16
from stillroom.storage.records import Float32, LayersSpec


@dataclass(frozen=True)
class LayersCodec:
    """Encodes hidden states of one spec. Raises ValueError for a spec that cannot be."""

    spec: LayersSpec

    def __post_init__(self) -> None:
        if self.spec.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"layers.dtype is {self.spec.dtype!r}, expected bfloat16 or float32")
        if self.spec.width < 1:
            raise ValueError(f"layers.width is {self.spec.width}, expected at least 1")
        require_rising("layers.layers", self.spec.layers)

    def fields(self) -> list[pa.Field]:
        return [flat_list(f"layer_{layer}", pa.float32()) for layer in self.spec.layers]

    def encodings(self) -> dict[str, str]:
        return {element(field.name): "BYTE_STREAM_SPLIT" for field in self.fields()}

    def encode(self, block: Float32, rows: Counts) -> list[pa.Array]:
        """See `Codec`."""
        shape = len(self.spec.layers), self.spec.width
        if block.dtype != np.float32 or block.ndim != 3 or block.shape[1:] != shape:
            raise ValueError(f"layers {block.dtype} {list(block.shape)}, expected float32 [R, {shape[0]}, {shape[1]}]")
        columns = []
        for field, states_RD in zip(self.fields(), block.swapaxes(0, 1), strict=True):
            require_good(field.name, np.isfinite(states_RD), "finite numbers")
            kept_RD = to_bfloat16(states_RD, field.name) if self.spec.dtype == "bfloat16" else states_RD
            columns.append(lists(kept_RD.ravel(), rows * self.spec.width, pa.float32()))
        return columns

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Float32:
        """float32 [R, n, D]."""
        block = np.empty((int(rows.sum()), len(self.spec.layers), self.spec.width), np.float32)
        for i, field in enumerate(self.fields()):
            values, lengths = flat(columns[field.name])
            require_lengths(field.name, lengths, rows * self.spec.width)
            block[:, i] = values.reshape(-1, self.spec.width)
            require_good(field.name, np.isfinite(block[:, i]), "finite numbers")
        return block


def require_rising(name: str, layers: tuple[int, ...]) -> None:
    """Raises ValueError if these are no layers, or not in order."""
    numbers = all(type(layer) is int and layer >= 0 for layer in layers)
    if not layers or not numbers or any(b <= a for a, b in pairwise(layers)):
        raise ValueError(f"{name} are {list(layers)!r}, expected one or more, from 0, rising")
