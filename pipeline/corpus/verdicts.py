"""The table of verdicts: which responses a recipe keeps, and why not the others. One row per response.

Enters: verdicts. Leaves: `verdicts.parquet` in a run's folder, and back. Costs: about 30 bytes a response.

The responses lie in a store of generations and never change; another filter is another table. A corpus source of
`generations` reads the two together (generations.py).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard, RecipeError
from stillroom.storage.files import LocalFiles

#: The reason of a response that is not dropped.
KEPT = "kept"

_META = b"stillroom.verdicts"
SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("mean_logprob", pa.float64(), nullable=False),
        pa.field("repetition", pa.float64(), nullable=False),
        pa.field("agrees", pa.bool_()),
        pa.field("score", pa.float64()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Verdict:
    """Of one response.

    sequence: digest of prompt and response as one sequence: what a corpus manifest and a store of logits know it by.
    unit: where the response lies. tokens: of the response. agrees: with the reference; None where there is none or it
    was not asked. score: of the user's function, 0 or 1 for false and true. reason: KEPT, or what it was dropped for.
    """

    prompt: str
    sample: int
    sequence: str
    unit: str
    tokens: int
    mean_logprob: float
    repetition: float
    agrees: bool | None
    score: float | None
    reason: str

    @property
    def kept(self) -> bool:
        return self.reason == KEPT


def write_verdicts(path: Path, verdicts: Iterable[Verdict], meta: Mapping[str, Any]) -> Counter[str]:
    """Write the table, atomically, unless it is there already as it would be; how many there are of each reason.

    meta: where the responses lie: `store`, `identity`, `tokenizer`, and `prompts`, the manifest of the prompts.
    """
    rows = [vars(v) | {"kept": v.kept} for v in verdicts]
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({_META: json.dumps(dict(meta), sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    if not path.exists() or path.read_bytes() != data:  # a corpus made of it looks at the time of change
        LocalFiles(path.parent).write(path.name, data)
    return Counter(row["reason"] for row in rows)


def read_verdicts(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """(table, meta). Raises RecipeError if there is none, CorruptShard if it cannot be read."""
    if not path.is_file():
        raise RecipeError(f"there are no generations in {path}: run `stillroom generate` on the recipe that makes them")
    try:
        table = pq.read_table(os.fspath(path), use_threads=False, page_checksum_verification=True)
        meta: dict[str, Any] = json.loads(table.schema.metadata[_META])
        return table.select(SCHEMA.names), meta
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise CorruptShard(f"{path} is no table of verdicts ({' '.join(str(error).split())}): remove it, and run "
                           "`stillroom generate` again, which generates nothing anew") from error  # fmt: skip
