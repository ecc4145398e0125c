"""How close the student is to its teacher and to the text, on held-out packs.

Enters: the model and packs of the held-out split. Leaves: `Metrics`. Costs: one forward per pack; with the head as a
formula, logits of one slice of positions at a time, else those of a pack.

All are means over trained positions, each counted once, at temperature 1; what a store does not determine is None. The
formulas are in `metrics`.
  kl            KL(teacher ‖ student) over the kept ids and one tail bucket, nats. By the log-sum inequality a lower
                bound of the full-vocabulary KL; it is blind to how the student spreads the tail. From hidden states:
                over the whole vocabulary. Not from draws, which give no unbiased KL.
  top1, top5    share of positions where the teacher's most likely id is the student's, or among its first five.
  teacher_mass  probability that the teacher gives to the kept ids, and
  student_mass  the student to the same. Above the teacher's: the student has taken the tail for empty.
  perplexity    exp of the mean −log q(next token).
  perplexity_teacher_text, perplexity_ground_truth: of the sequences that a teacher wrote, and of the others; None
                where all are of one kind.
  ece           expected calibration error of the student's most likely id against the text, 15 bins.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.pipeline.student import metrics as measures
from stillroom.pipeline.student.collate import Batch, collate
from stillroom.pipeline.student.forward import hidden_at, logits_at
from stillroom.pipeline.student.losses import SLICE_ELEMENTS, StudentHead, Targets, bucket_kl, slices
from stillroom.pipeline.student.losses.fused import FUSED_ELEMENTS
from stillroom.pipeline.student.metrics import BINS
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack


@dataclass(frozen=True)
class Metrics:
    """See the module's text. tokens: positions evaluated."""

    tokens: int
    kl: float | None
    top1: float | None
    top5: float | None
    teacher_mass: float | None
    student_mass: float | None
    perplexity: float | None
    ece: float | None
    perplexity_teacher_text: float | None = None
    perplexity_ground_truth: float | None = None

    def as_dict(self) -> dict[str, Any]:
        kinds = ("perplexity_teacher_text", "perplexity_ground_truth")
        return {key: value for key, value in asdict(self).items() if key not in kinds or value is not None}


@dataclass
class _Sums:
    """Running sums in float64: means over millions of positions must not drift."""

    tokens: int = 0
    kl: float = 0.0
    top1: int = 0
    top5: int = 0
    signal: int = 0
    teacher_mass: float = 0.0
    student_mass: float = 0.0
    kept: int = 0
    nll: float = 0.0
    written: int = 0
    written_nll: float = 0.0

    def __post_init__(self) -> None:
        self.bins = np.zeros((BINS, 3))

    def add(self, logits_NV: Tensor, targets: Targets, teaching: Teaching, written_N: NDArray[np.bool_]) -> None:
        """written_N: whether a teacher wrote the text."""
        log_q_NV = logits_NV.float().log_softmax(-1)
        confidence_N, top_N = log_q_NV.max(-1)
        self.tokens += len(top_N)
        log_q_N = log_q_NV.gather(-1, targets.labels[:, None])[:, 0]
        self.nll -= _sum(log_q_N)
        self.written += int(written_N.sum())
        self.written_nll -= _sum(log_q_N[torch.from_numpy(written_N).to(log_q_N.device)])
        self.bins += measures.calibration_bins(
            confidence_N.exp().cpu().numpy(), (top_N == targets.labels).cpu().numpy()
        )
        self._kept(log_q_NV, targets)
        rebuilt_NV = teaching.rebuilt(targets)
        if rebuilt_NV is not None:
            kl_N = measures.full_kl(rebuilt_NV.log_softmax(-1), log_q_NV)
            self._signal(kl_N, measures.rank_of(log_q_NV, rebuilt_NV.argmax(-1)))
        elif targets.ids is not None:
            assert targets.logits is not None
            assert targets.tail_lse is not None
            kl_N = bucket_kl(logits_NV, targets.ids, targets.logits, targets.tail_lse, temperature=1.0)
            self._signal(kl_N, measures.rank_of(log_q_NV, targets.ids[:, 0]))

    def _kept(self, log_q_NV: Tensor, targets: Targets) -> None:
        if targets.ids is None:
            return
        assert targets.logits is not None
        assert targets.tail_lse is not None
        self.teacher_mass += _sum(measures.teacher_mass(targets.logits, targets.tail_lse))
        self.student_mass += _sum(measures.student_mass(log_q_NV, targets.ids))
        self.kept += len(log_q_NV)

    def _signal(self, kl_N: Tensor, rank_N: Tensor) -> None:
        self.kl += _sum(kl_N)
        self.top1 += int((rank_N == 0).sum())
        self.top5 += int((rank_N < 5).sum())
        self.signal += len(kl_N)

    def totalled(self, total: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> "_Sums":
        """Over processes. Counts stay exact below 2^53."""
        own = asdict(self)
        values = total(np.concatenate([np.array([float(value) for value in own.values()]), self.bins.ravel()]))
        found = _Sums(**{name: type(own[name])(value) for name, value in zip(own, values, strict=False)})
        found.bins = values[len(own) :].reshape(BINS, 3)
        return found

    def metrics(self) -> Metrics:
        both = 0 < self.written < self.tokens
        of_truth = measures.perplexity(self.nll - self.written_nll, self.tokens - self.written)
        return Metrics(
            tokens=self.tokens,
            kl=measures.mean(self.kl, self.signal),
            top1=measures.mean(self.top1, self.signal),
            top5=measures.mean(self.top5, self.signal),
            teacher_mass=measures.mean(self.teacher_mass, self.kept),
            student_mass=measures.mean(self.student_mass, self.kept),
            perplexity=measures.perplexity(self.nll, self.tokens),
            ece=measures.calibration_error(self.bins),
            perplexity_teacher_text=measures.perplexity(self.written_nll, self.written) if both else None,
            perplexity_ground_truth=of_truth if both else None,
        )


def _sum(values: Tensor) -> float:
    return float(values.cpu().double().sum())


@torch.no_grad()
def evaluate(
    model: Any,
    packs: Iterable[Pack],
    *,
    packing: bool,
    vocabulary: int,
    device: torch.device,
    autocast: torch.dtype | Literal[False],
    teaching: Teaching = TOPK,
    head: StudentHead | None = None,
    between: Callable[[], None] = lambda: None,
    generated: Container[str] = (),
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda values: values,
) -> Metrics | None:
    """Metrics over the packs, or None if no position of theirs trains.

    autocast: what products are made in; False: without autocast.
    teaching: where its part is "hidden", kl and top1 are against the rebuilt whole vocabulary.
    head: the form of this architecture's output head (`student_head`); None: the model makes the logits of a pack at
    once. between: called before every pack; may raise to stop. generated: digests of the sequences that a teacher
    wrote, as `generated_sequences` gives them. total: adds up over processes that have each a part of the packs.
    """
    sums = _Sums()
    # A 16-bit head of the teacher is widened once a slice: larger slices there.
    rows = max(1, (SLICE_ELEMENTS if teaching.part == "hidden" else FUSED_ELEMENTS) // vocabulary)
    was_training = model.training
    model.eval()
    try:
        for pack in packs:
            between()
            if not len(pack.positions):
                continue
            batch = collate([pack], packing=packing, temperature=1.0, vocabulary=vocabulary).to(device)
            written_M, at = _written(pack, generated), 0
            with torch.autocast(device.type, dtype=autocast or None, enabled=bool(autocast)):
                for logits_NV, targets in _parts(model, batch, head, rows):
                    with torch.autocast(device.type, enabled=False):
                        sums.add(logits_NV[:, :vocabulary], targets, teaching, written_M[at : at + len(logits_NV)])
                    at += len(logits_NV)
    finally:
        model.train(was_training)
    sums = sums.totalled(total)
    return sums.metrics() if sums.tokens else None


def generated_sequences(manifest: Manifest) -> frozenset[str]:
    """Digests of the held-out sequences that a teacher wrote."""
    index = manifest.index()
    return frozenset(digest.decode() for digest in index.sequences[manifest.generated() & index.heldout])


def _written(pack: Pack, generated: Container[str]) -> NDArray[np.bool_]:
    """Of a pack's positions, whether they lie in generated sequences. bool [M]."""
    flags = np.array([digest in generated for digest in pack.sequences], bool)
    return flags[pack.segment_ids[pack.positions]]


def _parts(model: Any, batch: Batch, form: StudentHead | None, rows: int) -> Iterable[tuple[Tensor, Targets]]:
    """Logits [at most rows, V + padding] of consecutive positions, and their targets."""
    if form is None:
        given, head = logits_at(model, batch), None
    else:
        layer = model.get_output_embeddings()
        given, head = hidden_at(model, batch), replace(form, weight=layer.weight, bias=layer.bias)
    for part, targets in zip(slices(given, rows), batch.targets.split(rows), strict=True):
        yield part if head is None else head.logits(part), targets
