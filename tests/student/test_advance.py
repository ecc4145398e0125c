"""When a stage is done: on curves that were recorded, and on made-up ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stillroom.pipeline.student import session
from stillroom.pipeline.student.advance import Evaluation, decide, evaluation
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.run_config import AdvanceConfig
from stillroom.pipeline.student.trainer import Trainer
from tests.student.test_session import go, log_of
from tests.student.world import World

#: Held-out KL to their teachers of two students of `deploy/recipes/progressive.yaml`, every 20 steps, as their logs had
#: it on 25 November 2026: ten layers of SmolLM2 taught by 30 for 120 steps, and 20 layers by 30 for 60.
TEN_OF_THIRTY = [3.5154, 2.8482, 2.5588, 2.2973, 2.1929, 2.1026]
TWENTY_OF_THIRTY = [1.7634, 1.2915, 1.1862]
#: Made up: one that goes on falling, one that rises again.
LEARNS = [3.41, 2.15, 1.62, 1.37, 1.21, 1.10, 1.02, 0.961, 0.918]
OVERFITS = [2.80, 1.90, 1.55, 1.41, 1.36, 1.35, 1.352, 1.361, 1.38, 1.42]


def curve(values: list[float], every: int = 5) -> list[Evaluation]:
    return [Evaluation(every * (i + 1), value, value) for i, value in enumerate(values)]


def steps_of(config: AdvanceConfig, values: list[float]) -> int | None:
    """After how many steps of the curve it is decided; None if it never is."""
    found = curve(values)
    for end in range(1, len(found) + 1):
        decision = decide(config, found[:end])
        if decision:
            assert decision.step == found[end - 1].step
            return decision.step
    return None


def advance(**fields: Any) -> AdvanceConfig:
    return AdvanceConfig.model_validate(fields)


def test_a_curve_that_falls_is_trained_on() -> None:
    assert steps_of(advance(plateau={"patience": 1, "min_improvement": 0.01}), LEARNS) is None


def test_recorded_curves_end_where_they_flatten() -> None:
    def after(config: AdvanceConfig, values: list[float]) -> int | None:
        return next((20 * n for n in range(1, len(values) + 1) if decide(config, curve(values[:n], 20))), None)

    # They improve by 19, 10, 10, 5 and 4 %; and by 27 and 8 %.
    assert after(advance(plateau={"patience": 1, "min_improvement": 0.03}), TEN_OF_THIRTY) is None
    assert after(advance(plateau={"patience": 1, "min_improvement": 0.05}), TEN_OF_THIRTY) == 100
    assert after(advance(plateau={"patience": 1, "min_improvement": 0.15}), TEN_OF_THIRTY) == 60
    # After 60 steps 10 % below the best at 40, after 80 19 %: patience lets a slow piece pass.
    assert after(advance(plateau={"patience": 2, "min_improvement": 0.15}), TEN_OF_THIRTY) == 120
    assert after(advance(plateau={"patience": 1, "min_improvement": 0.1}), TWENTY_OF_THIRTY) == 60
    assert after(advance(gap=2.25), TEN_OF_THIRTY) == 100
    assert after(advance(gap=1.25), TWENTY_OF_THIRTY) == 60
    assert after(advance(gap=1.0), TWENTY_OF_THIRTY) is None


def test_a_plateau_ends_it_after_its_patience() -> None:
    # 1.35 is the best, but is no hundredth below 1.36: that is the one that counts, at step 25.
    assert steps_of(advance(plateau={"patience": 2, "min_improvement": 0.01}), OVERFITS) == 35
    assert steps_of(advance(plateau={"patience": 4, "min_improvement": 0.01}), OVERFITS) == 45
    assert steps_of(advance(plateau={"patience": 2, "min_improvement": 0.0}), OVERFITS) == 40
    assert steps_of(advance(plateau={"patience": 9, "min_improvement": 0.01}), OVERFITS) is None


def test_the_decision_has_its_numbers() -> None:
    decision = decide(advance(plateau={"patience": 3, "min_improvement": 0.0}), curve(OVERFITS[:9]))
    assert decision is not None
    assert decision.as_dict() == {
        "step": 45, "reason": "plateau", "metric": "kl", "value": 1.38, "than": 1.35, "evaluations": 3,
    }  # fmt: skip
    assert "1.3800" in decision.line()
    assert "1.3500" in decision.line()


def test_a_gap_ends_it_at_once() -> None:
    assert steps_of(advance(gap=1.1), LEARNS) == 30
    assert steps_of(advance(gap=0.5), LEARNS) is None


def test_the_gap_comes_before_the_plateau() -> None:
    decision = decide(advance(gap=2.0, plateau={"patience": 1}), curve([1.5, 1.5]))
    assert decision is not None
    assert decision.reason == "gap"
    assert "at most advance.gap 2" in decision.line()


def test_what_was_not_measured_decides_nothing() -> None:
    unmeasured = [Evaluation(5, None, None)] * 4
    assert decide(advance(gap=2.0, plateau={"patience": 1}), unmeasured) is None
    assert decide(advance(plateau={"patience": 1}), []) is None
    nan = curve([2.0, math.nan, math.nan])
    decision = decide(advance(plateau={"patience": 2}), nan)
    assert decision is not None
    assert decision.than == 2.0


def test_a_plateau_of_another_metric() -> None:
    config = advance(plateau={"metric": "perplexity"}, gap=0.1)
    assert evaluation(config, 7, {"perplexity": 31.5, "kl": 0.4}) == Evaluation(7, 31.5, 0.4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "expected plateau, gap, or both"),
        ({"gap": 0}, "greater than 0"),
        ({"plateau": {"patience": 0}}, "greater than or equal to 1"),
        ({"plateau": {"min_improvement": 1}}, "less than 1"),
        ({"plateau": {"metric": "top1"}}, "perplexity"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        advance(**fields)


#: Of hard labels alone the KL to a random teacher falls for a step or two, then it rises.
RISES: dict[str, Any] = {
    "losses": {"alpha": 0}, "steps": 30, "eval_every": 2, "checkpoint_every": 3, "lr": 5e-3, "schedule": "constant",
    "advance": {"plateau": {"patience": 2, "min_improvement": 0.0}},
}  # fmt: skip


def test_a_run_ends_early_and_says_why(world: World, tmp_path: Path) -> None:
    result = go(world.job(tmp_path, **RISES))
    log = log_of(tmp_path)
    values = {r["step"]: r["kl"] for r in log if r["kind"] == "evaluation" and r["step"]}
    decision = result["advanced"]
    assert result["steps"] == decision["step"] == max(values) < 30
    assert decision["reason"] == "plateau"
    assert decision["value"] == values[decision["step"]]
    assert decision["than"] == min(values.values()) < decision["value"]
    assert [r for r in log if r["kind"] == "decision"] == [{"kind": "decision", **decision}]
    assert [r["step"] for r in log if r["kind"] == "step"] == list(range(1, decision["step"] + 1))
    assert result["after"]["kl"] == decision["value"]
    # As steps of their own would have trained it, at the rate that 30 steps have.
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_a_run_that_was_killed_decides_alike(world: World, tmp_path: Path) -> None:
    whole = go(world.job(tmp_path / "whole", **RISES))
    job = world.job(tmp_path / "killed", **RISES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", _until(whole["steps"] - 1))
        with pytest.raises(_Killed):
            go(job)
    again = go(job)
    assert again["advanced"] == whole["advanced"]
    weights = [load_file(tmp_path / run / "export" / "model.safetensors") for run in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_a_run_that_was_killed_after_its_decision_ends_there(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path, **RISES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "export_model", _killed)
        with pytest.raises(_Killed):
            go(job)
    before = log_of(tmp_path)
    result = go(job)
    assert result["steps"] == result["advanced"]["step"] < 30
    assert log_of(tmp_path) == before


def test_without_an_evaluation_there_is_nothing_to_look_at() -> None:
    student = {"name": "s", "model": {"cut": {"layers": 2}}, "advance": {"gap": 1}}
    with pytest.raises(ValidationError, match="set eval_every"):
        StudentConfig.model_validate(student)
    with pytest.raises(ValidationError, match="make stages of them"):
        StudentConfig.model_validate(student | {"eval_every": 1, "phases": [{"steps": 3}]})


class _Killed(Exception):
    pass


def _killed(*_: Any, **__: Any) -> None:
    raise _Killed


def _until(last: int) -> Any:
    step = Trainer.step

    def stepped(self: Trainer, packs: Any, number: int) -> Any:
        if number == last:
            raise _Killed
        return step(self, packs, number)

    return stepped
