"""A pilot: score a few sequences of the plan in this process, to know what the rest will cost.

Enters: a recipe and a plan. Leaves: bytes and hours for what is pending, against the free disk. Costs: loading the
teacher once and scoring `PILOT_TOKENS` tokens; nothing is committed.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.plan import Plan
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.storage.files import LocalFiles, open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence, Unit
from stillroom.storage.shard import write_shard

#: Enough for bytes per token to 3 % (real teacher, k = 64), and some seconds of a small teacher on a CPU.
PILOT_TOKENS = 2048


def estimate(recipe: Recipe, plan: Plan, manifest: Manifest, sources: Sources, console: Console) -> dict[str, Any]:
    """What teaching the plan will take. hours: with `ray.actors` teachers as fast as this process's one."""
    from stillroom.workers.torch_teacher import TorchTeacher

    sequences = _sample(plan, manifest)
    tokens = sum(len(s.input_ids) for s in sequences)
    console.info(f"plan: a pilot of {tokens:,} tokens")
    teacher = TorchTeacher(sources.teacher_spec())
    teacher.score(sequences[:1], k=recipe.signal.k)  # the first pass pays for what the others do not
    start = time.monotonic()
    blocks = teacher.score(sequences, k=recipe.signal.k)
    seconds = time.monotonic() - start
    teacher.release()
    unit = Unit(
        tuple(s.digest for s in sequences),
        tuple(len(s.input_ids) for s in sequences),
        tuple(s.context for s in sequences),
    )
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(LocalFiles(Path(folder)), sources.identity(), unit, sequences, blocks, {})
    total = round(shard.size_bytes / tokens * plan.pending_tokens)
    free = open_files(recipe.store.path).free_bytes()
    return {
        "pilot_tokens": tokens,
        "bytes_per_token": round(shard.size_bytes / tokens, 1),
        "tokens_per_s_per_actor": round(tokens / seconds, 1),
        "bytes": total,
        "hours": round(plan.pending_tokens / (tokens / seconds) / recipe.ray.actors / 3600, 4),
        "fits": free is None or total * recipe.store.safety + recipe.store.min_free_bytes <= free,
    }


def _sample(plan: Plan, manifest: Manifest) -> list[Sequence]:
    """The first sequences of the plan, which are a random sample of the corpus: units are made by digest."""
    chosen: list[int] = []
    tokens = 0
    for unit in plan.pending:
        for digest, length in zip(unit.sequences, unit.tokens, strict=True):
            if chosen and tokens + length > PILOT_TOKENS:
                return [row.sequence for row in manifest.rows(chosen)]
            chosen.append(plan.rows[digest])
            tokens += length
    return [row.sequence for row in manifest.rows(chosen)]
