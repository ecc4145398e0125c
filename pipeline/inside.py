"""What hidden layers and attention maps of a teacher would take in a store: the planner's second table.

Enters: a loaded teacher, sequences of the pilot, and the units that are to be scored. Leaves: bytes a token, by really
capturing and encoding a few layers. Costs: one pass over `TRIED_TOKENS` tokens with attention in full, and encoding
what it gave. A block's maps in full, at `TRIED_TOKENS` tokens, take 0.1 GB with 9 heads (SmolLM2) and 0.7 with 64.

How far layers and maps can be compressed is the teacher's own. SmolLM2-135M on 512 tokens: its layers take 776 … 832
bytes a position, and a guess from the final hidden state's int16 said 548; its maps, mean over heads, 118 … 222, of 256
numbers. How many numbers there are follows from the plan.
"""

import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stillroom.pipeline.options import unit_of
from stillroom.storage.attention import Attention
from stillroom.storage.catalog.footers import columns_of
from stillroom.storage.errors import TeacherError
from stillroom.storage.files import LocalFiles
from stillroom.storage.identity import Identity
from stillroom.storage.records import AttentionSpec, LayersSpec, Sequence, Signal, SignalSpec, Unit
from stillroom.storage.shard import write_shard

#: Of the pilot's. Layers hardly depend on it; maps of one sequence of 512 lie within a tenth of those of four.
TRIED_TOKENS = 1024

#: Captured, from the middle of as many parts: of SmolLM2 they give 827 and 158 where all give 824 and 157.
TRIED_LAYERS = 3
TRIED_MAPS = 5

#: Of all maps together, which bounds the memory; one sequence is tried whatever it takes.
MOST_NUMBERS = 1 << 24


def price_inside(
    teacher: Any, identity: Identity, sequences: Seq[Sequence], units: Seq[Unit], shape: tuple[int, int],
    notice: Callable[[str], None],
) -> list[tuple[str, float]]:  # fmt: skip
    """What could be kept beside the output, in words, and bytes a token of the units.

    teacher: a `TorchTeacher`; its attention is eager afterwards. shape: its layers and heads. notice: told what cannot
    be captured of this teacher, which is then not in the table.
    """
    blocks, heads = shape
    asked = identity.signal
    kept_layers = LayersSpec(
        tuple(n + 1 for n in middles(blocks, TRIED_LAYERS)),
        teacher.hidden_width,
        asked.layers.dtype if asked.layers else "bfloat16",
    )
    dtype = asked.attention.dtype if asked.attention else "uint8"
    kept_maps = AttentionSpec(middles(blocks, TRIED_MAPS), TRIED_TOKENS, "per_head", heads, dtype)
    tried = _few(sequences, MOST_NUMBERS // (heads * len(kept_maps.layers)))
    try:
        teacher.attend_in_full()
        scored = teacher.score(tried, signal=SignalSpec(layers=kept_layers, attention=kept_maps))
    except TeacherError as error:
        notice(f"plan: attention maps are not priced: {error}")
        try:
            scored = teacher.score(tried, signal=SignalSpec(layers=kept_layers))
        except TeacherError as also:
            notice(f"plan: hidden layers are not priced: {also}")
            return []
    tokens = sum(sum(unit.tokens) for unit in units)
    rows = sum(sum(unit.rows) for unit in units) / sum(s.rows for s in tried)
    states = [Signal(layers=s.layers) for s in scored]
    one = encoded_bytes(identity, SignalSpec(layers=kept_layers), tried, states) / len(kept_layers.layers)
    found = [(f"{name}, {kept_layers.dtype}", one * rows * count) for name, count in _choices(blocks)]
    if scored[0].attention is not None:
        spans = [span for unit in units for span in zip(unit.tokens, unit.rows, strict=True)]
        numbers = sum(_attended(*span) for span in spans) / _numbers(tried) / len(kept_maps.layers)
        found += [(name, size * numbers) for name, size in _maps(identity, kept_maps, tried, scored)]
    return [(name, size / tokens) for name, size in found]


def _choices(blocks: int) -> list[tuple[str, int]]:
    """Layers that a recipe may ask for, in words, and how many they are."""
    found = [("one hidden layer", 1), (f"every fourth of {blocks} hidden layers", blocks // 4)]
    return [*(each for each in found if each[1]), (f"all {blocks} hidden layers", blocks)]


def _maps(
    identity: Identity, spec: AttentionSpec, sequences: Seq[Sequence], scored: Seq[Signal]
) -> list[tuple[str, float]]:
    """Bytes that all tried layers take. spec: of each head."""
    apart = [Signal(attention=s.attention) for s in scored]
    mean = [Signal(attention=_mean_of(s.attention)) for s in scored]
    of_mean = replace(spec, heads="mean", head_count=None)
    return [
        (
            f"one layer's attention, mean of heads, {spec.dtype}",
            encoded_bytes(identity, SignalSpec(attention=of_mean), sequences, mean),
        ),
        (
            f"one layer's attention, {spec.head_count} heads, {spec.dtype}",
            encoded_bytes(identity, SignalSpec(attention=spec), sequences, apart),
        ),
    ]


def encoded_bytes(identity: Identity, spec: SignalSpec, sequences: Seq[Sequence], blocks: Seq[Signal]) -> int:
    """Of the signal's columns in a shard, as they lie on disk: without ids and footer."""
    with tempfile.TemporaryDirectory(prefix="stillroom-plan-") as folder:
        ref = write_shard(
            LocalFiles(Path(folder)), replace(identity, signal=spec), unit_of(sequences), sequences, blocks, {}
        )
        columns = list(columns_of(pq.read_metadata(Path(folder) / ref.path)))
    return sum(c.total_compressed_size for name, c in columns if name.startswith(("layer_", "attention_")))


def middles(count: int, most: int) -> tuple[int, ...]:
    """At most so many of 0 … count − 1, each from the middle of a part."""
    parts = min(count, most)
    return tuple((2 * part + 1) * count // (2 * parts) for part in range(parts))


def _few(sequences: Seq[Sequence], most_numbers: int) -> list[Sequence]:
    """The first ones of at most `TRIED_TOKENS` tokens and so many numbers of a map, from their beginnings."""
    whole = {s.digest: s for s in (Sequence(s.input_ids[:TRIED_TOKENS]) for s in sequences)}
    found: list[Sequence] = []
    for sequence in whole.values():
        more = [*found, sequence]
        if found and (sum(len(s.input_ids) for s in more) > TRIED_TOKENS or _numbers(more) > most_numbers):
            break
        found = more
    return found


def _numbers(sequences: Seq[Sequence]) -> int:
    """Of one map of each."""
    return sum(_attended(len(s.input_ids), s.rows) for s in sequences)


def _attended(tokens: int, rows: int) -> int:
    """Positions that the last `rows` of a sequence look at: t + 1 of position t."""
    before = tokens - rows
    return tokens * (tokens + 1) // 2 - before * (before + 1) // 2


def _mean_of(maps: Attention | None) -> Attention:
    assert maps is not None
    return Attention.of(maps.dense().mean(1, keepdims=True), int(maps.widths[0]) - 1)
