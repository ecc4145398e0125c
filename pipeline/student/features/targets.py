"""What the store keeps of the teacher's layers, as the tensors of one forward.

Enters: the packs of a forward. Leaves: `FeatureTargets`. Costs: a copy of what is asked for; nothing else of the signal
is touched.

M trained positions of all packs, n layers, D channels, H heads.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.pipeline.student.features.attention import MapTargets
from stillroom.storage.attention import Attention
from stillroom.storage.records import Pack


@dataclass(frozen=True)
class Wanted:
    """What a step needs. layers, final: hidden states between blocks, and the last one. maps: attention maps, of each
    head or their mean."""

    layers: bool = False
    final: bool = False
    maps: Literal["per_head", "mean"] | None = None


@dataclass(frozen=True)
class FeatureTargets:
    """At M positions. layers: float32 [M, n, D]. final: float32 [M, D]. maps: see there. runs: trained positions of
    each sequence that has any, in order. What is not wanted is None."""

    runs: tuple[int, ...]
    layers: Tensor | None = None
    final: Tensor | None = None
    maps: MapTargets | None = None

    def to(self, device: torch.device) -> "FeatureTargets":
        return FeatureTargets(
            self.runs,
            None if self.layers is None else self.layers.to(device),
            None if self.final is None else self.final.to(device),
            None if self.maps is None else self.maps.to(device),
        )


def feature_targets(packs: Seq[Pack], wanted: Wanted, *, width: int) -> FeatureTargets:
    """width: T, to which the forward's rows are padded; pack number b is row b."""
    signals = [pack.signal for pack in packs if pack.signal is not None]
    assert len(signals) == len(packs), "a feature loss without signal"
    layers = final = maps = None
    if wanted.layers:
        layers = torch.from_numpy(np.concatenate([s.layers for s in signals if s.layers is not None]))
    if wanted.final:
        final = torch.from_numpy(np.concatenate([s.hidden for s in signals if s.hidden is not None]))
    if wanted.maps:
        attention = Attention.concatenate([s.attention for s in signals if s.attention is not None])
        maps = map_targets(packs, attention, width=width, mean=wanted.maps == "mean")
    runs = [np.bincount(pack.segment_ids[pack.positions]) for pack in packs if len(pack.positions)]
    return FeatureTargets(tuple(int(n) for run in runs for n in run if n), layers, final, maps)


def map_targets(packs: Seq[Pack], attention: Attention, *, width: int, mean: bool) -> MapTargets:
    """Weights as stored are rounded; each position's are divided by their sum, or KL would pull at their size."""
    row_M = np.repeat(np.arange(len(packs)), [len(pack.positions) for pack in packs])
    column_M = np.concatenate([pack.positions for pack in packs])
    place_M = np.concatenate([pack.position_ids[pack.positions] for pack in packs])
    assert (attention.widths == place_M + 1).all(), "maps of other positions"
    widths_M = attention.widths
    position_N = np.repeat(np.arange(len(widths_M)), widths_M)
    begin_M = np.cumsum(widths_M) - widths_M
    within_N = np.arange(len(position_N)) - begin_M[position_N]
    weights_nHN = _by_head(attention, begin_M, position_N, within_N)
    if mean:
        weights_nHN = weights_nHN.mean(1, keepdims=True, dtype=np.float32)
    if len(widths_M):
        sums_nHM = np.add.reduceat(weights_nHN, begin_M, axis=-1)
        weights_nHN /= np.where(sums_nHM > 0, sums_nHM, np.float32(1))[..., position_N]
    first_M = column_M - place_M
    at_N = (row_M * width + column_M)[position_N] * width + first_M[position_N] + within_N
    return MapTargets(torch.from_numpy(weights_nHN), torch.from_numpy(at_N), torch.from_numpy(position_N))


def _by_head(
    attention: Attention, begin_M: NDArray[np.int64], position_N: NDArray[np.int64], within_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32 [n, H, N]: stored position by position, and of each head by head."""
    heads_H1 = np.arange(attention.heads)[:, None]
    at_HN = (attention.heads * begin_M)[position_N] + heads_H1 * attention.widths[position_N] + within_N
    found: NDArray[np.float32] = attention.values[:, at_HN]
    return found
