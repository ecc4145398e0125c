"""The run's ledger: one line per commit of taught units, kept over interruptions and re-runs.

Enters: what was taught, and for whom. Leaves: sums over all of them. Costs: one appended line.
"""

import json
import os
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any


class Ledger:
    """`ledger.jsonl` in the run's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, entry: dict[str, Any]) -> None:
        """Append, and reach the disk: what a killed run did must be counted."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A full disk or a kill may have torn the last line: it must not take this one with it.
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """All lines that are whole; a kill or a full disk may have cut one."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def batches(self, students: Container[str]) -> int:
        """Teacher batches run on behalf of these students."""
        return sum(e["teacher_batches"] for e in self.entries() if e["on_behalf_of"] in students)

    def rows_per_s(self) -> float | None:
        """Rows written per second, all actors together: of a ledger of generating, tokens of responses. None if nothing
        was, or an earlier release did not count them."""
        entries = [e for e in self.entries() if "rows" in e]
        seconds = sum(e["wall_s"] for e in entries)
        return round(sum(e["rows"] for e in entries) / seconds, 1) if seconds else None

    def tokens_per_s(self) -> float | None:
        """Tokens scored per second of scoring, all actors together, or None if nothing was scored."""
        seconds = sum(e["wall_s"] for e in self.entries())
        return round(sum(e["tokens_scored"] for e in self.entries()) / seconds, 1) if seconds else None
