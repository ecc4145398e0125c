"""Founding a store: what must be there before its first unit is scored.

Enters: a recipe and its corpus. Leaves: the store. Costs: nothing where it is founded already or keeps no hidden
states; else one teacher is loaded, and for int8 scores `CALIBRATION_TOKENS` tokens of the corpus.

A hidden part needs the teacher's output head beside the shards and, for int16 and int8, the steps of its channels. They
are part of the identity from then on: a store that grows, by whatever corpus, keeps them. Those of int16 follow from
the head alone, those of int8 are measured on the corpus.
"""

from typing import Any

from stillroom.pipeline.console import Console, format_bytes
from stillroom.pipeline.plan import make_plan
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.storage.errors import StoreFull
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence
from stillroom.storage.store import Store

#: Of different documents. Twice as many move the gradient's angle by 0.01° (workers/head.py).
CALIBRATION_TOKENS = 4096


def found_store(recipe: Recipe, sources: Sources, manifest: Manifest, console: Console) -> Store:
    """The recipe's store, founded if it is not there. Raises IdentityMismatch if another lives there, TeacherError if
    the teacher's output head cannot be stored; where a teacher is needed for it, also RecipeError for sequences
    that it cannot read, and StoreFull."""
    if recipe.signal.hidden is None or sources.store_if_founded() is not None:
        return sources.store()
    from stillroom.pipeline.cluster import Actors, ask, session
    from stillroom.workers.actor import remote_actor

    sources.require_length(int(manifest.index().tokens.max()))
    require_room(recipe.store.path, 0, open_files(recipe.store.path).free_bytes(), recipe=recipe)
    sample = calibration_sample(recipe, manifest)
    console.info(
        f"teach: founding the store: the output head, and the steps of its {recipe.signal.hidden.dtype} channels"
    )
    spec, identity = sources.teacher_spec(), sources.identity()

    def create(**options: Any) -> Any:
        return remote_actor(**options).remote(spec, identity, recipe.store.path)

    # One actor is enough, and must not wait for the room that all of them want.
    alone = recipe.ray.model_copy(update={"actors": 1})
    with session(recipe.ray, ranks=spec.ranks):
        calibration = ask(Actors(create, alone, ranks=spec.ranks), "found", sample)
    return sources.store(calibration=calibration or None)


def calibration_sample(recipe: Recipe, manifest: Manifest) -> list[Sequence]:
    """The first sequences by digest, which is a shuffle: of as many documents as there are sequences."""
    plan = make_plan(manifest, None, unit_tokens=CALIBRATION_TOKENS, seed=0, save=False)
    first = min(plan.pending, key=lambda unit: unit.sequences[0])
    return [row.sequence for row in manifest.rows([plan.rows[s] for s in first.sequences])]


def require_room(uri: str, need_bytes: int, free_bytes: int | None, *, recipe: Recipe) -> None:
    """Raises StoreFull if the estimate with its safety margin does not fit, or would leave too little."""
    wanted = need_bytes * recipe.store.safety + recipe.store.min_free_bytes
    if free_bytes is not None and wanted > free_bytes:
        most = f"about {format_bytes(need_bytes)} more, times store.safety {recipe.store.safety:g} plus "
        raise StoreFull(
            f"store {uri} needs {most if need_bytes else ''}store.min_free_bytes "
            f"{format_bytes(recipe.store.min_free_bytes)}, but {format_bytes(free_bytes)} are free: free some space, "
            "lower signal.topk.k, or choose another store.path"
        )
