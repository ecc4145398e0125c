"""waiting.py: what a student does, and says, while its teachers still write."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.pinning import Follower
from stillroom.pipeline.student.waiting import WaitEnded, Waiting
from stillroom.storage.arrivals import ArrivalsWriter, arrivals_path
from stillroom.storage.errors import StoreError, StudentError
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store
from tests.strategies import named_receipt, random_sequences, tiny_identity, tiny_store


class Time:
    """Passes while somebody sleeps; then something happens."""

    def __init__(self, *events: tuple[float, Callable[[], object]]) -> None:
        self.now, self._events = 0.0, list(events)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self._events and self._events[0][0] <= self.now:
            self._events.pop(0)[1]()


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(0), 12), per_unit=4)


def begun(store: Store, path: Path) -> tuple[Snapshot, Snapshot]:
    """(complete, as written to `path`: its last two units are to come)."""
    whole = store.snapshot()
    part = replace(whole, refs={whole.units[0].id: whole.refs[whole.units[0].id]})
    part.write(path)
    return whole, part


def waiting_of(path: Path, part: Snapshot, time: Time, lines: list[str], stopped: bool = False) -> Waiting:
    return Waiting(path, part, stopped=lambda: stopped, say=lines.append, clock=time, sleep=time.sleep)


def test_a_unit_is_waited_for_and_a_long_wait_has_a_line(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.parquet"
    whole, part = begun(store, path)
    writer = ArrivalsWriter(arrivals_path(path))
    second, third = (whole.refs[unit.id] for unit in whole.units[1:])
    time = Time((1.0, lambda: writer.tell([second])), (50.0, lambda: writer.tell([third])))
    lines: list[str] = []
    waiting = waiting_of(path, part, time, lines)
    assert waiting(second.unit, lambda: False) == second
    assert lines == []
    assert waiting(third.unit, lambda: False) == third
    assert waiting.held() == whole.refs
    assert waiting.seconds == pytest.approx(50.0, abs=0.3)
    assert [line.split(",")[0] for line in lines] == [f"waiting for unit {third.unit[:12]}"] * 2 + ["going on"]
    assert "2 of 3 units are there" in lines[0]


def test_nobody_waits_for_a_stopped_student_or_a_closed_stream(store: Store, tmp_path: Path) -> None:
    whole, part = begun(store, tmp_path / "snapshot.parquet")
    unit = whole.units[1].id
    with pytest.raises(WaitEnded):
        waiting_of(tmp_path / "snapshot.parquet", part, Time(), [], stopped=True)(unit, lambda: False)
    with pytest.raises(WaitEnded):
        waiting_of(tmp_path / "snapshot.parquet", part, Time(), [])(unit, lambda: True)
    with pytest.raises(WaitEnded):
        waiting_of(tmp_path / "snapshot.parquet", part, Time(), [], stopped=True).complete()


def test_a_student_ends_with_the_complete_snapshot(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.parquet"
    whole, part = begun(store, path)
    follower = Follower(store, path)
    assert follower.missing == [unit.id for unit in whole.units[1:]]
    assert follower.look() == 0
    time = Time((3.0, follower.complete))
    assert waiting_of(path, part, time, []).complete().digest == whole.digest
    assert Snapshot.read(path).refs == whole.refs


def test_another_shard_than_was_trained_on_is_refused(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.parquet"
    whole, part = begun(store, path)
    unit = whole.units[1].id
    other = replace(named_receipt(int(unit, 16)).shard)
    ArrivalsWriter(arrivals_path(path)).tell([other])
    whole.write(path)
    with pytest.raises(StudentError, match=f"has another shard of unit {unit}"):
        waiting_of(path, part, Time(), []).complete()


def test_a_shard_once_told_stays(store: Store, tmp_path: Path) -> None:
    """A unit that was repaired meanwhile has another shard in the log: the student goes on with what it read."""
    path = tmp_path / "snapshot.parquet"
    whole, _ = begun(store, path)
    other = named_receipt(int(whole.units[1].id, 16)).shard
    ArrivalsWriter(arrivals_path(path)).tell([other])
    follower = Follower(store, path)
    follower.look()
    follower.complete()
    assert Snapshot.read(path).refs == whole.refs | {other.unit: other}


def test_a_student_does_not_go_on_with_another_store(store: Store, tmp_path: Path) -> None:
    begun(store, tmp_path / "snapshot.parquet")
    sequences = random_sequences(np.random.default_rng(0), 12)
    replanned = tiny_store(tmp_path / "replanned", sequences, per_unit=5)
    retaught = tiny_store(tmp_path / "retaught", sequences, per_unit=4, identity=tiny_identity(weights="cd" * 16))
    for other in (replanned, retaught):
        with pytest.raises(StoreError, match="is not the one on which"):
            Follower(other, tmp_path / "snapshot.parquet")
