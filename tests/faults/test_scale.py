"""Very many committed shards: opening, listing and planning the resume in a fresh process."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.storage.log import CommitLog
from stillroom.storage.store import open_store
from tests.bench.scale import planned
from tests.faults.synthetic import make


def require_planned(found: dict[str, Any], count: int) -> None:
    expected = {"committed": count, "held": count, "sequences": count + 10, "bytes": 50_000 * count,
                "pending_sequences": 10, "pending": 3}  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.real
def test_memory_grows_with_the_shards_and_no_faster(tmp_path: Path) -> None:
    """2.0 kB a shard between these two; 1.4 kB at a million, where pools have settled. No time is asserted here."""
    few, many = 20_000, 80_000
    peaks = {}
    for count in (few, many):
        make(tmp_path / str(count), count, per_commit=10_000)
        found = planned(tmp_path / str(count))
        require_planned(found, count)
        peaks[count] = found["plan_peak_mb"]
    assert (peaks[many] - peaks[few]) * 1e6 / (many - few) < 2600


@pytest.mark.slow
@pytest.mark.real
def test_a_million_shards_are_opened_listed_and_planned(tmp_path: Path) -> None:
    """In at most 2 GB; measured 1.4. How long it takes says `python -m tests.bench.scale`."""
    make(tmp_path, 1_000_000)
    found = planned(tmp_path)
    require_planned(found, 1_000_000)
    assert found["plan_peak_mb"] < 2000


def test_columns_give_what_records_gave(tmp_path: Path) -> None:
    """Lazy listings behave as the dictionary and the list that they stand for."""
    make(tmp_path, 300, per_commit=100, plans=3)
    store = open_store(str(tmp_path / "store"))
    refs, planned = store.committed(), store.planned()
    as_dict = {unit: refs[unit] for unit in refs}
    assert refs == as_dict
    assert len(refs) == len(as_dict) == 300
    assert all(ref.unit == unit and ref.path == f"shards/{unit}-{2 * unit}.parquet" for unit, ref in refs.items())
    assert "0" * 32 not in refs
    assert planned == list(planned)
    assert {unit.id for unit in planned} == refs.keys()
    assert [type(unit)(unit.sequences, unit.tokens, unit.contexts).id for unit in planned] == [u.id for u in planned]
    assert planned[-1] == planned[299]
    assert planned[10:12] == [planned[10], planned[11]]
    CommitLog.open(store.uri).require_whole()
