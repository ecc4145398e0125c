"""The plan of a recipe with the preset's temperature says which tier it needs."""

import json
from pathlib import Path

import pytest

from stillroom.pipeline.cli import main
from tests.e2e.runs import Setup, sentences

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_the_plan_of_a_high_temperature_names_the_tier(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """T = 6 from a top-k: over the bound, and the cheapest within it keeps hidden states."""
    setup = Setup.make(tmp_path, sentences(71, 40), fidelity={"positions": 16})
    words = ["plan", str(setup.folder / "recipe.yaml"), "--json", "students.0.losses.temperature=6"]
    assert main(words) == 0
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert found["student_temperatures"] == "6"
    assert found["recipe_keeps"] == "top-8 (1/8 nat)"
    assert "over fidelity.max_gradient_angle_deg = 30" in found["recipe_misses"]
    assert found["cheapest"].startswith("hidden ")
