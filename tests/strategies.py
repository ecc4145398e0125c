"""Builders that many tests share: signals from real full logits, sequences, stores, manifests. No torch.

Everything here goes through the code that production uses (`write_shard`, `create_store`, `ManifestWriter`). Only
the teacher is made up: its logits are a function of the sequence, so that a test can ask again what it said.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.attention import Attention
from stillroom.storage.codecs.columns import Block, Codec, Counts
from stillroom.storage.identity import Identity
from stillroom.storage.manifest import Manifest, ManifestMeta, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import (
    BETAS,
    Receipt,
    Sampled,
    Sequence,
    ShardRef,
    Signal,
    SignalSpec,
    TopK,
    TopKSpec,
    Unit,
)
from stillroom.storage.shard import shard_path, write_shard
from stillroom.storage.store import Store, create_store

TOKENIZER = "70" * 16

#: What a made-up teacher says about a sequence: float64 [R, V] logits.
Teacher = Callable[[Sequence, int], NDArray[np.float64]]


def exact_lse(logits: NDArray[np.floating], beta: float = 1.0) -> NDArray[np.float64]:
    """log Σ exp(β z) over the last axis, in float64."""
    scaled = beta * np.asarray(logits, dtype=np.float64)
    top = scaled.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(scaled - top).sum(axis=-1)) + top[..., 0])


def topk_of(logits_RV: NDArray[np.floating], k: int) -> TopK:
    """What a teacher with these full logits keeps: exact, in float64 until the end. Ties go to the lower id."""
    ids = np.argsort(-logits_RV, axis=1, kind="stable")
    kept = np.take_along_axis(logits_RV, ids[:, :k], axis=1)
    rest = np.take_along_axis(logits_RV, ids[:, k:], axis=1)
    tail = np.stack([exact_lse(rest, beta) for beta in BETAS], axis=1)
    return TopK(ids[:, :k].astype(np.int32), kept.astype(np.float32), tail.astype(np.float32))


def nucleus_of(logits_RV: NDArray[np.floating], k: int, mass: float, temperature: float = 1.0) -> TopK:
    """What a teacher keeps of a nucleus: the fewest largest ids that hold `mass` at this temperature, at most k."""
    scaled = np.asarray(logits_RV, np.float64) / temperature
    order = np.argsort(-logits_RV, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(np.exp(scaled - exact_lse(scaled)[:, None]), order, axis=1), axis=1)
    counts = np.minimum(1 + (held < mass).sum(axis=1), k).astype(np.int32)
    return ragged_topk_of(logits_RV, counts)


def ragged_topk_of(logits_RV: NDArray[np.floating], counts_R: NDArray[np.int32]) -> TopK:
    """As `topk_of`, with a k for each row."""
    rows = [topk_of(row[None], int(count)) for row, count in zip(logits_RV, counts_R, strict=True)]
    width = int(counts_R.max(initial=1))
    ids, logits = np.full((len(rows), width), -1, np.int32), np.full((len(rows), width), -np.inf, np.float32)
    for r, row in enumerate(rows):
        ids[r, : counts_R[r]], logits[r, : counts_R[r]] = row.ids[0], row.logits[0]
    tail = np.concatenate([np.zeros((0, len(BETAS)), np.float32), *(row.tail_lse for row in rows)])
    return TopK(ids, logits, tail, counts_R)


def columns_of(codec: Codec[Block], block: Block, rows: Counts | None = None) -> dict[str, pa.Array]:
    """The codec's columns by name. rows: R of each sequence; None for one sequence that has all positions."""
    rows = _all_of(block) if rows is None else rows
    return dict(zip((field.name for field in codec.fields()), codec.encode(block, rows), strict=True))


def round_trip(codec: Codec[Block], block: Block, rows: Counts | None = None) -> Block:
    """The block as a reader gets it."""
    rows = _all_of(block) if rows is None else rows
    return codec.decode(columns_of(codec, block, rows), rows)


def _all_of(block: Any) -> Counts:
    return np.array([len(block)], np.int64)


def random_logits(
    rng: np.random.Generator, rows: int, vocabulary: int, *, spread: float = 3.0, offset: float = 0.0
) -> NDArray[np.float64]:
    """float32-exact [R, V]: normal, plus a heavy-tailed head of a few likely ids as trained teachers have it."""
    logits = rng.normal(offset, spread, (rows, vocabulary))
    logits += rng.exponential(spread, (rows, vocabulary)) * (rng.random((rows, vocabulary)) < 0.05)
    return logits.astype(np.float32).astype(np.float64)


def random_topk(rng: np.random.Generator, rows: int, k: int, vocabulary: int) -> TopK:
    """A contract-true signal of random full logits."""
    return topk_of(random_logits(rng, rows, vocabulary), k)


def digest_teacher(sequence: Sequence, vocabulary: int) -> NDArray[np.float64]:
    """Random logits seeded by the sequence's digest: equal sequences get equal rows, others do not."""
    rng = np.random.default_rng(int(sequence.digest, 16))
    return random_logits(rng, sequence.rows, vocabulary)


def next_token_teacher(sequence: Sequence, vocabulary: int) -> NDArray[np.float64]:
    """As `digest_teacher`, but sure of the next token wherever there is one."""
    logits = digest_teacher(sequence, vocabulary)
    following = sequence.input_ids[sequence.first_position + 1 :]
    logits[np.arange(len(following)), following] = logits.max() + 1.0
    return logits


def signal_of(sequence: Sequence, identity: Identity, teacher: Teacher = digest_teacher) -> Signal:
    """All parts that the identity keeps of a sequence. Draws and hidden states are a function of its digest."""
    logits_RV, spec = teacher(sequence, identity.vocabulary), identity.signal
    rng = np.random.default_rng([1, int(sequence.digest, 16)])
    topk = sampled = hidden = layers = attention = None
    if spec.topk and spec.topk.nucleus:
        topk = nucleus_of(logits_RV, spec.topk.k, spec.topk.nucleus.mass, spec.topk.nucleus.temperature)
    elif spec.topk:
        topk = topk_of(logits_RV, spec.topk.k)
    if spec.sampled:
        sampled = sampled_of(rng, logits_RV, spec.sampled.draws)
    if spec.hidden:
        hidden = rng.normal(0.0, 2.0, (sequence.rows, spec.hidden.width)).astype(np.float32)
    if spec.layers:
        shape = sequence.rows, len(spec.layers.layers), spec.layers.width
        layers = rng.normal(0.0, 2.0, shape).astype(np.float32)
    if spec.attention:
        count = len(spec.attention.layers)
        attention = attention_of(rng, count, spec.attention.rows, sequence.rows, sequence.first_position)
    return Signal(topk, sampled, hidden, layers, attention)


def attention_of(rng: np.random.Generator, layers: int, heads: int, rows: int, first_position: int = 0) -> Attention:
    """Random maps whose rows sum to 1, most of it on the first token, as trained teachers have them."""
    columns = first_position + rows
    scores = rng.normal(0.0, 2.0, (layers, heads, rows, columns))
    scores[..., 0] += 4.0
    below = np.arange(columns) <= first_position + np.arange(rows)[:, None]
    weights = np.exp(scores) * below
    return Attention.of((weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32), first_position)


def sampled_of(rng: np.random.Generator, logits_RV: NDArray[np.floating], draws: int) -> Sampled:
    """Draws from the distribution of these logits at T = 1."""
    p_RV = np.exp(logits_RV - exact_lse(logits_RV)[:, None])
    drawn_RV = rng.multinomial(draws, p_RV / p_RV.sum(axis=1, keepdims=True))
    width = int((drawn_RV > 0).sum(axis=1).max(initial=1))
    ids, counts = np.full((len(drawn_RV), width), -1, np.int32), np.zeros((len(drawn_RV), width), np.int32)
    for r, row in enumerate(drawn_RV):
        found = np.flatnonzero(row)
        ids[r, : len(found)], counts[r, : len(found)] = found, row[found]
    return Sampled(ids, counts)


def random_sequences(
    rng: np.random.Generator, count: int, *, vocabulary: int = 40, shortest: int = 1, longest: int = 24
) -> list[Sequence]:
    """Distinct sequences of random ids and lengths; every third one of more than two tokens has a context."""
    sequences: dict[str, Sequence] = {}
    while len(sequences) < count:
        length = int(rng.integers(shortest, longest + 1))
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        context = int(rng.integers(1, length)) if length > 2 and len(sequences) % 3 == 2 else 0
        sequence = Sequence(ids, context)
        sequences[sequence.digest] = sequence
        if length == shortest == longest and len(sequences) >= vocabulary**length:
            break
    return list(sequences.values())


def tiny_identity(
    *,
    k: int = 4,
    vocabulary: int = 40,
    gap_step: float | None = 1 / 8,
    weights: str = "ab" * 16,
    signal: SignalSpec | None = None,
) -> Identity:
    """signal: what is kept; else the top k in steps of `gap_step`."""
    return Identity(
        teacher="made up",
        weights=weights,
        config="cd" * 16,
        tokenizer=TOKENIZER,
        vocabulary=vocabulary,
        dtype="float32",
        quantisation=None,
        signal=signal or SignalSpec(TopKSpec(k, gap_step)),
    )


def unit_of(sequences: Seq[Sequence]) -> Unit:
    return Unit(
        tuple(s.digest for s in sequences),
        tuple(len(s.input_ids) for s in sequences),
        tuple(s.context for s in sequences),
    )


def write_unit(
    store: Store, sequences: Seq[Sequence], teacher: Teacher = digest_teacher, *, machine: str = "any"
) -> Receipt:
    """Score the sequences and write them as one shard of `store`, not committed.

    machine: provenance. Another one makes other bytes, hence another path, for the same unit.
    """
    identity, unit = store.identity, unit_of(sequences)
    blocks = [signal_of(s, identity, teacher) for s in sequences]
    ref = write_shard(store.files, identity, unit, sequences, blocks, {"machine": machine})
    return Receipt(ref, len(sequences), sum(unit.tokens), sum(unit.rows), batches=1, seconds=0.0)


def named_receipt(number: int, *, writer: int = 0) -> Receipt:
    """Of a shard that need not exist: the log knows names only. Two writers make two paths for a unit."""
    unit, sha256 = f"{number:032x}", f"{number:060x}{writer:04x}"
    ref = ShardRef(unit, shard_path(unit, sha256), sha256, 1000 + number)
    return Receipt(ref, sequences=2, tokens=10, rows=10, batches=1, seconds=0.0)


def tiny_store(
    path: Path,
    sequences: Seq[Sequence],
    *,
    identity: Identity | None = None,
    per_unit: int = 5,
    teacher: Teacher = digest_teacher,
) -> Store:
    """A store at `path` with all `sequences` planned, scored and committed, `per_unit` to a unit."""
    store = create_store(str(path), identity or tiny_identity())
    parts = [sequences[at : at + per_unit] for at in range(0, len(sequences), per_unit)]
    store.save_plan([unit_of(part) for part in parts])
    store.commit([write_unit(store, part, teacher) for part in parts])
    return store


def manifest_row(
    sequence: Sequence,
    *,
    mask: NDArray[np.bool_] | None = None,
    weight: float = 1.0,
    document: int = 0,
    heldout: bool = False,
) -> ManifestRow:
    """A row that learns every token but the context's, unless a mask says otherwise."""
    if mask is None:
        mask = np.arange(len(sequence.input_ids)) >= sequence.context
    return ManifestRow(sequence, mask, weight, document, "corpus.txt", document + 1, heldout)


def tiny_manifest(
    path: Path, rows: Iterable[ManifestRow | Sequence], *, vocabulary: int = 40, tokenizer: str = TOKENIZER
) -> Manifest:
    """A manifest at `path`; a bare sequence becomes the row that `manifest_row` makes of it."""
    meta = ManifestMeta(
        window=64, overlap=0, tokenizer=tokenizer, chat_template=None, vocabulary=vocabulary,
        counts={}, config={}, inputs="00" * 16,
    )  # fmt: skip
    with ManifestWriter(path) as writer:
        for number, row in enumerate(rows):
            writer.append(manifest_row(row, document=number) if isinstance(row, Sequence) else row)
        writer.commit(meta)
    return Manifest.open(path)
