"""Packs become the tensors of one forward.

Enters: `Pack`s. Leaves: a `Batch`. Costs: one copy. The tail's curve is evaluated at the loss's temperature here, in
numpy: ten multiply-adds a position.

B packs, T tokens, M trained positions of all packs, K kept ids.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.pipeline.student.features.targets import FeatureTargets, Wanted, feature_targets
from stillroom.pipeline.student.losses import Targets
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.records import Pack, Signal


@dataclass(frozen=True)
class Batch:
    """One forward.

    input_ids: int64 [B, T]. keep: bool [B, T], the positions whose logits are wanted, M in all, row by row.
    position_ids: int64 [B, T], from 0 in every sequence; None without packing.
    attention_mask: int64 [B, T], 1 on real tokens; None with packing, where the position ids say what is apart.
    targets: at the M positions. features: the teacher's layers there, where they are learned from.
    """

    input_ids: Tensor
    keep: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    targets: Targets
    features: FeatureTargets | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.input_ids.to(device),
            self.keep.to(device),
            None if self.position_ids is None else self.position_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.targets.to(device),
            None if self.features is None else self.features.to(device),
        )


def real_tokens(pack: Pack) -> int:
    """Tokens in front of the padding, which is always last."""
    return int((pack.segment_ids >= 0).sum())


def collate(
    packs: Seq[Pack], *, packing: bool, temperature: float, vocabulary: int, wanted: Wanted | None = None
) -> Batch:
    """Rows are cut to the longest: padding that no row needs is not computed.

    Without packing a pack holds one sequence, and its row is padded on the right under an attention mask.
    """
    lengths = [real_tokens(pack) for pack in packs]
    width = max(lengths)
    ids_BT = np.zeros((len(packs), width), dtype=np.int64)
    positions_BT = np.tile(np.arange(width, dtype=np.int64), (len(packs), 1))
    mask_BT = np.zeros((len(packs), width), dtype=np.int64)
    keep_BT = np.zeros((len(packs), width), dtype=bool)
    for row, (pack, length) in enumerate(zip(packs, lengths, strict=True)):
        assert packing or pack.segment_ids[:length].max(initial=0) == 0, "several sequences in a row, packing is off"
        assert (np.diff(pack.positions) > 0).all(), "positions must rise"
        ids_BT[row, :length] = pack.input_ids[:length]
        positions_BT[row, :length] = pack.position_ids[:length]
        positions_BT[row, length:] -= length  # padding: a sequence of its own
        mask_BT[row, :length] = 1
        keep_BT[row, pack.positions] = True
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(keep_BT),
        torch.from_numpy(positions_BT) if packing else None,
        None if packing else torch.from_numpy(mask_BT),
        _targets(packs, temperature, vocabulary),
        None if wanted is None else feature_targets(packs, wanted, width=width),
    )


def _targets(packs: Seq[Pack], temperature: float, vocabulary: int) -> Targets:
    labels = torch.from_numpy(np.concatenate([pack.labels for pack in packs]).astype(np.int64))
    weights = torch.from_numpy(np.concatenate([pack.weights for pack in packs]).astype(np.float32))
    blocks = [pack.signal for pack in packs if pack.signal is not None]
    if not blocks:
        return Targets(labels, weights)
    assert len(blocks) == len(packs), "packs with and without signal in one batch"
    signal = Signal.concatenate(blocks)
    targets: dict[str, Tensor] = {}
    if signal.topk is not None:
        topk = signal.topk
        tail = np.full(len(topk), -np.inf, dtype=np.float32)
        if topk.ids.shape[1] < vocabulary:
            tail_size = vocabulary - (topk.ids.shape[1] if topk.counts is None else topk.counts)
            tail = tail_lse_at(topk.tail_lse, 1.0 / temperature, tail_size)
        targets["ids"] = torch.from_numpy(topk.ids.astype(np.int64))
        targets["logits"] = torch.from_numpy(topk.logits.astype(np.float32))
        targets["tail_lse"] = torch.from_numpy(tail)
    if signal.sampled is not None:
        targets["drawn_ids"] = torch.from_numpy(signal.sampled.ids.astype(np.int64))
        targets["drawn_counts"] = torch.from_numpy(signal.sampled.counts.astype(np.int64))
    if signal.hidden is not None:
        targets["hidden"] = torch.from_numpy(signal.hidden)
    return Targets(labels, weights, **targets)
