"""`make bench`: a store of a million shards, opened, listed and planned by one fresh process.

Enters: nothing. Leaves: its keys in `build/bench.json`. Costs: two minutes and 2 GB, most of it to make the store.

    python -m tests.bench.scale [--output build/bench.json] [--shards 1000000] [--repeats 3]

Seconds are of the wall on one core, the median of the repeats; memory is the largest of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.results import merged
from tests.faults.synthetic import make


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), arguments.shards)
        found = [planned(Path(scratch)) for _ in range(arguments.repeats)]
    times = {part: round(median(one[f"{part}_s"] for one in found), 2) for part in ("open", "list", "plan")}
    result = {
        "scale_shards": arguments.shards,
        **{f"scale_{part}_s": seconds for part, seconds in times.items()},
        "scale_s": round(sum(times.values()), 2),
        "scale_peak_mb": max(one["plan_peak_mb"] for one in found),
    }
    with merged(arguments.output) as held:
        held |= result
    print(json.dumps(result, indent=2))


def planned(folder: Path) -> dict[str, Any]:
    """What a process of its own says that opens the store, lists it and plans the resume."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.synthetic", str(folder)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
