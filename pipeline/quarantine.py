"""Units that a run gives up: named, so that somebody can look at their documents, and not allowed to stop the others.

Enters: failed units. Leaves: one entry and one line for each. Costs: reading the manifest's rows of the failed units.

It also tells bad units from a bad teacher: where nothing succeeds, there is no sense in going on.
"""

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.plan import Plan
from stillroom.storage.errors import TeacherError
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Unit

#: So many failures and nothing scored, in a store that holds nothing: it is the teacher.
FAILED_AT_ONCE = 3
#: So many failures, and fewer units scored than failed: whatever it is, it is not these units.
FAILED_MOST = 20
#: Documents that a line names.
_SHOWN = 5


@dataclass(frozen=True)
class Quarantined:
    """One unit. documents: `source:line`, those at fault where the cause names sequences, else all of the unit."""

    unit: str
    sequences: int
    tokens: int
    cause: str
    documents: tuple[str, ...]

    def line(self) -> str:
        more = len(self.documents) - _SHOWN
        named = ", ".join(self.documents[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"unit {self.unit} is left out ({self.tokens:,} tokens of {named}): {self.cause}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"documents": list(self.documents)}


class Quarantine:
    """The units that this run gave up. A later run tries them again."""

    def __init__(self, plan: Plan, manifest: Manifest, console: Console) -> None:
        self._plan, self._manifest, self._console = plan, manifest, console
        self.units: list[Quarantined] = []

    def add(self, unit: Unit, cause: str, *, scored: int) -> Quarantined:
        """scored: units that this run has scored so far. Raises TeacherError where it cannot be the units."""
        named = [sequence for sequence in unit.sequences if sequence in cause] or list(unit.sequences)
        rows = self._manifest.rows([self._plan.rows[sequence] for sequence in named])
        documents = tuple(dict.fromkeys(f"{row.source}:{row.line}" for row in rows))
        entry = Quarantined(unit.id, len(unit.sequences), sum(unit.tokens), cause, documents)
        self.units.append(entry)
        self._console.notice(entry.line())
        failed = len(self.units)
        nothing_ever = failed >= FAILED_AT_ONCE and not scored and not self._plan.held
        if nothing_ever or (failed >= FAILED_MOST and failed > scored):
            raise TeacherError(
                f"{failed} units failed and {scored} were scored: it is the teacher or its machine, not the documents. "
                f"Last: {cause}"
            )
        return entry


def left_out(units: Seq[dict[str, Any]], store: str) -> str:
    """One line on the units of a run that are not in the store. units: as `Quarantined.as_dict` has them."""
    first = units[0]
    documents = first["documents"]
    more = " …" if len(documents) > 2 or len(units) > 1 else ""
    count = "1 unit" if len(units) == 1 else f"{len(units)} units"
    return (
        f"{count} could not be scored and left out of store {store}; all others are committed. The first is "
        f"{first['unit']}: {first['cause']}. Mend or remove what it is about ({', '.join(documents[:2])}{more}); the "
        "same command tries again what is left out"
    )
