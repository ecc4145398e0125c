"""Units given up: their documents by name, and when it is not the units any more."""

import io
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.plan import Plan
from stillroom.pipeline.quarantine import FAILED_MOST, Quarantine, left_out
from stillroom.storage.errors import TeacherError
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence, Unit
from tests.strategies import manifest_row, random_sequences, tiny_manifest, unit_of


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(2), 60)


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


def quarantine(
    path: Path, sequences: list[Sequence], told: io.StringIO, held: int = 0
) -> tuple[Quarantine, list[Unit]]:
    """Of units of two sequences each, every one a document of its own."""
    tiny_manifest(path / "corpus.parquet", [manifest_row(s, document=i) for i, s in enumerate(sequences)])
    units = [unit_of(sequences[at : at + 2]) for at in range(0, len(sequences), 2)]
    rows = {sequence.digest: number for number, sequence in enumerate(sequences)}
    plan = Plan(tuple(units), len(sequences) + held, held, rows)
    return Quarantine(plan, Manifest.open(path / "corpus.parquet"), Console(stream=told)), units


def documents(path: Path, *rows: int) -> tuple[str, ...]:
    found = Manifest.open(path / "corpus.parquet").rows(list(rows))
    return tuple(f"{row.source}:{row.line}" for row in found)


def test_documents_at_fault_are_named_else_all_of_the_unit(
    tmp_path: Path, sequences: list[Sequence], told: io.StringIO
) -> None:
    made, units = quarantine(tmp_path, sequences, told)
    one = made.add(units[0], f"NaN at position 3 of sequence {sequences[1].digest}", scored=5)
    assert one.documents == documents(tmp_path, 1)
    other = made.add(units[2], "it lost its actor 4 times", scored=5)
    assert other.documents == documents(tmp_path, 4, 5)
    lines = told.getvalue().splitlines()
    assert lines[0].startswith(f"notice: unit {units[0].id} is left out (")
    assert lines[0].endswith(f"of {one.documents[0]}): {one.cause}")
    line = left_out([one.as_dict(), other.as_dict()], "here")
    assert line.startswith("2 units could not be scored and left out of store here; all others are committed.")
    assert f"The first is {one.unit}: {one.cause}. " in line


def test_three_at_once_and_nothing_scored_is_the_teacher(
    tmp_path: Path, sequences: list[Sequence], told: io.StringIO
) -> None:
    made, units = quarantine(tmp_path, sequences, told)
    made.add(units[0], "no", scored=0)
    made.add(units[1], "no", scored=0)
    with pytest.raises(TeacherError, match=r"^3 units failed and 0 were scored: it is the teacher .* Last: no$"):
        made.add(units[2], "no", scored=0)


@pytest.mark.parametrize(("held", "scored"), [(10, 0), (0, 1)])
def test_where_it_has_scored_before_more_are_borne(
    tmp_path: Path, sequences: list[Sequence], told: io.StringIO, held: int, scored: int
) -> None:
    made, units = quarantine(tmp_path, sequences, told, held)
    for unit in units[: FAILED_MOST - 1]:
        made.add(unit, "no", scored=scored)
    with pytest.raises(TeacherError, match=r"^20 units failed"):
        made.add(units[FAILED_MOST], "no", scored=scored)


def test_many_among_more_that_are_scored_are_borne(
    tmp_path: Path, sequences: list[Sequence], told: io.StringIO
) -> None:
    made, units = quarantine(tmp_path, sequences, told)
    for unit in units:
        made.add(unit, "no", scored=len(units))
    assert len(made.units) == 30
