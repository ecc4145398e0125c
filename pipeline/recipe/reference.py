"""Every field of a recipe, with its type, its default and its meaning: what `stillroom init --reference` prints.

Enters: the schema. Leaves: text, or rows for a program. Costs: nothing. It is generated, so it is never out of date.
"""

import textwrap
from typing import Any

from pydantic_core import to_jsonable_python

from stillroom.pipeline.recipe.document import dotted, shown
from stillroom.pipeline.recipe.fields import fields_of, meaning, models_in, type_words
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.recipe.stages import LAYOUT, presets


def reference_rows() -> list[dict[str, Any]]:
    """One row per field: key, type, required, default, meaning; a section's own row has no default."""
    rows = []
    for path, info in fields_of(Recipe):
        row = {"key": dotted(path), "type": type_words(info), "required": info.is_required(), "meaning": meaning(info)}
        if not info.is_required() and info.default_factory is None and not any(models_in(info.annotation)):
            row["default"] = to_jsonable_python(info.default)
        rows.append(row)
    kinds = {"preset": " | ".join(presets()), "student_defaults": "section", "stages": "list of section"}
    rows += [
        {"key": key, "type": kinds[key], "required": False, "meaning": words.replace("{presets}", ", ".join(presets()))}
        for key, words in LAYOUT.items()
    ]
    return rows


def reference_text() -> str:
    blocks = []
    for row in reference_rows():
        facts = [row["type"]]
        facts += ["required"] if row["required"] else []
        facts += [f"default {shown(row['default'])}"] if "default" in row else []
        body = textwrap.fill(row["meaning"], width=110, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{row['key']}  ({'; '.join(facts)})\n{body}")
    return "\n".join(blocks)
