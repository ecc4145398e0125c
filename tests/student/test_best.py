"""keep_best: the best evaluation's checkpoint stays and is exported, through interruptions too."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stillroom.pipeline.student import evaluate as evaluating
from stillroom.pipeline.student.best import better, require_measured
from stillroom.pipeline.student.config import KeepBest, StudentConfig
from stillroom.pipeline.student.progress import Best
from stillroom.storage.errors import StudentError
from tests.student.test_session import go, log_of
from tests.student.world import World, cut_after

#: Of hard labels alone the KL to a random teacher falls for a step or two, then it rises.
RISING_KL: dict[str, Any] = {
    "losses": {"alpha": 0}, "steps": 9, "eval_every": 2, "checkpoint_every": 3, "keep_last": 1, "keep_best": "kl",
    "lr": 5e-3, "schedule": "constant",
}  # fmt: skip


def evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {r["step"]: r for r in log_of(run_dir) if r["kind"] == "evaluation" and r["step"]}


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


def test_the_best_is_the_lowest_or_the_highest_and_of_equal_ones_the_earlier() -> None:
    for metric, values, expected in (
        ("kl", [2.0, 1.0, 1.0, 3.0, math.nan], 2),
        ("top1", [0.1, 0.3, 0.3, 0.2, math.nan], 2),
        ("ece", [math.nan, 0.2, 0.1], 3),
    ):
        wanted, best = KeepBest.model_validate({"metric": metric}), None
        for step, value in enumerate(values, 1):
            best = better(wanted, step, {metric: value}, best) or best
        assert best is not None
        assert (best["step"], best["value"]) == (expected, values[expected - 1])
    assert better(KeepBest(metric="kl"), 0, {"kl": 0.1}, None) is None, "an untrained student has no checkpoint"
    assert better(KeepBest(metric="kl"), 5, {"kl": None}, Best(step=1, metric="kl", value=1, metrics={})) is None


def test_the_best_checkpoint_is_kept_and_exported(world: World, tmp_path: Path) -> None:
    result = go(world.job(tmp_path, **RISING_KL))
    found = evaluations(tmp_path)
    best = min(found, key=lambda step: found[step]["kl"])
    assert best < 9, "else this shows nothing"
    assert result["best"] == {"step": best, "metric": "kl", "value": found[best]["kl"]}
    assert steps_kept(tmp_path) == [best, 9]
    assert result["steps"] == 9
    assert result["after"] == {k: v for k, v in found[best].items() if k not in ("kind", "step")}
    exported = load_file(tmp_path / "export" / "model.safetensors")
    kept = load_file(tmp_path / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept.items())
    assert json.loads((tmp_path / "result.json").read_text())["best"]["step"] == best


@pytest.mark.slow
def test_a_run_cut_off_keeps_the_best_and_ends_the_same(world: World, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    settings = RISING_KL | {"checkpoint_every": 1, "keep_last": 20}
    expected = go(world.job(whole, **settings))
    for step in (1, 2, 3, 6, 9):
        cut = cut_after(whole, step)
        result = go(world.job(cut, **settings))
        assert log_of(cut) == log_of(whole)
        assert (result["best"], result["after"]) == (expected["best"], expected["after"])
        again, weights = (load_file(folder / "export" / "model.safetensors") for folder in (cut, whole))
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_run_stopped_before_a_due_evaluation_makes_up_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in an evaluation: without it the best would depend on when a run was stopped."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = go(world.job(whole, **RISING_KL))
    real = evaluating.evaluate
    calls = 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is that before training
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr("stillroom.pipeline.student.held_out.evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(world.job(stopped, **RISING_KL))
    result = go(world.job(stopped, **RISING_KL))
    assert log_of(stopped) == log_of(whole)
    assert result["best"] == expected["best"]


def test_a_damaged_best_is_said_and_the_last_is_exported(world: World, tmp_path: Path) -> None:
    best = go(world.job(tmp_path, **RISING_KL))["best"]["step"]
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / f"step-{best:08d}" / "model.safetensors").write_bytes(b"torn")
    result = go(world.job(tmp_path, **RISING_KL))
    assert result["best"] is None
    assert "the export holds the weights after the last step, 9" in result["notices"][-1]
    exported = load_file(tmp_path / "export" / "model.safetensors")
    last = load_file(tmp_path / "checkpoints" / "step-00000009" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in last.items())


def test_what_cannot_be_compared_is_refused(world: World, tmp_path: Path) -> None:
    base = {"name": "s", "model": {"cut": {"layers": 2}}}
    with pytest.raises(ValidationError, match="set eval_every to the steps between them"):
        StudentConfig.model_validate(base | {"keep_best": "kl"})
    with pytest.raises(ValidationError, match=r"keep_best\.metric"):
        StudentConfig.model_validate(base | {"keep_best": "loss", "eval_every": 5})
    with pytest.raises(StudentError, match="choose perplexity or ece"):
        go(world.job(tmp_path, signal=False, **RISING_KL))
    with pytest.raises(StudentError, match="no held-out positions"):
        require_measured(KeepBest(metric="ece"), None)


def test_the_numbers_of_a_student_without_it_stay_and_evaluations_count_with_it() -> None:
    base = {"name": "s", "model": {"cut": {"layers": 2}}}
    plain = StudentConfig.model_validate(base | {"eval_every": 5})
    assert plain.digest == StudentConfig.model_validate(base).digest
    kept = [StudentConfig.model_validate(base | {"eval_every": n, "keep_best": "kl"}).digest for n in (5, 6)]
    assert len({plain.digest, *kept}) == 3
