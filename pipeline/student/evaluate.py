"""How close the student is to its teacher and to the text, on held-out packs.

Enters: the model and packs of the held-out split. Leaves: `Metrics`. Costs: one forward per pack.

All are means over trained positions, each counted once, at temperature 1:
  kl          KL(teacher ‖ student) over the kept ids and one tail bucket, nats. By the log-sum inequality a lower
              bound of the full-vocabulary KL; it is blind to how the student spreads the tail. From hidden states: over
              the whole vocabulary. Not from draws, which give no unbiased KL.
  top1        share of positions where the student's most likely id is the teacher's.
  perplexity  exp of the mean −log q(next token).
  ece         expected calibration error of the most likely id: 15 bins of equal width over its probability,
              Σ share · |accuracy − confidence| (Guo et al. 2017, eq. 3).
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.forward import logits_at
from stillroom.pipeline.student.losses import SLICE_ELEMENTS, Targets, bucket_kl, slices
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.storage.records import Pack

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """See the module's text. tokens: positions evaluated. kl and top1 are None where neither top-k nor hidden
    states are read."""

    tokens: int
    kl: float | None
    top1: float | None
    perplexity: float
    ece: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    """Running sums in float64: means over millions of positions must not drift."""

    tokens: int = 0
    kl: float = 0.0
    agree: int = 0
    signal: int = 0
    nll: float = 0.0

    def __post_init__(self) -> None:
        self.bins = np.zeros((BINS, 3))  # count, confidence, correct

    def add(self, logits_NV: Tensor, targets: Targets, teaching: Teaching) -> None:
        log_q_NV = logits_NV.float().log_softmax(-1)
        confidence_N, top_N = log_q_NV.max(-1)
        label_N = log_q_NV.gather(-1, targets.labels[:, None]).squeeze(-1)
        self.tokens += len(top_N)
        self.nll -= float(label_N.cpu().double().sum())
        self._calibrate(confidence_N.exp().cpu().numpy(), (top_N == targets.labels).cpu().numpy())
        rebuilt_NV = teaching.rebuilt(targets)
        if rebuilt_NV is not None:
            log_p_NV = rebuilt_NV.log_softmax(-1)
            kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
            self._signal(kl_N, top_N == rebuilt_NV.argmax(-1))
        elif targets.ids is not None:
            assert targets.logits is not None
            assert targets.tail_lse is not None
            kl_N = bucket_kl(logits_NV, targets.ids, targets.logits, targets.tail_lse, temperature=1.0)
            self._signal(kl_N, top_N == targets.ids[:, 0])

    def _signal(self, kl_N: Tensor, agree_N: Tensor) -> None:
        self.kl += float(kl_N.cpu().double().sum())
        self.agree += int(agree_N.sum())
        self.signal += len(kl_N)

    def _calibrate(self, confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> None:
        # Bins are open on the left: (0, 1/15], (1/15, 2/15] …
        bin_N = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(np.int64) - 1, 0, BINS - 1)
        for column, values in enumerate((np.ones_like(confidence), confidence, correct.astype(np.float32))):
            self.bins[:, column] += np.bincount(bin_N, weights=values, minlength=BINS)

    def metrics(self) -> Metrics:
        count, confidence, correct = self.bins.T
        return Metrics(
            tokens=self.tokens,
            kl=self.kl / self.signal if self.signal else None,
            top1=self.agree / self.signal if self.signal else None,
            perplexity=float(np.exp(self.nll / self.tokens)),
            ece=float(np.abs(correct - confidence).sum() / count.sum()),
        )


@torch.no_grad()
def evaluate(
    model: Any,
    packs: Iterable[Pack],
    *,
    packing: bool,
    vocabulary: int,
    device: torch.device,
    autocast: bool,
    teaching: Teaching = TOPK,
    between: Callable[[], None] = lambda: None,
) -> Metrics | None:
    """Metrics over the packs, or None if no position of theirs trains.

    teaching: where its part is "hidden", kl and top1 are against the rebuilt whole vocabulary.
    between: called before every pack; may raise to stop.
    """
    sums = _Sums()
    rows = max(1, SLICE_ELEMENTS // vocabulary)
    was_training = model.training
    model.eval()
    try:
        for pack in packs:
            between()
            if not len(pack.positions):
                continue
            batch = collate([pack], packing=packing, temperature=1.0, vocabulary=vocabulary).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                logits_MV = logits_at(model, batch)
            parts = zip(slices(logits_MV[:, :vocabulary], rows), batch.targets.split(rows), strict=True)
            for logits_NV, targets in parts:
                sums.add(logits_NV, targets, teaching)
    finally:
        model.train(was_training)
    return sums.metrics() if sums.tokens else None
