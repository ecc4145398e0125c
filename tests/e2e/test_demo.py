"""The demo as the README promises it, on the real teacher. Slow: about six minutes on two cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.storage.care.verify import verify_store

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "demo.yaml"


def run(folder: Path) -> str:
    words = [f"run_dir={folder}", f"store.path={folder / 'store'}"]
    done = subprocess.run(
        [sys.executable, "-m", "stillroom.pipeline", "run", str(RECIPE), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_demo_distils_two_students_from_one_store(tmp_path: Path) -> None:
    printed = run(tmp_path)
    assert "stillroom inspect" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tokens"] > 30_000
    assert summary["shards"] >= 2
    assert summary["bytes_per_token"] < 150
    assert summary["teacher_batches_first_run"] > 0
    assert summary["teacher_batches_second_run"] == 0
    assert len(summary["students"]) == 2
    for student in summary["students"]:
        assert student["kl_after"] < student["kl_before"] / 2
        assert student["top1_after"] > student["top1_before"]
        assert student["ppl_after"] < student["ppl_before"] / 2
    report = verify_store(str(tmp_path / "store"))
    assert report["problems"] == []
    assert max(report["alignment"], key=report["alignment"].__getitem__) == "+1"

    ledger = (tmp_path / "ledger.jsonl").read_text()
    again = run(tmp_path)
    assert "no teacher is needed" in again
    assert again.count("is trained already") == 2
    assert (tmp_path / "ledger.jsonl").read_text() == ledger
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
