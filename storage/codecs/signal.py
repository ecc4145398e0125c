"""A signal's parts side by side: each part's codec with its columns, all aligned row by row.

Enters: what a store keeps (`SignalSpec`), and the calibration where the hidden part needs one. Leaves:
`SignalCodec`, which turns a `Signal` into columns and back. Costs: those of its parts.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.storage.calibration import Calibration
from stillroom.storage.codecs.attention import AttentionCodec
from stillroom.storage.codecs.columns import Codec, Counts
from stillroom.storage.codecs.hidden import HiddenCodec
from stillroom.storage.codecs.layers import LayersCodec
from stillroom.storage.codecs.packed import PackedCodec
from stillroom.storage.codecs.sampled import SampledCodec
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import PARTS, Signal, SignalSpec

#: The widest column of a row group holds at most this many values; of hidden states and attention, eight times as many
#: over all layers. At k = 64
#: that is 4,096 positions, 1 MiB of ids. Measured: 4–16 rows of 512 tokens scan at 780,000 tokens/s a core, one row at
#: 630,000, 80 rows at 220,000.
VALUES_PER_GROUP = 2**18


def positions_per_group(spec: SignalSpec) -> int:
    """How many positions a row group may hold: a function of the spec, so that it is known before anything is
    written."""
    limits = [VALUES_PER_GROUP]
    if spec.topk:
        limits.append(VALUES_PER_GROUP // spec.topk.k)
        if spec.topk.layout == "packed" and not (spec.sampled or spec.hidden or spec.layers or spec.attention):
            # An archive is read from end to end, and larger groups pack tighter: 83.1 bytes a position at 4,096
            # positions, 81.3 at 32,768, and twice the speed.
            limits[-1] *= 8
    if spec.sampled:
        limits.append(VALUES_PER_GROUP // spec.sampled.draws)
    if spec.hidden:
        limits.append(8 * VALUES_PER_GROUP // spec.hidden.width)
    if spec.layers:
        limits.append(8 * VALUES_PER_GROUP // (len(spec.layers.layers) * spec.layers.width))
    if spec.attention:
        # Of the longest sequences that there may be: a group is known from its positions alone.
        widest = len(spec.attention.layers) * spec.attention.rows * (spec.attention.max_tokens + 1) // 2
        limits.append(8 * VALUES_PER_GROUP // widest)
    return max(1, min(limits))


@dataclass(frozen=True)
class SignalCodec:
    """Encodes blocks of one spec.

    vocabulary: V. calibration: of an int16 or int8 hidden part.
    Raises ValueError if the spec does not fit the vocabulary.
    """

    spec: SignalSpec
    vocabulary: int
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        self._parts  # noqa: B018 - refuses a spec that cannot be

    @cached_property
    def _parts(self) -> dict[str, Codec[Any]]:
        parts: dict[str, Codec[Any]] = {}
        spec = self.spec
        if spec.topk:
            packed = spec.topk.layout == "packed"
            parts["topk"] = (PackedCodec if packed else TopKCodec)(spec.topk, self.vocabulary)
        if spec.sampled:
            parts["sampled"] = SampledCodec(spec.sampled, self.vocabulary)
        if spec.hidden:
            parts["hidden"] = HiddenCodec(spec.hidden, self.calibration)
        if spec.layers:
            parts["layers"] = LayersCodec(spec.layers)
        if spec.attention:
            parts["attention"] = AttentionCodec(spec.attention)
        return parts

    def only(self, parts: Collection[str]) -> "SignalCodec":
        """The codec of some parts: those that the spec has of these. Raises ValueError if it has none."""
        held = {name: getattr(self.spec, name) for name in self._parts if name in parts}
        if not held:
            raise ValueError(f"parts {sorted(parts)}, the signal has {', '.join(self._parts)}")
        return SignalCodec(SignalSpec(**held), self.vocabulary, self.calibration if "hidden" in held else None)

    def fields(self) -> list[pa.Field]:
        return [field for part in self._parts.values() for field in part.fields()]

    def encodings(self) -> dict[str, str]:
        return {path: kind for part in self._parts.values() for path, kind in part.encodings().items()}

    def encode(self, block: Signal, rows: Counts) -> list[pa.Array]:
        """Columns of all parts. Raises ValueError where a part is missing, too many, or breaks its contract."""
        extra = [n for n in PARTS if getattr(block, n) is not None and n not in self._parts]
        if extra:
            raise ValueError(f"{', '.join(extra)}: not part of this signal, {self.spec.in_words()}")
        columns: list[pa.Array] = []
        for name, codec in self._parts.items():
            part = getattr(block, name)
            if part is None or len(part) != int(rows.sum()):
                raise ValueError(f"{name}: {0 if part is None else len(part)} rows, expected {int(rows.sum())}")
            try:
                columns += codec.encode(part, rows)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return columns

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Signal:
        """The signal. Raises ValueError where columns do not have the sizes that `rows` asks for."""
        return Signal(**{name: codec.decode(columns, rows) for name, codec in self._parts.items()})


def rows_of(tokens: Any, contexts: Any) -> Counts:
    """R of each sequence, int64: positions max(context − 1, 0) … T − 1."""
    rows: Counts = np.asarray(tokens, np.int64) - np.maximum(np.asarray(contexts, np.int64) - 1, 0)
    return rows
