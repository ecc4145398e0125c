"""The words of the contract as types. Everything that crosses a room's border is one of these.

Enters: numpy arrays. Leaves: frozen records. Costs: nothing is copied, one hash per sequence.

Shape suffixes: T tokens of a sequence, R signal rows of it, K kept ids, U distinct drawn ids, D hidden width,
V vocabulary, G grid points of β = 1/temperature, M trained positions of a pack.
"""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.attention import Attention

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

#: β = 1/T at which the tail's log-partition is kept; β = 0 is log(V − K) and costs nothing. Ten points give
#: 2e-4 nats worst error after cubic interpolation over T in 1..10, six points 2.7e-3 (real teacher, k = 64).
BETAS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def digest128(*parts: bytes) -> str:
    """32 hex digits of BLAKE2b over the parts, each framed by its length so that parts cannot run together."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


@dataclass(frozen=True, eq=False)
class Sequence:
    """The token ids that the teacher sees at once, and from where on its signal is kept.

    input_ids: int32 [T], T ≥ 1.
    context: leading tokens that repeat the end of the previous window of the same document. They are
        there to be read, not learned: the previous window's rows already cover them.
    """

    input_ids: Int32
    context: int = 0

    @property
    def first_position(self) -> int:
        """First position whose signal is kept: row `context − 1` predicts the first new token."""
        return max(self.context - 1, 0)

    @property
    def rows(self) -> int:
        """R, the number of signal rows: positions first_position … T − 1."""
        return len(self.input_ids) - self.first_position

    @cached_property
    def digest(self) -> str:
        """The sequence's address: a function of its ids and its context alone, 32 hex digits."""
        ids = np.ascontiguousarray(self.input_ids, dtype="<i4")
        return digest128(b"stillroom.sequence.1", self.context.to_bytes(4, "little"), ids.tobytes())


@dataclass(frozen=True)
class TopK:
    """The K largest logits of R positions, and the rest of the vocabulary as one curve.

    ids: int32 [R, K], by falling logit.
    logits: float32 [R, K], raw logits in nats as the model returns them.
    tail_lse: float32 [R, G], log Σ_{i not kept} exp(β z_i) at β = BETAS.
    counts: int32 [R], how many each row keeps (a nucleus); None if every row keeps K. The slots after a row's count
        hold id −1 and logit −inf, and K is the widest row of the block.
    """

    ids: Int32
    logits: Float32
    tail_lse: Float32
    counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "TopK":
        counts = None if self.counts is None else self.counts[rows]
        return TopK(self.ids[rows], self.logits[rows], self.tail_lse[rows], counts)

    @property
    def kept(self) -> Int32:
        """int32 [R]: ids kept at each position."""
        return np.full(len(self), self.ids.shape[1], np.int32) if self.counts is None else self.counts

    @staticmethod
    def concatenate(blocks: Seq["TopK"]) -> "TopK":
        ragged = any(b.counts is not None for b in blocks)
        return TopK(
            _stack([b.ids for b in blocks], -1),
            _stack([b.logits for b in blocks], -np.inf),
            np.concatenate([b.tail_lse for b in blocks]),
            np.concatenate([b.kept for b in blocks]) if ragged else None,
        )


@dataclass(frozen=True)
class Sampled:
    """What N draws from the teacher's distribution at T = 1 gave, at R positions.

    ids: int32 [R, U], the distinct ids of each row, rising, then −1 on unused slots.
    counts: int32 [R, U], how often each was drawn, 0 on unused slots; every row sums to N.
    """

    ids: Int32
    counts: Int32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "Sampled":
        return Sampled(self.ids[rows], self.counts[rows])

    @staticmethod
    def concatenate(blocks: Seq["Sampled"]) -> "Sampled":
        return Sampled(_stack([b.ids for b in blocks], -1), _stack([b.counts for b in blocks], 0))


#: What a signal can be made of, in the order of a shard's columns.
PARTS = ("topk", "sampled", "hidden", "layers", "attention")


@dataclass(frozen=True)
class Signal:
    """All that a store keeps of R positions: its parts, aligned row by row. At least one is there.

    hidden: float32 [R, D], the teacher's final hidden state after its last norm.
    layers: float32 [R, n, D], hidden states of n layers; see `LayersSpec` for which.
    attention: attention maps; see `AttentionSpec`.
    """

    topk: TopK | None = None
    sampled: Sampled | None = None
    hidden: Float32 | None = None
    layers: Float32 | None = None
    attention: Attention | None = None

    def __len__(self) -> int:
        return len(next(part for part in (getattr(self, name) for name in PARTS) if part is not None))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "Signal":
        return Signal(*(None if part is None else part[rows] for part in (getattr(self, name) for name in PARTS)))

    @staticmethod
    def concatenate(blocks: Seq["Signal"]) -> "Signal":
        topk = [b.topk for b in blocks if b.topk is not None]
        sampled = [b.sampled for b in blocks if b.sampled is not None]
        hidden = [b.hidden for b in blocks if b.hidden is not None]
        layers = [b.layers for b in blocks if b.layers is not None]
        attention = [b.attention for b in blocks if b.attention is not None]
        parts = (topk, sampled, hidden, layers, attention)
        assert all(len(part) in (0, len(blocks)) for part in parts), "blocks of different signals"
        return Signal(
            TopK.concatenate(topk) if topk else None,
            Sampled.concatenate(sampled) if sampled else None,
            np.concatenate(hidden) if hidden else None,
            np.concatenate(layers) if layers else None,
            Attention.concatenate(attention) if attention else None,
        )


def _stack(parts: Seq[NDArray[Any]], fill: float) -> NDArray[Any]:
    """Rows of different widths under each other, the narrower ones filled up."""
    width = max(part.shape[1] for part in parts)
    if all(part.shape[1] == width for part in parts):
        return np.concatenate(parts)
    whole = np.full((sum(map(len, parts)), width), fill, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole


@dataclass(frozen=True)
class NucleusSpec:
    """Keep ids until they hold `mass` of the probability at this temperature, at most k and at least one."""

    mass: float
    temperature: float = 1.0


@dataclass(frozen=True)
class TopKSpec:
    """The k largest logits and the tail's curve.

    k: kept ids, 1 ≤ k < V. nucleus: keep fewer where fewer hold enough.
    gap_step: the gaps to the top logit are rounded to multiples of this many nats; None keeps them float32.
        Adds KL 6.5e-5 nats at 1/16, 2.6e-4 at 1/8, 1.0e-3 at 1/4 for 158, 148, 142 bytes a token all told
        (T = 1, k = 64, measured; ten to a hundred times less at T = 2 and 4).
    layout: plain Arrow columns, or packed for archives: the same numbers, which only our code reads.
    """

    k: int
    gap_step: float | None = 1 / 8
    nucleus: NucleusSpec | None = None
    layout: Literal["plain", "packed"] = "plain"


@dataclass(frozen=True)
class SampledSpec:
    """draws: N, from the teacher's distribution at T = 1."""

    draws: int


@dataclass(frozen=True)
class HiddenSpec:
    """The final hidden state.

    width: D. dtype: int16 (steps of a size that follows from the teacher's output head), int8 (steps measured on text,
        one scale a position) or bfloat16; see codecs/hidden.py.
    calibration: SHA-256 of the side file with the channels' steps, for int16 and int8.
    """

    width: int
    dtype: Literal["int16", "int8", "bfloat16"]
    calibration: str | None = None


@dataclass(frozen=True)
class LayersSpec:
    """Hidden states between the blocks.

    layers: rising, as indices into what `transformers` returns as `hidden_states`: 0 is what enters the first block
        (the embeddings), i what leaves the i-th, and the last one the final hidden state after the last norm.
    width: D. dtype: bfloat16 (error ≤ 2⁻⁸ of the value, none for a teacher that runs in bfloat16) or float32.
    """

    layers: tuple[int, ...]
    width: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class AttentionSpec:
    """Attention maps.

    layers: rising, as indices into what `transformers` returns as `attentions`, from 0.
    heads: the mean over heads, or each; head_count: H, with per_head only.
    max_tokens: of a sequence. A position t takes t + 1 numbers of each map, so a token of a sequence of T takes
        (T + 1) / 2 of them in the mean.
    dtype: uint8 (the square root of a weight in 255 steps, with one scale a row) or float32; see codecs/attention.py.
    """

    layers: tuple[int, ...]
    max_tokens: int
    heads: Literal["mean", "per_head"] = "mean"
    head_count: int | None = None
    dtype: Literal["uint8", "float32"] = "uint8"

    @property
    def rows(self) -> int:
        """Rows that a position has in each layer."""
        return 1 if self.head_count is None else self.head_count

    def bytes_per_token(self, tokens: int) -> float:
        """Of a sequence of so many tokens, before zstd, and without its scales."""
        return len(self.layers) * self.rows * (tokens + 1) / 2 * (1 if self.dtype == "uint8" else 4)


@dataclass(frozen=True)
class SignalSpec:
    """What is kept per position, and how finely. Part of the identity. At least one part is there."""

    topk: TopKSpec | None = None
    sampled: SampledSpec | None = None
    hidden: HiddenSpec | None = None
    layers: LayersSpec | None = None
    attention: AttentionSpec | None = None

    def as_dict(self) -> dict[str, Any]:
        """By part; what is None is left out, at every depth but for `gap_step`, where None means float32."""
        return {name: _present(part) for name, part in asdict(self).items() if part is not None}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "SignalSpec":
        """The inverse. Raises TypeError for fields that no part has."""
        parts = {name: dict(part) for name, part in fields.items()}
        topk, sampled, hidden, layers, attention = (parts.pop(name, None) for name in PARTS)
        if parts or not (topk or sampled or hidden or layers or attention):
            raise TypeError(f"signal {sorted(fields)}, expected one or more of {', '.join(PARTS)}")
        if topk and "nucleus" in topk:
            topk["nucleus"] = NucleusSpec(**topk["nucleus"])
        for part in (layers, attention):
            if part:
                part["layers"] = tuple(part["layers"])
        return SignalSpec(
            TopKSpec(**topk) if topk else None,
            SampledSpec(**sampled) if sampled else None,
            HiddenSpec(**hidden) if hidden else None,
            LayersSpec(**layers) if layers else None,
            AttentionSpec(**attention) if attention else None,
        )

    def in_words(self) -> str:
        """For people: `top-64 (1/8 nat) + hidden int8 (576)`."""
        words = []
        if self.topk:
            step = "float32" if self.topk.gap_step is None else f"{step_in_words(self.topk.gap_step)} nat"
            nucleus = f", nucleus {self.topk.nucleus.mass:g}" if self.topk.nucleus else ""
            if self.topk.nucleus and self.topk.nucleus.temperature != 1:
                nucleus += f" at T = {self.topk.nucleus.temperature:g}"
            words.append(f"top-{self.topk.k} ({step}{nucleus}{', packed' if self.topk.layout == 'packed' else ''})")
        if self.sampled:
            words.append(f"{self.sampled.draws} draws")
        if self.hidden:
            words.append(f"hidden {self.hidden.dtype} ({self.hidden.width})")
        if self.layers:
            words.append(f"layers {_listed(self.layers.layers)} {self.layers.dtype} ({self.layers.width})")
        if self.attention:
            heads = f"{self.attention.head_count} heads" if self.attention.heads == "per_head" else "mean of heads"
            kept = f"{self.attention.dtype}, {heads}, up to {self.attention.max_tokens:,} tokens"
            words.append(f"attention {_listed(self.attention.layers)} ({kept})")
        return " + ".join(words)


def step_in_words(step: float) -> str:
    """`1/8`; `0.1` for what is no simple fraction in binary."""
    fraction = Fraction(step)
    return str(fraction) if fraction.denominator <= 1024 else f"{step:g}"


def _listed(layers: tuple[int, ...]) -> str:
    """`0,4,8`; `0,4..32` where more than four follow in equal steps."""
    steps = {after - before for before, after in pairwise(layers)}
    if len(layers) > 4 and len(steps) == 1:
        return f"{layers[0]},{layers[1]}..{layers[-1]}"
    return ",".join(map(str, layers))


def _present(part: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists, no tuples."""
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in part.items()}
    return {key: value for key, value in lists.items() if value is not None or key == "gap_step"}


@dataclass(frozen=True)
class Unit:
    """A batch of sequences: the unit of work, of retry and of commit.

    sequences: their digests, in the order of the shard's rows.
    tokens, contexts: T and context of each.
    """

    sequences: tuple[str, ...]
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]

    @cached_property
    def id(self) -> str:
        """A function of the sequences alone: planned twice, it is the same unit."""
        return digest128(b"stillroom.unit.1", *(s.encode() for s in self.sequences))

    @property
    def rows(self) -> tuple[int, ...]:
        """R of each sequence."""
        return tuple(t - max(c - 1, 0) for t, c in zip(self.tokens, self.contexts, strict=True))


@dataclass(frozen=True)
class ShardRef:
    """A committed shard, as the log and a pinned snapshot name it. The digest is in the file's name."""

    unit: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Receipt:
    """What an actor returns for a unit: where its shard lies and what it took. No signal travels in it."""

    shard: ShardRef
    sequences: int
    tokens: int
    rows: int
    batches: int
    seconds: float
    halved: int = 0
    """Batches more than planned, as those did not fit in the device's memory."""


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end in one window of T tokens, with the positions that train.

    A position t trains if the token it predicts does: its successor lies in the same sequence, the loss
    mask has it, and t ≥ first_position. Only those M positions carry labels and signal.

    input_ids: int32 [T]; position_ids: int32 [T], from 0 in every sequence; segment_ids: int32 [T], 0, 1, …
        and −1 on padding. Padding is one segment of its own with its own positions from 0.
    positions: int64 [M] into the window; labels: int32 [M], the next token; weights: float32 [M].
    signal: the teacher at those M positions, or None for a corpus without signal.
    sequences: digests of the sequences in it, for messages.
    index: the pack's number in the epoch over all ranks; epoch: from 0.
    rows: their numbers in the manifest, int64 [sequences]; None where a pack was made of no manifest.
    """

    input_ids: Int32
    position_ids: Int32
    segment_ids: Int32
    positions: NDArray[np.int64]
    labels: Int32
    weights: Float32
    signal: Signal | None
    sequences: tuple[str, ...]
    epoch: int
    index: int
    rows: NDArray[np.int64] | None = None
