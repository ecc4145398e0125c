"""The student's small world, with a store that also holds what lies inside the teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.storage.attention import Attention
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity, tokenizer_digest
from stillroom.storage.records import AttentionSpec, LayersSpec, Sequence, Signal, SignalSpec, TopKSpec, Unit
from stillroom.storage.shard import write_shard
from stillroom.storage.snapshot import Snapshot
from tests.student.world import World, build_world, documents_of, score

#: A teacher of four blocks, 32 channels, 4 heads.
SPEC = SignalSpec(
    TopKSpec(16, None),
    layers=LayersSpec((0, 1, 2, 3, 4), 32, "float32"),
    attention=AttentionSpec((0, 1, 2, 3), 64, "per_head", 4, "float32"),
)


@torch.no_grad()
def signal_of(model: Any, sequence: Sequence, spec: SignalSpec, *, vocabulary: int) -> Signal:
    """All of the spec that the teacher says of one sequence alone, from its own `output_…`."""
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    first = sequence.first_position
    topk = layers = attention = None
    if spec.layers:
        layers = torch.stack([out.hidden_states[i][0, first:] for i in spec.layers.layers], 1).numpy()
    if spec.attention:
        maps_nHRT = torch.stack([out.attentions[i][0, :, first:] for i in spec.attention.layers])
        if spec.attention.heads == "mean":
            maps_nHRT = maps_nHRT.mean(1, keepdim=True)
        attention = Attention.of(maps_nHRT.numpy(), first)
    if spec.topk:
        topk = score(model, sequence, vocabulary=vocabulary, k=spec.topk.k)
    hidden = out.hidden_states[-1][0, first:].numpy() if spec.hidden else None
    return Signal(topk, hidden=hidden, layers=layers, attention=attention)


def build_inner_world(folder: Path, spec: SignalSpec = SPEC) -> World:
    """As `build_world`, and a store of this spec."""
    world = build_world(folder)
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32, attn_implementation="eager").eval()
    digest = tokenizer_digest(tokenizer.backend_tokenizer.to_str())
    sequences = list({s.digest: s for s in map(Sequence, documents_of(tokenizer, 60))}.values())
    identity = Identity("tiny", "weights", "config", digest, world.vocabulary, "float32", None, spec)
    root = folder / "inner"
    root.mkdir()
    files, units, refs = open_files(str(root)), [], {}
    for start in range(0, len(sequences), 20):
        part = sequences[start : start + 20]
        lengths = tuple(len(s.input_ids) for s in part)
        unit = Unit(tuple(s.digest for s in part), lengths, tuple(s.context for s in part))
        blocks = [signal_of(model, s, spec, vocabulary=world.vocabulary) for s in part]
        refs[unit.id] = write_shard(files, identity, unit, part, blocks, {})
        units.append(unit)
    snapshot = folder / "inner.parquet"
    Snapshot(files.uri, identity, tuple(units), refs).write(snapshot)
    return replace(world, snapshot=snapshot)
