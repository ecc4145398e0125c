"""What is allowed and unusual in a recipe, as lines for a person. Nothing here stops a run.

Enters: a `Recipe`. Leaves: lines. Costs: nothing. The chapter's ranges (§7.1) and what was measured stand with the
student's own `advice`; here are the notices that need more than one student's section.
"""

from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.config import advice


def notices(recipe: Recipe) -> list[str]:
    held = [part for part in ("hidden", "topk", "sampled") if getattr(recipe.signal, part) is not None]
    lines = []
    for student in recipe.students:
        part = next(iter(held), "topk") if student.losses.signal == "auto" else student.losses.signal
        lines += [f"student {student.name}: {line}" for line in advice(student, part)]
    topk = recipe.signal.topk
    if topk is not None and topk.k < 32:
        lines.append(
            f"signal.topk.k is {topk.k}; the top 8 of a 49,152-word teacher hold 0.76 of its probability, the top "
            "32 0.87, the top 64 0.90 (temperature 1, measured)"
        )
    if topk is not None and topk.gap_step is not None and topk.gap_step > 1 / 4:
        lines.append(f"signal.topk.gap_step is {topk.gap_step:g}; a step of 1/4 already adds KL 1e-3 to the signal")
    attention = recipe.signal.attention
    if attention is not None:
        each = "layer and head" if attention.heads == "per_head" else "layer"
        size = (recipe.corpus.window + 1) / 2 * (1 if attention.dtype == "uint8" else 4)
        lines.append(
            f"signal.attention takes {size:,.0f} bytes a token for each {each} before compression, at a window of "
            f"{recipe.corpus.window:,}; half the window takes half of it"
        )
    if recipe.store.unit_tokens < recipe.teacher.batch_tokens:
        lines.append(
            f"store.unit_tokens ({recipe.store.unit_tokens}) is below teacher.batch_tokens "
            f"({recipe.teacher.batch_tokens}): a batch never crosses units, so none will be full"
        )
    if recipe.teacher.trust_remote_code:
        lines.append("teacher.trust_remote_code is on: Python code that comes with the model will run on this machine")
    if not recipe.students:
        lines.append("the recipe has no students: the signal is made and kept, nothing is trained")
    return lines
