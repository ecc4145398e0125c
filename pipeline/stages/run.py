"""A recipe with stages, run from its first to its last.

Enters: a chain. Leaves: each stage's folder as `stillroom run` leaves one, and `summary.json` above them. Costs: what
its stages cost; one that is done costs a look at its files.
"""

import json
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.process import locks_of, only_one
from stillroom.pipeline.recipe.chain import Chain
from stillroom.pipeline.run import run_recipe
from stillroom.pipeline.run_status import STAGES
from stillroom.pipeline.stages.compare import compare
from stillroom.pipeline.stages.dry_run import parts_of
from stillroom.pipeline.stages.redo import put_aside, refuse
from stillroom.storage.files import LocalFiles


def run_whole(chain: Chain, *, console: Console, redo: bool = False) -> dict[str, Any]:
    """`stillroom run`: a recipe with stages or without.

    redo: what other settings have made is put aside first. Raises RecipeError for it otherwise, if the recipe has
    stages; a plain recipe's own parts refuse what is not theirs.
    """
    aside: list[dict[str, str]] = []
    if redo or chain.plain is None:
        parts = parts_of(chain)
        if redo:
            aside = put_aside(parts, console)
        else:
            refuse(parts, f"recipe {chain.name}")
    result = run_recipe(chain.plain, console=console) if chain.plain else _run_stages(chain, console, aside, redo=redo)
    return result | ({"put_aside": aside} if redo else {})


def _run_stages(chain: Chain, console: Console, aside: list[dict[str, str]], *, redo: bool) -> dict[str, Any]:
    """Run what is not done yet; returns the summary that it writes.

    What a stage raises ends the run; the same call goes on from there. Whether a stage's store is of the student that
    teaches it is known when that one is trained, and looked at then.
    """
    listed = [{"name": stage.name, "run_dir": str(stage.recipe.run_dir)} for stage in chain.stages]
    told = json.dumps({"recipe": chain.name, "stages": listed}, indent=2) + "\n"
    LocalFiles(chain.run_dir).write(STAGES, told.encode())
    stages = []
    for number, stage in enumerate(chain.stages, 1):
        recipe = stage.recipe
        whose = f", taught by {'/'.join(stage.taught_by)}" if stage.taught_by else ""
        console.info(f"stage {number} of {len(chain.stages)}: {stage.name}{whose}")
        if stage.taught_by:
            parts = parts_of(chain, only=stage.name)
            if redo:
                aside += put_aside(parts, console)
            else:
                refuse(parts, f"recipe {chain.name}")
        with only_one(recipe.run_dir, locks_of("run", read_through=recipe.train.read_through)):
            stages.append({"stage": stage.name, **run_recipe(recipe, console=console)})
    summary = {"recipe": chain.name, "run_dir": str(chain.run_dir), "stages": stages}
    summary["students"] = compare(chain, console)
    LocalFiles(chain.run_dir).write("summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    console.info(f"run: {chain.run_dir} (summary.json, stages/*/students/*/export)")
    return summary
