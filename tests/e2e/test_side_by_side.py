"""Students side by side: each is what it would be alone, and an error of one loses nothing of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.runs import Setup, distil, sentences

pytestmark = [pytest.mark.real, pytest.mark.slow]

STUDENT: dict[str, Any] = {
    "model": {"cut": {"layers": 1}}, "batch_packs": 2, "lr": 1e-3, "warmup_steps": 2, "checkpoint_every": 4,
    "device": "cpu",
}  # fmt: skip


def setup(folder: Path, *more: dict[str, Any]) -> Setup:
    students = [STUDENT | {"name": f"s{seed}", "seed": seed, "steps": 6} for seed in range(3)]
    made = Setup.make(folder, sentences(3, 30), students=[*students, *more])
    distil(made)
    return made


def weights(run: Setup, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "run" / "students" / name / "export" / "model.safetensors")


def test_each_is_what_it_would_be_alone(tmp_path: Path) -> None:
    alone, together = setup(tmp_path / "alone"), setup(tmp_path / "together")
    alone.run("train")
    said = together.run("train", "train.side_by_side=2", "--json")
    assert [s["name"] for s in json.loads(said.splitlines()[-1])["students"]] == ["s0", "s1", "s2"]
    for name in ("s0", "s1", "s2"):
        one, other = weights(alone, name), weights(together, name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    again = together.run("train", "train.side_by_side=3")
    assert again.count("is trained already") == 3


def test_an_error_of_one_stops_the_others_at_a_checkpoint(tmp_path: Path) -> None:
    long = STUDENT | {"name": "long", "steps": 100_000}
    run = setup(tmp_path, long)
    # It begins with the other, and ends by a loss that is not finite.
    said = run.run("train", "train.side_by_side=2", "students.1.lr=1e30", "students.1.steps=400",
                   "students.0.steps=100000", code=1)  # fmt: skip
    assert "stillroom: error: student s1: step" in said
    assert list((run.folder / "run" / "students" / "s0" / "checkpoints").glob("step-*"))
    assert not (run.folder / "run" / "students" / "long" / "log.jsonl").exists(), "it never began"
    assert "goes on from here" in said
