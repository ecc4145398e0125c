"""Whether the teacher depends on its batch is asked before the first unit."""

from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.precompute import PROBED_UNITS, require_batch_free
from stillroom.storage.errors import BadLogits, BatchDependent, StillroomError


class Asked:
    """Stands for the pool, whose actors are tested in tests/workers/test_actor.py."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    def ask(self, method: str, sequences: list[str]) -> Any:
        assert method == "probe"
        self.asked.append(sequences)
        answer = self.answers.pop(0)
        if isinstance(answer, StillroomError):
            raise answer
        return answer


def probe(pool: Asked) -> None:
    units = [SimpleNamespace(sequences=(f"{n}a", f"{n}b")) for n in range(9)]
    plan: Any = SimpleNamespace(pending=units, rows={s: s for unit in units for s in unit.sequences})
    manifest: Any = SimpleNamespace(rows=lambda wanted: [SimpleNamespace(sequence=s) for s in wanted])
    require_batch_free(pool, plan, manifest, Console(quiet=True))  # type: ignore[arg-type]


def test_the_first_unit_is_enough() -> None:
    pool = Asked({"positions": 16, "kl_mean_nats": 1e-7, "kl_worst_nats": 1e-6})
    probe(pool)
    assert pool.asked == [["0a", "0b"]]


def test_units_that_cannot_be_scored_are_passed_over() -> None:
    pool = Asked(*[BadLogits("NaN")] * PROBED_UNITS)
    probe(pool)
    assert len(pool.asked) == PROBED_UNITS


def test_a_teacher_that_depends_on_its_batch_stops_the_run() -> None:
    pool = Asked(BadLogits("NaN"), BatchDependent("it depends on its batch"))
    with pytest.raises(BatchDependent):
        probe(pool)


def test_an_actor_that_is_lost_is_not_waited_for() -> None:
    pool = Asked(None)
    probe(pool)
    assert len(pool.asked) == 1
