"""Made the stores beside this file. Run it only for a new format version: `python -m tests.golden.make v2`.

Committed files of older versions are never made anew: that today's code reads them, bit for bit, is their use.
What they hold is written out in `expected.json`, numbers as hexadecimal floats.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.storage.records import Sequence
from stillroom.storage.store import Store, open_store
from tests.strategies import manifest_row, tiny_identity, tiny_manifest, tiny_store

HERE = Path(__file__).parent
STEPS = {"int16": 1 / 8, "float32": None}


def golden_sequences() -> list[Sequence]:
    """Lengths 1 to 9, with and without a context; ids from a formula, so that no random generator is needed."""
    return [
        Sequence(((np.arange(length) * 7 + length) % 40).astype(np.int32), context)
        for length, context in ((9, 0), (1, 0), (6, 2), (4, 1), (8, 7))
    ]


def contents(store: Store) -> dict[str, Any]:
    """All that a reader sees, as JSON that loses no bit."""
    return {
        "identity": store.identity.id,
        "plan": [[u.id, list(u.sequences), list(u.tokens), list(u.contexts)] for u in store.planned()],
        "shards": {unit: ref.path for unit, ref in sorted(store.committed().items())},
        "sequences": [
            {
                "digest": s.sequence.digest,
                "context": s.sequence.context,
                "input_ids": s.sequence.input_ids.tolist(),
                "topk_ids": s.topk.ids.tolist(),
                "logits": [[float(x).hex() for x in row] for row in s.topk.logits],
                "tail_lse": [[float(x).hex() for x in row] for row in s.topk.tail_lse],
            }
            for s in store.sequences()
            if s.topk is not None
        ],
    }


def make(folder: Path) -> None:
    sequences = golden_sequences()
    expected: dict[str, Any] = {}
    for name, step in STEPS.items():
        tiny_store(folder / name, sequences, identity=tiny_identity(gap_step=step), per_unit=3)
        expected[name] = contents(open_store(str(folder / name)))
    rows = [manifest_row(s, weight=n / 2, document=n, heldout=n == 3) for n, s in enumerate(sequences)]
    expected["manifest"] = tiny_manifest(folder / "manifest.parquet", rows).digest
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    target = HERE / sys.argv[1]
    if target.exists():
        sys.exit(f"{target} exists: stores of a version that was released are kept as they are")
    make(target)
