"""What was made by other settings, put aside: renamed, never removed.

Enters: the parts of a dry run. Leaves: `NAME.replaced-N` beside where each stale folder was. Costs: a rename each.
"""

from pathlib import Path

from stillroom.pipeline.console import Console
from stillroom.pipeline.stages.dry_run import Part
from stillroom.storage.errors import RecipeError


def put_aside(parts: list[Part], console: Console) -> list[dict[str, str]]:
    """Rename the folder of each stale part; says what went where. Raises RecipeError for one that is not on this
    machine."""
    moved: dict[Path, Path] = {}
    for part in parts:
        if part.state != "stale" or part.where is None or part.where in moved:
            continue
        if not part.where.is_dir():
            raise RecipeError(
                f"stage {part.stage or 'of the recipe'}: {part.where} holds what other settings made ({part.why}) and "
                "is no folder here that can be put aside: give the recipe another path"
            )
        moved[part.where] = _free(part.where)
        part.where.rename(moved[part.where])
        console.info(f"put aside: {part.where} is now {moved[part.where]} ({part.why})")
    return [{"was": str(path), "is": str(target)} for path, target in moved.items()]


def refuse(parts: list[Part], overall: str) -> None:
    """Raises RecipeError where something is stale: before the first hour of work, not after it."""
    stale = [part for part in parts if part.state == "stale"]
    if stale:
        first = stale[0]
        what = f"{first.part} {first.student or ''}".strip()
        others = f" (and {len(stale) - 1} more)" if len(stale) > 1 else ""
        raise RecipeError(
            f"{overall}: {what + (f' of stage {first.stage}' if first.stage else '')} was made by other settings: "
            f"{first.why}{others}; `--redo` puts it aside and makes it anew, `--dry-run` lists all of it"
        )


def _free(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.replaced-{number}")).exists():
        number += 1
    return target
