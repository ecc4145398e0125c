"""What a run would do, and why; nothing is founded, taught or trained.

Enters: a chain. Leaves: one line for each part of each stage: generate, corpus, teach, train, evaluate. Costs: reading
the corpus into a temporary folder where it changed, as only its sequences tell what else they change; no teacher.

    done    it lies there, made as the recipe says
    runs    it is not there, or is made of something that is not there
    stale   it lies there, made by other settings: a run refuses it, `--redo` puts it aside and makes it anew
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stillroom.pipeline.console import Console
from stillroom.pipeline.corpus.ingest import held_manifest, ingest
from stillroom.pipeline.evaluate import stale_measures
from stillroom.pipeline.pinning import to_be_pinned
from stillroom.pipeline.plan import make_plan
from stillroom.pipeline.recipe.chain import Chain, Stage
from stillroom.pipeline.recipe.schema import VERDICTS, Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.bindings import (
    EXPORT,
    RESULT,
    asked_now,
    differences,
    exported_otherwise,
    held_in,
    read_result,
)
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.train import manifest_path, start_of, student_folder
from stillroom.storage.errors import IdentityMismatch
from stillroom.storage.files import GENERATIONS_MARK, open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import Store

State = Literal["done", "runs", "stale"]


@dataclass(frozen=True)
class Part:
    """Of a stage. student: of `train`. where: the folder of what is stale."""

    stage: str
    part: str
    state: State
    why: str
    student: str | None = None
    where: Path | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """stage: left out where the recipe has none."""
        stage = {"stage": self.stage} if self.stage else {}
        return {**stage, "part": self.part, "student": self.student, "state": self.state, "why": self.why}


def dry_run(chain: Chain) -> dict[str, Any]:
    """`stillroom run --dry-run`."""
    parts = parts_of(chain)
    stale = any(part.state == "stale" for part in parts)
    remedy = {"remedy": "a run refuses what is stale; `--redo` puts it aside and makes it anew"} if stale else {}
    return {"recipe": chain.name, "parts": [part.as_dict() for part in parts], **remedy}


def parts_of(chain: Chain, *, only: str | None = None) -> list[Part]:
    """All parts of all stages, in the order in which they run. only: of this stage, whose teacher is there."""
    found: list[Part] = []
    for stage in chain.stages:
        if only in (None, stage.name):
            root = Sources(chain.root(stage).recipe, Console(quiet=True))
            untrained = _untrained(stage, found) if only is None else None
            found += _Stage(stage, untrained, root).parts()
    return found


def _untrained(stage: Stage, before: list[Part]) -> str | None:
    """Why the stage's teacher is not what it will be; None where it is."""
    if stage.taught_by is None:
        return None
    name, student = stage.taught_by
    trained = next(p for p in before if p.stage == name and p.part == "train" and p.student == student)
    return None if trained.state == "done" else f"its teacher, {name}/{student}, is trained first"


class _Stage:
    """One stage on the way through its parts. untrained: see `_untrained`. root: of the stage with whose teacher the
    chain begins; its tokenizer is handed on from teacher to student."""

    def __init__(self, stage: Stage, untrained: str | None, root: Sources) -> None:
        self._stage, self._recipe, self._untrained = stage, stage.recipe, untrained
        self._sources, self._root = Sources(stage.recipe, Console(quiet=True)), root

    def parts(self) -> list[Part]:
        with tempfile.TemporaryDirectory(prefix="stillroom-dry-run-") as folder:
            return list(self._parts(Path(folder)))

    def _part(self, part: str, state: State, why: str, **more: Any) -> Part:
        return Part(self._stage.name, part, state, why, **more)

    def _parts(self, scratch: Path) -> Iterator[Part]:
        generated = self._generate(scratch)
        if generated:
            yield generated
        corpus, manifest = self._corpus(scratch, generated)
        yield corpus
        taught, store = self._teach(manifest, corpus)
        yield taught
        trained = [self._train(student, manifest, taught, store) for student in self._recipe.students]
        yield from trained
        yield self._evaluate(manifest, trained)

    def _generate(self, scratch: Path) -> Part | None:
        config = self._recipe.generate
        if config is None:
            return None
        if self._untrained:
            return self._part("generate", "runs", self._untrained)
        from stillroom.pipeline.generate import generation_identity, judge, pending, prompts_of
        from stillroom.pipeline.quality.own_function import load_function
        from stillroom.storage.generations.store import open_generations

        if not open_files(str(config.path)).exists(GENERATIONS_MARK):
            return self._part("generate", "runs", "nothing is generated yet")
        store = open_generations(str(config.path))
        try:
            store.identity.require_equal(generation_identity(self._recipe, config, self._sources), store.uri)
        except IdentityMismatch as error:
            return self._part("generate", "stale", str(error), where=Path(str(config.path)))
        manifest = prompts_of(self._recipe, config, self._sources, scratch / "prompts.parquet")
        lacking = pending(config, manifest, store)
        if lacking:
            return self._part("generate", "runs", f"{lacking:,} prompts are not answered yet")
        table = self._recipe.run_dir / VERDICTS
        if not table.exists():
            return self._part("generate", "runs", "the responses are not judged yet")
        function = None if config.quality.function is None else load_function(config.quality.function)
        judge(self._recipe, config, manifest, store, function, out=scratch / VERDICTS)
        if (scratch / VERDICTS).read_bytes() != table.read_bytes():
            return self._part("generate", "runs", "nothing is generated; the responses are judged anew")
        return self._part("generate", "done", "")

    def _corpus(self, scratch: Path, generated: Part | None) -> tuple[Part, Manifest | None]:
        """The corpus as it will be; None where that is not known yet."""
        judged = scratch / VERDICTS
        if generated and generated.state != "done" and not judged.exists():
            return self._part("corpus", "runs", "it is made of the responses"), None
        tokenizer = self._root.tokenizer
        config, path = self._recipe.corpus, manifest_path(self._recipe)
        held = Manifest.open(path) if path.exists() else None
        if generated and judged.exists() and generated.state != "done":
            sources = tuple(
                source.model_copy(update={"path": f"generations:{judged}"})
                if source.path.startswith("generations:")
                else source
                for source in config.sources
            )
            config = config.model_copy(update={"sources": sources})
        elif held and held_manifest(config, tokenizer, out=path):
            return self._part("corpus", "done", ""), held
        manifest = ingest(config, tokenizer, out=scratch / "corpus.parquet")
        if held is None:
            return self._part("corpus", "runs", "it is not read yet"), manifest
        same = "the same sequences come of it" if manifest.digest == held.digest else "other sequences come of it"
        return self._part("corpus", "runs", f"{_changed(held, self._recipe)}; {same}"), manifest

    def _teach(self, manifest: Manifest | None, corpus: Part) -> tuple[Part, Store | None]:
        if self._untrained or manifest is None:
            return self._part("teach", "runs", self._untrained or f"the corpus is not there: {corpus.why}"), None
        path = self._recipe.store.path
        try:
            store = self._sources.store_if_founded()
        except IdentityMismatch as error:
            return self._part("teach", "stale", str(error), where=Path(path)), None
        if store is None:
            return self._part("teach", "runs", f"there is no store in {path} yet"), None
        plan = make_plan(manifest, store, unit_tokens=self._recipe.store.unit_tokens, seed=0, save=False)
        if plan.pending:
            return self._part(
                "teach", "runs", f"{plan.pending_sequences:,} of {plan.sequences:,} sequences are not in the store"
            ), store
        return self._part("teach", "done", ""), store

    def _train(self, student: StudentConfig, manifest: Manifest | None, taught: Part, store: Store | None) -> Part:
        folder = student_folder(self._recipe, student)
        why = self._stale(folder, student, manifest, taught, store)
        if why:
            return self._part("train", "stale", why, student=student.name, where=folder)
        if not (folder / RESULT).exists() or not (folder / EXPORT).is_dir():
            steps = sorted(entry.name for entry in (folder / "checkpoints").glob("step-" + 8 * "[0-9]"))
            begun = f"begun, it goes on after step {int(steps[-1].removeprefix('step-'))}" if steps else ""
            return self._part("train", "runs", begun or "not trained yet", student=student.name)
        otherwise = exported_otherwise(folder, read_result(folder / RESULT), student)
        if otherwise:
            state: State = "runs" if otherwise.possible else "stale"
            return self._part("train", state, otherwise.why, student=student.name, where=folder)
        return self._part("train", "done", "", student=student.name)

    def _stale(
        self, folder: Path, student: StudentConfig, manifest: Manifest | None, taught: Part, store: Store | None
    ) -> str | None:
        """Why a student that is trained or begun is not the one that the recipe describes: where a run refuses it, and
        where it learned from what is made anew first."""
        found = held_in(folder)
        if not found:
            return None
        held, trained = found[1], (folder / RESULT).exists()
        known = held | {"config": student.numbers()}
        text = known if manifest is None else asked_now(held, student, manifest, start_of(student))
        if differing := differences(held, text):
            return "; ".join(differing)
        if self._untrained or manifest is None:
            return (self._untrained or "the corpus is made anew first") if trained else None
        if held["snapshot"] is None:
            return None
        if taught.state != "done" or store is None:
            # Begun while its teachers still wrote, it goes on from there.
            unsettled = trained or taught.state == "stale"
            return f"what it learns from is taught first: {taught.why}" if unsettled else None
        snapshot = to_be_pinned(student, manifest, folder, store)
        asked = {"snapshot": snapshot and snapshot.digest, "planned": snapshot and snapshot.planned_digest}
        return "; ".join(differences(held, text | asked)) or None

    def _evaluate(self, manifest: Manifest | None, trained: list[Part]) -> Part:
        waits = [part.student for part in trained if part.state != "done"]
        if waits:
            return self._part("evaluate", "runs", f"students are trained first: {', '.join(map(str, waits))}")
        if manifest is None or self._untrained:
            return self._part("evaluate", "runs", self._untrained or "the corpus is made anew first")
        lacking = stale_measures(self._recipe, manifest)
        if lacking:
            return self._part("evaluate", "runs", f"not measured as asked: {', '.join(lacking)}")
        return self._part("evaluate", "done", "")


def _changed(held: Manifest, recipe: Recipe) -> str:
    """What of a corpus is not as when it was read."""
    then, now = held.meta.config, recipe.corpus.settings()
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if keys:
        return f"corpus.{', corpus.'.join(keys)} changed"
    return "its files, or the tokenizer, changed"
