"""What benches leave in a file of keys, such as build/bench.json, each beside what the others left.

Enters: keys. Leaves: the file, whole at every moment. Costs: one small write.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def kept(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


@contextmanager
def merged(path: Path) -> Iterator[dict[str, Any]]:
    """What a file of keys holds, to be added to; another process adds before or after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = kept(path)
        yield held
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(held, indent=2) + "\n")
        fresh.rename(path)
