"""A teacher beside the student, with its whole vocabulary: the oracle that no product code stands in for.

Enters: a teacher's folder, a student's `Trainer`, packs. Leaves: a trainer that differs from the product's in its
target alone, and what is measured of a student against the whole vocabulary. Costs: the teacher's body once a sequence
(its final states are kept as float32, from which its head makes the same logits again), its head and a dense loss in
every step.

    LiveTeacher    logits [M, V] by transformers alone, every sequence by itself
    LiveTrainer    T² · KL over V by log_softmax and autograd, in place of the stored signal's loss
    Renormalised   what a naive cache teaches: softmax over the kept ids, as if the tail were empty
    measure        a student on held-out packs
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student import metrics
from stillroom.pipeline.student.collate import Batch, collate
from stillroom.pipeline.student.forward import logits_at
from stillroom.pipeline.student.losses import LossSums, Objective, combine, cross_entropy
from stillroom.pipeline.student.trainer import StepResult, Trainer
from stillroom.storage.records import Pack

#: Positions of a dense loss at a time: two float64 buffers of 50 MB at V = 49,152.
ROWS = 128
#: At which KL is measured.
TEMPERATURES = (1.0, 4.0)


class LiveTeacher:
    """The teacher in float32. cache: a folder for final states, one file a sequence; None: kept nowhere."""

    def __init__(self, folder: Path, *, vocabulary: int, cache: Path | None = None) -> None:
        self._folder, self._vocabulary, self._cache = folder, vocabulary, cache
        self._model: Any = None
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def logits(self, pack: Pack) -> Tensor:
        """[M, V], float32, at the pack's trained positions."""
        states_TD = torch.cat([self._states(pack.input_ids[rows], digest) for digest, rows in _sequences(pack)])
        logits_MV: Tensor = self._loaded().get_output_embeddings()(states_TD[torch.from_numpy(pack.positions)])
        return logits_MV[:, : self._vocabulary]

    def _states(self, ids: NDArray[np.int32], digest: str) -> Tensor:
        """What the head is given, [T, D]: the sequence alone, no padding, no other beside it."""
        path = None if self._cache is None else self._cache / f"{digest}.npy"
        if path is not None and path.exists():
            return torch.from_numpy(np.load(path))
        body = self._loaded().base_model
        states_TD: Tensor = body(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        if path is not None:
            fresh = path.with_suffix(".tmp.npy")
            np.save(fresh, states_TD.numpy())
            fresh.rename(path)
        return states_TD

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
        return self._model


def _sequences(pack: Pack) -> list[tuple[str, NDArray[np.int64]]]:
    """(digest, places) of each sequence in the window."""
    return [(digest, np.flatnonzero(pack.segment_ids == number)) for number, digest in enumerate(pack.sequences)]


def dense_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float, dtype: torch.dtype) -> Tensor:
    """KL(teacher ‖ student) at the temperature over the whole vocabulary, [N], nats: the textbook's."""
    log_q_NV = torch.log_softmax(student_NV.to(dtype) / temperature, -1)
    log_p_NV = torch.log_softmax(teacher_NV.to(dtype) / temperature, -1)
    return torch.nn.functional.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)


class LiveTrainer(Trainer):
    """`Trainer` with forward KL against the teacher itself. dtype: of the dense loss; one pack a forward."""

    live: LiveTeacher
    dtype: torch.dtype = torch.float64
    _packs: Sequence[Pack] = ()

    def step(self, packs: Sequence[Pack], step: int) -> StepResult:
        self._packs = packs
        return super().step(packs, step)

    def _loss(self, batch: Batch, objective: Objective) -> LossSums:
        (pack,) = self._packs
        teacher_MV = self.live.logits(pack)
        student_MV = logits_at(self.model, batch)[:, : teacher_MV.shape[1]]
        weights_M = batch.targets.weights.to(self.dtype)
        parts = zip(*(torch.split(t, ROWS) for t in (student_MV, teacher_MV, weights_M)), strict=True)
        sums = [(dense_kl(s, t, temperature=objective.temperature, dtype=self.dtype) * w).sum() for s, t, w in parts]
        kd = objective.temperature**2 * torch.stack(sums).sum()
        ce = None
        if objective.reads_text:
            ce = cross_entropy(student_MV, batch.targets.labels, weights_N=batch.targets.weights)
        return LossSums(combine(kd, ce, alpha=objective.alpha), kd, ce)


class Renormalised(Trainer):
    """`Trainer` that takes the stored tail for empty."""

    def _loss(self, batch: Batch, objective: Objective) -> LossSums:
        assert batch.targets.tail_lse is not None
        nothing_M = torch.full_like(batch.targets.tail_lse, -torch.inf)
        return super()._loss(replace(batch, targets=replace(batch.targets, tail_lse=nothing_M)), objective)


@torch.no_grad()
def measure(model: Any, live: LiveTeacher, packs: Iterable[Pack], *, vocabulary: int) -> dict[str, float]:
    """Means over the packs' trained positions: kl_t1 and kl_t4 over the whole vocabulary in float64, nats; top1:
    agreement with the teacher; perplexity and ece (15 bins) on the text."""
    model.eval()
    sums = dict.fromkeys(("positions", "top1", "nll", *(f"kl_t{t:g}" for t in TEMPERATURES)), 0.0)
    bins = np.zeros((metrics.BINS, 3))
    for pack in packs:
        teacher_MV = live.logits(pack)
        batch = collate([pack], packing=True, temperature=1.0, vocabulary=vocabulary)
        student_MV = logits_at(model, batch)[:, :vocabulary]
        parts = zip(*(torch.split(t, ROWS) for t in (student_MV, teacher_MV, batch.targets.labels)), strict=True)
        for student_PV, teacher_PV, labels_P in parts:
            confidence_P, top_P = student_PV.softmax(-1).max(-1)
            right_P = top_P == labels_P
            bins += metrics.calibration_bins(confidence_P.numpy(), right_P.numpy())
            sums["positions"] += len(labels_P)
            sums["top1"] += float((top_P == teacher_PV.argmax(-1)).sum())
            sums["nll"] += float(torch.nn.functional.cross_entropy(student_PV.double(), labels_P, reduction="sum"))
            for t in TEMPERATURES:
                sums[f"kl_t{t:g}"] += float(dense_kl(student_PV, teacher_PV, temperature=t, dtype=torch.float64).sum())
    count = sums.pop("positions")
    means = {name: total / count for name, total in sums.items()}
    found = {**means, "perplexity": float(np.exp(means["nll"])), "ece": metrics.calibration_error(bins) or 0.0}
    return {"positions": count, **found}
