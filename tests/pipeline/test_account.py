"""account.py: what teaching took and who learned from it, entered once, whatever happens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.account import TeachingAccount, enter_use
from stillroom.pipeline.console import Console
from stillroom.pipeline.student.bindings import RESULT
from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.storage.catalog.uses import USES, load_taught, load_uses
from stillroom.storage.store import Store
from tests.strategies import manifest_row, named_receipt, random_sequences, tiny_identity, tiny_manifest, tiny_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(1), 8))


@pytest.fixture
def job(tmp_path: Path, store: Store) -> StudentJob:
    """A student that has read each of six training sequences one and a half times."""
    sequences = [stored.sequence for stored in store.sequences()]
    rows = [manifest_row(s, document=i, heldout=i >= 6) for i, s in enumerate(sequences)]
    tiny_manifest(tmp_path / "corpus.parquet", rows)
    folder = tmp_path / "run" / "students" / "small"
    folder.mkdir(parents=True)
    store.snapshot().write(folder / "snapshot.parquet")
    tokens = sum(len(s.input_ids) for s in sequences[:6])
    result = {
        "bindings": {"config": {}},
        "tokens": tokens * 3 // 2,
        "trained_positions": 40,
        "steps": 7,
        "seconds": 1.5,
    }
    (folder / RESULT).write_text(json.dumps(result))
    return StudentJob(
        student=StudentConfig.model_validate({"name": "small", "model": {"from": "any"}, "losses": {"temperature": 4}}),
        manifest=tmp_path / "corpus.parquet", snapshot=folder / "snapshot.parquet", run_dir=folder,
        tokenizer=tmp_path, teacher=None,
    )  # fmt: skip


def test_a_teaching_run_is_accounted_for_at_each_commit(store: Store) -> None:
    times = iter([100.0, 110.0, 130.5])
    account = TeachingAccount(store.files, "demo", clock=lambda: next(times))
    account.start([{"device": "cpu"}, {"device": "H100"}, {"device": "cpu"}])
    account.add([named_receipt(1), named_receipt(2)])
    (first,) = load_taught(store.files)
    assert (first.units, first.sequences, first.tokens, first.wall_s) == (2, 4, 20, 10.0)
    account.add([named_receipt(3)])
    (held,) = load_taught(store.files)
    assert (held.units, held.tokens, held.wall_s) == (3, 30, 30.5)
    assert (held.run, held.actors, held.device) == ("demo", 3, "H100, cpu")
    TeachingAccount(store.files, "demo").add([named_receipt(4)])
    assert sorted(run.units for run in load_taught(store.files)) == [1, 3]


def test_a_student_is_entered_once(store: Store, job: StudentJob, tmp_path: Path) -> None:
    console = Console(quiet=True)
    assert enter_use(store.uri, "demo", job, console)
    assert not enter_use(store.uri, "demo", job, console)
    moved = tmp_path / "elsewhere"
    shutil.move(job.run_dir, moved)
    there = job.model_copy(update={"run_dir": moved, "snapshot": moved / "snapshot.parquet"})
    assert not enter_use(store.uri, "demo", there, console)
    (use,) = load_uses(store.files)
    assert (use.student, use.run, use.signal, use.temperature, use.steps) == ("small", "demo", "topk", 4.0, 7)
    assert (use.sequences, use.trained_positions) == (6, 40)
    assert use.epochs == pytest.approx(1.5, abs=0.02)
    result = json.loads((moved / RESULT).read_text())
    (moved / RESULT).write_text(json.dumps(result | {"export_dtype": "bfloat16"}, indent=2) + "\n")
    assert not enter_use(store.uri, "demo", there, console)  # exported again
    (moved / RESULT).write_text((moved / RESULT).read_text().replace("1.5", "1.6"))
    assert enter_use(store.uri, "demo", there, console)  # trained anew: another use
    assert len(load_uses(store.files)) == 2


def test_what_used_no_teacher_is_no_use(store: Store, job: StudentJob, tmp_path: Path) -> None:
    console = Console(quiet=True)
    assert not enter_use(store.uri, "demo", job.model_copy(update={"snapshot": None}), console)
    labels = job.student.model_copy(update={"losses": job.student.losses.model_copy(update={"alpha": 0.0})})
    assert not enter_use(store.uri, "demo", job.model_copy(update={"student": labels}), console)
    other = tiny_store(tmp_path / "other", random_sequences(np.random.default_rng(2), 3), identity=tiny_identity(k=5))
    assert not enter_use(other.uri, "demo", job, console)
    assert not enter_use(str(tmp_path / "gone"), "demo", job, console)
    assert load_uses(store.files) == load_uses(other.files) == []


def test_a_store_that_cannot_be_written_costs_a_notice(
    store: Store, job: StudentJob, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(store.uri, USES).write_text("a file where the folder belongs")
    assert not enter_use(store.uri, "demo", job, Console())
    line = capsys.readouterr().err
    assert line.startswith("notice: student small is trained, but the store's account does not have it: ")
    assert line.count("\n") == 1
    Path(store.uri, USES).unlink()
    assert enter_use(store.uri, "demo", job, Console())
