"""The teaching stage's parts: room, ledger, commits under signals, a Ray of its own."""

import json
import os
import signal
from pathlib import Path

import pytest

from stillroom.pipeline.founding import require_room
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.process import only_one, terminable, uninterrupted
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.errors import RecipeError, StillroomError, StoreFull

MINIMAL = {"name": "n", "teacher": {"model": "m"}, "corpus": {"sources": ["s"]}}


def recipe_with(**store: float) -> Recipe:
    return Recipe.model_validate({**MINIMAL, "store": store})


class TestRoom:
    def test_the_margin_and_the_floor_both_count(self) -> None:
        recipe = recipe_with(safety=1.5, min_free_bytes=100)
        require_room("s", 200, 400, recipe=recipe)
        with pytest.raises(
            StoreFull, match=r"about 200 B more, times store.safety 1.5 plus .* 100 B, but 399 B are free"
        ):
            require_room("s", 200, 399, recipe=recipe)

    def test_the_floor_alone_is_said_alone(self) -> None:
        with pytest.raises(StoreFull, match=r"^store s needs store.min_free_bytes 1.0 kB, but 999 B are free"):
            require_room("s", 0, 999, recipe=recipe_with(min_free_bytes=1000))

    def test_where_nobody_knows_the_room_nothing_is_refused(self) -> None:
        require_room("s", 10**18, None, recipe=recipe_with())


def entry(batches: int, student: str = "a", tokens: int = 10, wall_s: float = 2.0) -> dict[str, object]:
    return {"on_behalf_of": student, "teacher_batches": batches, "tokens_scored": tokens, "wall_s": wall_s}


class TestLedger:
    def test_it_sums_over_objects_and_students(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "ledger.jsonl"
        assert Ledger(path).tokens_per_s() is None
        for line in (entry(3), entry(4, "b"), entry(5)):
            Ledger(path).add(line)
        assert Ledger(path).batches({"a"}) == 8
        assert Ledger(path).batches({"b", "c"}) == 4
        assert Ledger(path).tokens_per_s() == 5.0

    @pytest.mark.parametrize("cut", [1, 5, 40])
    def test_a_torn_line_costs_itself_alone(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "ledger.jsonl"
        ledger = Ledger(path)
        ledger.add(entry(1))
        ledger.add(entry(2))
        path.write_bytes(path.read_bytes()[:-cut])
        before = ledger.batches({"a"})
        ledger.add(entry(4))
        assert before in ((1, 3) if cut == 1 else (1,))
        assert ledger.batches({"a"}) == before + 4
        assert json.loads(path.read_text().splitlines()[-1]) == entry(4)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_one_waits_for_the_end_of_the_block(self, number: signal.Signals) -> None:
        done = []
        with pytest.raises(KeyboardInterrupt), terminable():  # noqa: PT012
            with uninterrupted():
                for _ in range(3):
                    signal.raise_signal(number)
                done.append("all of it")
            done.append("not this")
        assert done == ["all of it"]

    def test_handlers_are_as_before(self) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with terminable(), uninterrupted():
            assert signal.getsignal(signal.SIGINT) != before[0]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_runs_folder_has_one_command_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "run"):
        with pytest.raises(StillroomError, match="another stillroom command is at work"), only_one(tmp_path / "run"):
            pass
        with only_one(tmp_path / "other"):
            pass
    with only_one(tmp_path / "run"):
        pass


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_ray_ignores_the_address_in_the_environment_and_knows_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stillroom.pipeline.cluster import session

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # joining it would fail after half a minute
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))  # and no token is written there
    handler = signal.getsignal(signal.SIGTERM)
    import ray

    with session(RayConfig(actors=3, cpus_per_actor=0.5)):
        assert ray.cluster_resources()["CPU"] == 2
        assert signal.getsignal(signal.SIGTERM) == handler, "ray.init's would end the process without a word"
        assert not (tmp_path / "nowhere").exists()
    assert not ray.is_initialized()
    with (
        pytest.raises(RecipeError, match=r"1 actors with 64 GPUs each need 64, this machine has"),
        session(RayConfig(gpus_per_actor=64)),
    ):
        pass
    assert not ray.is_initialized()
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
