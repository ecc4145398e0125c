"""The preset `deepseek` on a tiny teacher: three stages by one command, and the plan that says why it keeps what it
keeps."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.pipeline.cli import main
from stillroom.pipeline.recipe import load_chain
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, kill_group, sentences, write_corpus

pytestmark = [pytest.mark.real, pytest.mark.slow]

#: Three runs, one after the other.
PATIENCE_S = 900.0
STAGES, STEPS = {"to-8": 8, "to-4": 4, "to-2": 2}, 5


@pytest.fixture(scope="module", name="ran")
def _ran(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """12 layers teach 8, these 4, and these 2; the widths stay, as in deploy/recipes/deepseek.yaml."""
    folder = tmp_path_factory.mktemp("deepseek")
    setup = Setup.make(folder, [], teacher={"layers": 12}, ray__actors=1)
    write_corpus(folder / "pretraining.jsonl", sentences(5, 40))
    pairs = zip(sentences(6, 40, words=8), sentences(7, 40, words=12), strict=True)
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    (folder / "instruction.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["students"], recipe["store"]["path"], recipe["signal"]
    recipe["fidelity"] = {"positions": 16}
    recipe["corpus"]["sources"] = [
        {"name": "pretraining", "path": str(folder / "pretraining.jsonl")},
        {"name": "instruction", "path": str(folder / "instruction.jsonl"), "form": "chat"},
    ]
    recipe["preset"] = "deepseek"
    recipe["student_defaults"] = {"batch_packs": 2, "device": "cpu"}
    before: dict[str, Any] = {}
    recipe["stages"] = []
    for name, layers in STAGES.items():
        student = {"name": f"{layers}l", "model": {"cut": {"layers": layers}}, "steps": STEPS}
        recipe["stages"].append({"name": name, **before, "students": [student]})
        before = {"teacher": {"stage": name}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    process = setup.start()
    try:
        printed, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    assert process.returncode == 0, printed
    return setup


@pytest.mark.timeout(PATIENCE_S + 60)
def test_a_chain_by_the_preset_runs(ran: Setup) -> None:
    """Hidden states and every fourth layer are kept, and learned from, at every stage, with half of each source."""
    layers_of_teacher = 12
    for stage in load_chain(ran.folder / "recipe.yaml").stages:
        spec = open_store(stage.recipe.store.path).identity.signal
        assert spec.topk is None
        assert spec.hidden is not None
        assert spec.layers is not None
        assert list(spec.layers.layers) == list(range(4, layers_of_teacher + 1, 4))
        layers_of_teacher = STAGES[stage.name]
        (student,) = stage.recipe.students
        folder = Path(stage.recipe.run_dir) / "students" / student.name
        result = json.loads((folder / "result.json").read_text())
        assert result["steps"] == STEPS
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps = [record for record in records if record["kind"] == "step"]
        assert (steps[0]["temperature"], steps[-1]["temperature"]) == (6.0, 2.0)
        assert all(one["temperature"] > other["temperature"] for one, other in pairwise(steps))
        for step in steps:
            assert step["alpha"] == 0.7
            assert step["mix"]["shares"] == {"pretraining": 0.5, "instruction": 0.5}
            assert step["features"]["hidden"] > 0
            whole = 0.7 * step["kd"] + 0.3 * step["ce"] + 0.3 * step["features"]["hidden"]
            assert step["loss"] == pytest.approx(whole, rel=1e-5)
        assert result["mix"]["trained"]["pretraining"] > 0
        assert result["mix"]["trained"]["instruction"] > 0
        config = json.loads((folder / "export" / "config.json").read_text())
        assert config["num_hidden_layers"] == STAGES[stage.name]


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
