"""The pool on a real Ray, with actors that fail as they are told: who is to blame, what goes on, what stops."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from stillroom.pipeline.cluster import Actors, session
from stillroom.pipeline.pool import Failed, Pool, Work
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.errors import BadLogits, IdentityMismatch, StoreFull, TeacherError
from stillroom.storage.records import Receipt, Unit
from stillroom.workers.teacher import TruthRequest
from tests.strategies import named_receipt

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = RayConfig(actors=2, cpus_per_actor=0.5, retries=1)


class Scripted:
    """Does what the name of a unit's sequence says; notes in a folder who took what."""

    def __init__(self, folder: Path, loading: str) -> None:
        self._folder, self._loading = folder, loading

    def ready(self) -> dict[str, Any]:
        number = self._count("starts")
        if self._loading == "mismatch":
            raise IdentityMismatch("another teacher")
        if self._loading == "dies" or (self._loading == "dies once" and number == 1):
            os._exit(1)
        return {"device": "cpu", "number": number}

    def score_unit(self, unit: Unit, sequences: list[Any], truth: TruthRequest) -> Receipt:
        name = unit.sequences[0]
        number = self._count(name)
        if name.startswith("kills") or (name.startswith("once") and number == 1):
            os._exit(1)
        if name.startswith("full"):
            raise StoreFull("no room")
        if name.startswith("nan"):
            raise BadLogits(f"unit {unit.id}: NaN in sequence {name}")
        if name.startswith("breaks"):
            raise ValueError("what is that?")
        receipt = named_receipt(1)
        return replace(receipt, shard=replace(receipt.shard, unit=unit.id))

    def probe(self, name: str) -> str:
        number = self._count(name)
        if name == "hangs once" and number == 1:
            threading.Event().wait()
        if name.startswith("kills") or (name == "lost once" and number == 1):
            os._exit(1)
        if name == "nan":
            raise BadLogits("NaN")
        return f"asked {number} times"

    def _count(self, name: str) -> int:
        with (self._folder / name).open("ab") as file:
            file.write(b".")
            return file.tell()


def work(*names: str) -> Iterator[Work]:
    for name in names:
        yield Unit((name,), (1,), (0,)), [], TruthRequest()


def counts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session(CONFIG):
        yield


@pytest.fixture
def said() -> list[str]:
    return []


def pool(
    folder: Path,
    said: list[str],
    loading: str = "",
    config: RayConfig = CONFIG,
    tick: Callable[[], None] = lambda: None,
) -> Pool:
    def create(**options: Any) -> Any:
        return ray.remote(max_concurrency=2, **options)(Scripted).remote(folder, loading)

    made = Pool(Actors(create, config), config, said.append)
    try:
        made.start(tick)
    except BaseException:
        made.stop()
        raise
    return made


def score(made: Pool, *names: str) -> tuple[set[str], dict[str, str]]:
    """Units scored, and the causes of those given up, by the first sequence's name."""
    ids = {unit.id: unit.sequences[0] for unit, _, _ in work(*names)}
    try:
        events = [event for event in made.run(work(*names)) if event is not None]
    finally:
        made.stop()
    scored = [ids[event.shard.unit] for event in events if isinstance(event, Receipt)]
    failed = {event.unit.sequences[0]: event.cause for event in events if isinstance(event, Failed)}
    assert len(events) == len(names)
    assert len(set(scored)) == len(scored)
    return set(scored), failed


def test_what_the_teacher_raises_on_a_unit_costs_that_unit(tmp_path: Path, said: list[str]) -> None:
    scored, failed = score(pool(tmp_path, said), "a", "nan", "b", "c")
    assert scored == {"a", "b", "c"}
    assert failed["nan"].endswith("NaN in sequence nan")
    assert counts(tmp_path)["nan"] == 1, "the same unit fails the same way"
    assert not said


def test_a_unit_that_kills_its_actor_is_given_up_and_its_neighbours_are_not(tmp_path: Path, said: list[str]) -> None:
    names = ["kills", *(f"unit{i}" for i in range(12))]
    scored, failed = score(pool(tmp_path, said), *names)
    assert scored == set(names[1:])
    assert failed.keys() == {"kills"}
    assert "it lost its actor 2 times (ray.retries is 1), last: " in failed["kills"]
    assert counts(tmp_path)["kills"] in (2, 3), "a first time beside another unit tells nothing; then alone"
    assert sum("is handed out again, alone" in line for line in said) >= 1


def test_an_actor_lost_once_costs_nothing(tmp_path: Path, said: list[str]) -> None:
    scored, failed = score(pool(tmp_path, said), "once", "a", "b", "c")
    assert (scored, failed) == ({"once", "a", "b", "c"}, {})


def test_an_error_that_nobody_foresaw_is_tried_on_another_actor(tmp_path: Path, said: list[str]) -> None:
    scored, failed = score(pool(tmp_path, said), "a", "breaks", "b")
    assert scored == {"a", "b"}
    assert failed["breaks"].endswith("last: ValueError: what is that?")
    assert counts(tmp_path)["breaks"] == 2
    assert counts(tmp_path)["starts"] >= 3, "a process may be of no use after such an error"


def test_a_full_store_stops_all(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(StoreFull, match=r"^no room$"):
        score(pool(tmp_path, said), "a", "full", "b")


def test_a_teacher_that_is_another_one_stops_all(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(IdentityMismatch, match=r"^another teacher$"):
        pool(tmp_path, said, "mismatch")


def test_an_actor_that_dies_while_loading_is_replaced(tmp_path: Path, said: list[str]) -> None:
    ticks: list[int] = []
    made = pool(tmp_path, said, "dies once", CONFIG.model_copy(update={"actors": 1}), lambda: ticks.append(1))
    assert len(ticks) >= 2
    assert score(made, "a", "b") == ({"a", "b"}, {})
    assert [line.split(":")[0] for line in said] == ["an actor died while it loaded the teacher, another is started"]


def test_actors_that_never_load_end_the_run(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(TeacherError, match=r"^2 teacher actors in a row died before .* ray.retries allows 1"):
        pool(tmp_path, said, "dies", CONFIG.model_copy(update={"actors": 1}))


def test_actors_without_room_wait_and_the_others_begin(tmp_path: Path, said: list[str]) -> None:
    """Three on a Ray that holds two: the third is never there, and nothing waits for it."""
    made = pool(tmp_path, said, "", CONFIG.model_copy(update={"actors": 3}))
    names = [f"unit{i}" for i in range(8)]
    assert score(made, *names) == (set(names), {})
    assert len(made.said) in (1, 2)
    assert counts(tmp_path)["starts"] == len(made.said)


@pytest.mark.parametrize("name", ["lost once", "hangs once"])
def test_who_is_asked_and_does_not_answer_is_replaced(tmp_path: Path, said: list[str], name: str) -> None:
    made = pool(tmp_path, said, "", CONFIG.model_copy(update={"actors": 1}))
    ticks: list[int] = []
    assert made.ask("probe", name, tick=lambda: ticks.append(1), answer_s=10 if name == "hangs once" else 600) is None
    assert sum(line.startswith("an actor was lost, another is started: ") for line in said) == 1
    again = made.ask("probe", name, tick=lambda: ticks.append(1), answer_s=300)
    assert again == "asked 2 times", "by one that had yet to load"
    assert ticks
    assert made.retries == 1
    with pytest.raises(BadLogits, match="NaN"):
        made.ask("probe", "nan")
    assert score(made, "a", "b") == ({"a", "b"}, {})
