"""What a reading of prompts took, and what it left out: of each kind how many, and one to look at.

Enters: events. Leaves: numbers, and lines for people. Costs: the places of the first 65,536 prompts, 25 MB at most.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

#: Of what was left out, named one by one in `--json`.
_EXAMPLES = 20
#: Prompts whose places are remembered, to show one that occurs again.
_REMEMBERED = 65_536
#: The kind of a prompt that occurs again.
REPEATED = "repeated, answered once"


@dataclass
class PromptCounts:
    """What was read.

    prompts, tokens: those to be answered; duplicates: of these, such as an earlier one is. bad: records left out;
    bad_examples: "source:line: reason", the first 20. left_out: a dictionary for each `kind`, REPEATED among them, with
    how many `prompts` and the first as `example`; empty in manifests of an earlier release.
    """

    prompts: int = 0
    tokens: int = 0
    duplicates: int = 0
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    stopped_at: str | None = None
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, kind: str, example: str, records: int = 1) -> None:
        self.bad += records
        if len(self.bad_examples) < _EXAMPLES:
            self.bad_examples.append(example)
        for entry in self.left_out:
            if entry["kind"] == kind:
                entry["prompts"] += records
                return
        self.left_out.append({"kind": kind, "prompts": records, "example": example})

    def set_duplicates(self, count: int, example: str | None) -> None:
        self.duplicates = count
        if count:
            self.left_out.append({"kind": REPEATED, "prompts": count, "example": example})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        return f"{self.prompts:,} prompts, {self.tokens:,} tokens"

    def notices(self) -> list[str]:
        """A line for each kind.

        >>> counts = PromptCounts()
        >>> counts.leave_out("empty", "a:1: it is empty")
        >>> counts.leave_out("empty", "a:9: it is empty")
        >>> counts.notices()
        ['2 left out (empty), the first is a:1: it is empty']
        """
        said = []
        for entry in self.left_out:
            kind, count = entry["kind"], entry["prompts"]
            what = "occur more than once and are answered once" if kind == REPEATED else f"left out ({kind})"
            first = f", the first is {entry['example']}" if entry["example"] else ""
            said.append(f"{count:,} {what}{first}")
        if self.stopped_at:
            said.append(f"reading stopped at {self.stopped_at}")
        return said


class Places:
    """Where prompts stand, to name the first one that occurs again; of more than are remembered perhaps none."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}
        self.repeated: str | None = None
        """`source:line, as source:line`."""

    def add(self, digest: str, place: str) -> None:
        if self.repeated is not None:
            return
        first = self._seen.get(digest)
        if first is not None:
            self.repeated = f"{place}, as {first}"
            self._seen = {}
        elif len(self._seen) < _REMEMBERED:
            self._seen[digest] = place
