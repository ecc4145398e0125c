"""A recipe with its stages, each a plain `Recipe`.

Enters: a path and `key=value` words. Leaves: a `Chain`, of one stage without a name where the recipe has none. Costs:
milliseconds; no model, no corpus and no network is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.pipeline.recipe.document import read_document
from stillroom.pipeline.recipe.files import check_files
from stillroom.pipeline.recipe.load import validate
from stillroom.pipeline.recipe.overrides import apply_overrides
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.recipe.stages import StageDocument, stage_documents
from stillroom.storage.errors import RecipeError


@dataclass(frozen=True)
class Stage:
    """name: empty for a recipe without stages. taught_by: (stage, student) of its teacher, where that is a student of
    this recipe."""

    name: str
    recipe: Recipe
    taught_by: tuple[str, str] | None = None


@dataclass(frozen=True)
class Chain:
    """name, run_dir: of the whole recipe. stages: in the order in which they run."""

    name: str
    run_dir: Path
    stages: tuple[Stage, ...]

    @property
    def plain(self) -> Recipe | None:
        """The recipe, where it has no stages."""
        return self.stages[0].recipe if not self.stages[0].name else None

    def only(self, name: str | None) -> "Chain":
        """One stage as a recipe without stages: the one that is named, or the only one there is. Raises RecipeError
        naming those that there are."""
        if self.plain:
            if name is not None:
                raise RecipeError(f"recipe {self.name} has no stages: leave out --stage {name}")
            return self
        found = [stage for stage in self.stages if stage.name == name]
        if not found:
            asked = "name one with --stage" if name is None else f"it has no stage {name}"
            names = ", ".join(stage.name for stage in self.stages)
            raise RecipeError(f"recipe {self.name} has stages, {asked}: {names}")
        recipe = found[0].recipe
        return Chain(recipe.name, recipe.run_dir, (Stage("", recipe),))

    def root(self, stage: Stage) -> Stage:
        """The stage whose teacher is where this one's teachers come from."""
        while stage.taught_by:
            above = stage.taught_by[0]
            stage = next(s for s in self.stages if s.name == above)
        return stage

    def steps(self, stage: Stage) -> int | None:
        """Optimizer steps of the students that led to this stage's teacher; None where one of them counts epochs."""
        steps = 0
        while stage.taught_by:
            name, student = stage.taught_by
            stage = next(s for s in self.stages if s.name == name)
            config = next(s for s in stage.recipe.students if s.name == student)
            if config.steps is None and not config.phases:
                return None
            steps += config.steps or sum(phase.steps for phase in config.phases or [])
        return steps


def load_chain(path: Path | str, overrides: Sequence[str] = (), *, files: bool = True) -> Chain:
    """Read, override, lay out and validate. The arguments are `load_recipe`'s; a teacher that an earlier stage trains
    need not be there yet. Raises RecipeError."""
    document = apply_overrides(read_document(Path(path)), overrides)
    found = [_stage(stage, files=files) for stage in stage_documents(document)]
    first = found[0].recipe
    if not found[0].name:
        return Chain(first.name, first.run_dir, tuple(found))
    name = str(document.data.get("name", ""))
    run_dir = Path(str(document.data.get("run_dir") or Path("runs") / name))
    return Chain(name, run_dir, tuple(found))


def _stage(stage: StageDocument, *, files: bool) -> Stage:
    try:
        recipe = validate(stage.document)
        if files:
            check_files(recipe, stage.document.where, teacher=stage.taught_by is None)
    except RecipeError as error:
        if not stage.name:
            raise
        raise RecipeError(f"stage {stage.name}: {error}") from None
    return Stage(stage.name, recipe, stage.taught_by)
