"""The table of all stages' students: each row of the same held-out positions, whatever its run evaluated on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.pipeline.console import Console
from stillroom.pipeline.evaluate import evaluate
from stillroom.pipeline.recipe import Chain, load_chain
from stillroom.pipeline.stages.compare import compare
from tests.e2e.runs import Setup, sentences, trained

pytestmark = [pytest.mark.real, pytest.mark.slow]


def stage(name: str, layers: list[int], **more: Any) -> dict[str, Any]:
    return {"name": name, "students": [{"name": "cut", "model": {"cut": {"layers": layers}}}], **more}


@pytest.fixture(name="chain")
def _chain(tmp_path: Path) -> Chain:
    """A tree whose last two students have the same weights: the teacher's first layer, by way of two and at once; at
    this rate no weight moves."""
    setup = Setup.make(tmp_path, sentences(3, 40), teacher={"layers": 3}, corpus__heldout=0.3)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del recipe["students"], recipe["store"]["path"]
    recipe["student_defaults"] = {"steps": 1, "lr": 1e-30, "batch_packs": 1, "eval_packs": 1, "device": "cpu"}
    recipe["stages"] = [
        stage("two", [0, 2]),
        stage("one", [0], teacher={"stage": "two"}),
        stage("direct", [0]),
    ]
    (setup.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    chain = load_chain(setup.folder / "recipe.yaml", files=False)
    for found in chain.stages:
        trained(found.recipe)
    return chain


def test_equal_weights_give_equal_rows(chain: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    two, one, direct = compare(chain, Console(quiet=True))
    own = ("stage", "teacher", "steps_with_teachers", "kl_to_own_teacher")
    assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in direct.items() if k not in own}
    assert direct["kl_to_own_teacher"] == direct["kl_to_first_teacher"] != one["kl_to_own_teacher"]
    assert two["heldout_positions"] == one["heldout_positions"]
    result = json.loads((chain.stages[2].recipe.run_dir / "students" / "cut" / "result.json").read_text())
    assert result["after"]["tokens"] < direct["heldout_positions"], "the run itself evaluated on fewer"
    (row,) = evaluate(chain.stages[2].recipe, Console())["models"]
    assert row["kl_positions"] == result["after"]["tokens"]
    assert row["heldout_positions"] == direct["heldout_positions"]
    stated = f"are of {row['kl_positions']:,} positions (its eval_packs, 1), perplexity and ECE of all"
    assert stated in " ".join(capfd.readouterr().err.split())
