"""Phases: which values hold at which step, what a recipe may say, and what it costs the digest."""

from typing import Any

import pytest
from pydantic import ValidationError

from stillroom.pipeline.student.config import StudentConfig, advice
from stillroom.pipeline.student.curriculum import Values, cut_short, phase_steps, stage_of, stages
from stillroom.pipeline.student.losses import Objective
from stillroom.pipeline.student.schedules import learning_rate

HIDDEN = {"hidden": {"weight": {"from": 0.0, "to": 0.4}}}


def config(**fields: Any) -> StudentConfig:
    return StudentConfig.model_validate(
        {"name": "s", "model": {"cut": {"layers": 2}}, "warmup_steps": 2, "lr": 4e-5} | fields
    )


def values_of(student: StudentConfig, total: int) -> list[Values]:
    found = stages(student, total)
    return [stage_of(found, step).values(step, student) for step in range(total)]


def test_the_chapters_curriculum_step_by_step() -> None:
    """§7.2: output only, add hidden states, lower temperature, hard labels."""
    student = config(
        losses={"temperature": 4},
        phases=[
            {"steps": 3},
            {"steps": 5, "features": HIDDEN},
            {"steps": 3, "temperature": {"from": 4, "to": 2}, "features": HIDDEN},
            {"steps": 2, "losses": {"alpha": 0}, "lr": 1e-5},
        ],
    )
    assert phase_steps(student) == 13
    found = values_of(student, 13)
    assert "hidden" not in found[3].weights, "what has no weight is not computed"
    assert [v.alpha for v in found] == [0.7] * 11 + [0.0] * 2
    assert [v.temperature for v in found] == [4] * 8 + [4, 3, 2] + [2, 2]
    hidden = [round(v.weights.get("hidden", 0), 9) for v in found]
    assert hidden == [0] * 3 + [0, 0.1, 0.2, 0.3, 0.4] + [0, 0.2, 0.4] + [0] * 2


def test_weights_of_the_output_losses_are_schedules_too() -> None:
    output = {"forward_kl": {"from": 1, "to": 0}, "reverse_kl": {"from": 0, "to": 1}, "js": {"from": 0.5, "to": 0.1}}
    losses = config(losses={"output": output}).losses
    assert sorted(losses.output.names()) == ["forward_kl", "js", "reverse_kl"]
    assert Objective.of(losses, 0, 5).weights == {"forward_kl": 1, "js": 0.5}
    assert Objective.of(losses, 1, 5).weights == pytest.approx({"forward_kl": 0.75, "reverse_kl": 0.25, "js": 0.4})
    assert Objective.of(losses, 4, 5).weights == {"reverse_kl": 1, "js": 0.1}


def test_the_learning_rate_begins_anew_where_a_phase_states_one() -> None:
    phases = [{"steps": 4}, {"steps": 6}, {"steps": 5, "lr": 1e-5}, {"steps": 3}]
    student = config(phases=phases)

    def rate(step: int, total: int, peak: float) -> float:
        return learning_rate(step, total_steps=total, peak=peak, warmup_steps=2, schedule="cosine", min_ratio=0.1)

    expected = [rate(step, 10, 4e-5) for step in range(10)] + [rate(step, 8, 1e-5) for step in range(8)]
    assert [v.lr for v in values_of(student, 18)] == expected
    assert values_of(config(phases=[{"steps": 4, "lr": 2e-5}]), 4)[1].lr == 2e-5


def test_a_run_without_phases_is_one() -> None:
    found = values_of(config(losses={"temperature": {"from": 6, "to": 2}, "alpha": {"from": 1, "to": 0.5}}), 5)
    assert [v.temperature for v in found] == [6, 5, 4, 3, 2]
    assert [v.alpha for v in found] == [1, 0.875, 0.75, 0.625, 0.5]


def test_what_is_left_out_is_the_students() -> None:
    student = config(
        losses={"temperature": 4, "signal": "topk"},
        features=HIDDEN,
        phases=[{"steps": 1}, {"steps": 1, "features": "none"}, {"steps": 1, "losses": {"alpha": 0.9}}],
    )
    assert [stage.features is None for stage in stages(student, 3)] == [False, True, False]
    assert [losses.temperature for losses in student.all_losses()] == [4, 4, 2], "a section comes as a whole"
    assert {losses.signal for losses in student.all_losses()} == {"topk"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"phases": []}, "at least 1"),
        ({"phases": [{"steps": 1}], "steps": 5}, "phases. have steps of their own"),
        ({"phases": [{"steps": 1}], "epochs": 1}, "phases. have steps of their own"),
        ({"phases": [{"steps": 0}]}, "greater than or equal to 1"),
        ({"phases": [{"steps": 1, "temperature": {"from": 6, "to": 0.5}}]}, r"1 … 10, got .*: the store keeps"),
        ({"losses": {"temperature": {"from": 12, "to": 2}}}, r"1 … 10, got .*: the store keeps"),
        ({"losses": {"alpha": {"from": 1.5, "to": 0}}}, "must lie in 0 … 1"),
        ({"phases": [{"steps": 1, "losses": {"signal": "hidden"}}]}, "one part of the store teaches all phases"),
        ({"phases": [{"steps": 1, "features": "off"}]}, "none"),
        ({"losses": {"output": {"forward_kl": {"from": 1, "to": 0}}}}, "every output loss has weight 0"),
        ({"losses": {"output": {"forward_kl": 1, "tv": {"from": 1, "to": -1}}}}, "tv: expected at least 0, got 1 → -1"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**fields)


def test_a_schedule_is_checked_over_all_of_its_range() -> None:
    student = config(losses={"temperature": {"from": 6, "to": 2}})
    assert student.temperatures() == [2, 6]
    assert student.temperatures((1.0, 2.0, 4.0, 8.0)) == [2, 4, 6]
    phases = [{"steps": 1}, {"steps": 1, "temperature": 3}, {"steps": 1, "losses": {"alpha": 0, "temperature": 9}}]
    assert config(phases=phases).temperatures() == [2, 3]
    assert config(losses={"alpha": 0}).temperatures() == []
    assert not config(losses={"alpha": 0}).taught
    assert config(losses={"alpha": 0}, features=HIDDEN).taught
    assert "6 → 2" in " ".join(advice(student))


def test_a_schedule_that_the_steps_cut_short_is_told() -> None:
    ramp = {"from": 6, "to": 2, "steps": 101}
    assert cut_short(config(losses={"temperature": ramp}), 101) == []
    (line,) = cut_short(config(losses={"temperature": ramp | {"steps": 198}}), 100)
    assert line.startswith("losses.temperature goes 6 → 2 in 198 steps, but this run has 100: it ends at 4 ")
    assert cut_short(config(losses={"temperature": ramp, "alpha": 0}), 50) == [], "nothing is distilled"
    still = {"from": 4, "to": 4, "steps": 101}
    assert cut_short(config(losses={"temperature": still}), 50) == [], "it goes nowhere"
    mix = {"by": "sampling", "shares": {"generations": {"from": 0.8, "to": 0.4, "steps": 101}}}
    (line,) = cut_short(config(mix=mix, steps=51), 51)
    assert line.startswith("mix.shares.generations goes 0.8 → 0.4 in 101 steps, but this run has 51: it ends at 0.602 ")
    phases = [{"steps": 200, "losses": {"alpha": {"from": 0.9, "to": 0.5, "steps": 150}}}, {"steps": 100}]
    features = {"hidden": {"weight": {"from": 0, "to": 1, "steps": 150}}}
    output = {"tv": {"from": 1, "to": 2, "steps": 201}}
    student = config(phases=phases, features=features, losses={"output": output})
    told = cut_short(student, 300)
    assert [line.partition(" goes")[0] for line in told] == ["features.hidden.weight", "losses.output.tv"]
    assert all("but phase 1 has 100" in line for line in told)


def test_recipes_of_before_keep_their_digests() -> None:
    """Made by the release before schedules, phases and features."""
    plain = StudentConfig.model_validate({"name": "s", "model": {"cut": {"layers": 2}}})
    tuned = StudentConfig.model_validate(
        {"name": "s", "model": {"from": "x"}, "losses": {"alpha": 0.5, "temperature": 4, "signal": "topk"}, "steps": 9}
    )
    assert (plain.digest, tuned.digest) == ("7cccf86689e7e9750ac6b56d4e704c1a", "ead7d898f4629f2ccb4e1300aa632687")
    with_features = config(features=HIDDEN)
    assert with_features.digest != config().digest
    assert config(phases=[{"steps": 9}]).digest != config(steps=9).digest
