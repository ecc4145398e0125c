"""Recipes: YAML in, one frozen `Recipe` out; every mistake is one line. In the order of the data:

document (YAML with line numbers) → overrides (`key=value`) → stages (presets, defaults; a plain recipe for each) →
schema (pydantic) → complaints (errors as one line), files (what a recipe names must exist) → chain (all stages); then
reference and starter (the schema as text for people).

Public: `Recipe`, `load_recipe`, `Chain`, `load_chain`, `save_resolved`, `check_files`, `notices`.
"""

from stillroom.pipeline.recipe.chain import Chain, load_chain
from stillroom.pipeline.recipe.files import check_files
from stillroom.pipeline.recipe.load import load_recipe, save_resolved
from stillroom.pipeline.recipe.notices import notices
from stillroom.pipeline.recipe.schema import Recipe

__all__ = ["Chain", "Recipe", "check_files", "load_chain", "load_recipe", "notices", "save_resolved"]
