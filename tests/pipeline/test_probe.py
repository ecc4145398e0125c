"""Whether the teacher depends on its batch is asked before the first unit."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.precompute import LOOKED_AT_UNITS, PROBED_UNITS, require_batch_free
from stillroom.storage.errors import BadLogits, BatchDependent, StillroomError, TeacherError

BAND = {"positions": 16, "max_logit_difference": 1e-5, "rows": []}
MEASURED = {"positions": 16, "kl_mean_nats": 1e-7, "kl_worst_nats": 1e-6, "band": BAND}
NOTHING = {"positions": 0, "kl_mean_nats": 0.0, "kl_worst_nats": 0.0, "band": None}


class Asked:
    """Stands for the pool, whose actors are tested in tests/workers/test_actor.py."""

    ready = 1

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    def ask(self, method: str, sequences: list[str], *, tick: Callable[[], None]) -> Any:
        assert method == "probe"
        tick()
        self.asked.append(sequences)
        answer = self.answers.pop(0)
        if isinstance(answer, StillroomError):
            raise answer
        return answer


def probe(pool: Asked, units: int = 40) -> Any:
    pending = [SimpleNamespace(sequences=(f"{n}a", f"{n}b")) for n in range(units)]
    plan: Any = SimpleNamespace(pending=pending, rows={s: s for unit in pending for s in unit.sequences})
    manifest: Any = SimpleNamespace(rows=lambda wanted: [SimpleNamespace(sequence=s) for s in wanted])
    ticks: list[int] = []
    found = require_batch_free(pool, plan, manifest, Console(quiet=True), lambda: ticks.append(1))  # type: ignore[arg-type]
    assert len(ticks) == len(pool.asked)
    return found


def test_where_no_actor_can_be_started_it_is_said_at_once() -> None:
    pool = Asked(TeacherError("4 actors in a row died before they had the teacher loaded"))
    pool.ready = 0
    with pytest.raises(TeacherError, match="died before"):
        probe(pool)


def test_the_first_unit_is_enough() -> None:
    pool = Asked(MEASURED)
    assert probe(pool) == BAND
    assert pool.asked == [["0a", "0b"]]


def test_units_that_cannot_be_scored_are_passed_over(capfd: pytest.CaptureFixture[str]) -> None:
    pool = Asked(*[BadLogits("NaN")] * PROBED_UNITS)
    assert probe(pool) is None
    assert len(pool.asked) == PROBED_UNITS
    assert "it is not checked whether rows depend on their batch: 3 units could not be scored" in capfd.readouterr().err


def test_a_teacher_that_depends_on_its_batch_stops_the_run() -> None:
    pool = Asked(BadLogits("NaN"), BatchDependent("it depends on its batch"))
    with pytest.raises(BatchDependent):
        probe(pool)


def test_a_unit_without_a_batch_of_two_tells_nothing_and_the_next_is_asked() -> None:
    pool = Asked(*[NOTHING] * (PROBED_UNITS + 2), MEASURED)
    assert probe(pool) == BAND
    assert pool.asked[-1] == [f"{PROBED_UNITS + 2}a", f"{PROBED_UNITS + 2}b"]


def test_where_all_are_alone_the_asking_ends(capfd: pytest.CaptureFixture[str]) -> None:
    pool = Asked(*[NOTHING] * LOOKED_AT_UNITS)
    assert probe(pool) is None
    assert "no batch of the first units holds two sequences" in capfd.readouterr().err


def test_after_a_lost_actor_another_is_asked() -> None:
    pool = Asked(None, MEASURED)
    assert probe(pool, units=1) == BAND
    assert pool.asked == [["0a", "0b"]] * 2


def test_a_unit_that_loses_two_is_passed_over() -> None:
    pool = Asked(None, None, MEASURED)
    assert probe(pool) == BAND
    assert pool.asked[-1] == ["1a", "1b"]
