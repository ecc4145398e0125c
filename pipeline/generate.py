"""The generating stage: have the teacher answer what the store of generations lacks, and judge all of it.

Enters: a recipe with a `generate` section. Leaves: a store in which every prompt has its n responses, but for units
that failed, which are named; and `verdicts.parquet` in the run's folder. Costs: the teacher's time; prompts travel to
actors, receipts back. Judging reads the responses once, without a teacher.

    prompts ─► manifest ─► plan ─► unit ─► actor: vLLM, write shard ─► receipt ─► commit in batches
                                                                └► all committed ─► verdicts ─► corpus source
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.console import Console, Progress
from stillroom.pipeline.corpus.prompt_counts import PromptCounts
from stillroom.pipeline.corpus.verdicts import KEPT, Verdict, write_verdicts
from stillroom.pipeline.founding import require_room
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.plan import Plan, make_plan
from stillroom.pipeline.process import uninterrupted
from stillroom.pipeline.progress_file import State
from stillroom.pipeline.prompts import ingest_prompts, read_texts
from stillroom.pipeline.quality.judge import REASONS, judge_prompt
from stillroom.pipeline.quality.own_function import Judge, load_function
from stillroom.pipeline.quarantine import left_out
from stillroom.pipeline.recipe.generate_schema import GenerateConfig
from stillroom.pipeline.recipe.schema import VERDICTS, Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.taught import Batch, Taught
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.errors import IdentityMismatch, RecipeError, TeacherError
from stillroom.storage.files import open_files
from stillroom.storage.generations.records import GenerationIdentity
from stillroom.storage.generations.store import GenerationStore, create_generations, holds_generations
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.storage.shard import FOLDER as SHARDS
from stillroom.workers.generator import GeneratorSpec, require_settings, require_vllm
from stillroom.workers.teacher import TruthRequest

if TYPE_CHECKING:  # ray takes a second
    from stillroom.pipeline.status import GeneratingStatus


@dataclass(frozen=True)
class Generated:
    """What the stage did. taught: in the words of a scorer: batches are responses, rows are generated tokens."""

    store: GenerationStore
    taught: Taught
    prompts: dict[str, Any]
    reasons: Counter[str]

    def as_dict(self) -> dict[str, Any]:
        taught, seconds, responses = self.taught, self.taught.wall_s, self.reasons.total()
        return {
            "store": self.store.uri,
            "identity": self.store.identity.id,
            "prompts": self.prompts,
            "prompts_held_before": taught.held,
            "units_generated": taught.units,
            "responses_generated": taught.batches,
            "tokens_generated": taught.rows,
            "bytes_written": taught.bytes,
            "wall_s": round(seconds, 2),
            "tokens_per_s": round(taught.rows / seconds, 1) if seconds else None,
            "responses": responses,
            "kept": self.reasons[KEPT],
            "dropped": [
                {"reason": reason, "responses": self.reasons[reason], "share": self.reasons[reason] / responses}
                for reason in REASONS if self.reasons[reason]
            ],
            "quarantined": taught.quarantined,
        }  # fmt: skip


def generate_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom generate`: prompts, responses, verdicts. The result names the units that failed."""
    return generate(recipe, Sources(recipe, console), console).as_dict()


def generate(recipe: Recipe, sources: Sources, console: Console) -> Generated:
    """Generate what is not there yet, and judge all that is. What is committed stays committed, whatever happens.

    Raises RecipeError for a recipe without the section, CorpusError without prompts, TeacherError, StoreError.
    """
    config = recipe.generate
    if config is None:
        raise RecipeError(
            f"recipe {recipe.name} has no generate section: `stillroom init --reference` shows its fields"
        )
    function = None if config.quality.function is None else load_function(config.quality.function)
    console.info(f"generate: loading the tokenizer of {recipe.teacher.model}, reading the prompts")
    manifest, prompts = _prompts(recipe, config, sources, console)
    if not holds_generations(open_files(config.path)):  # of settings that cannot be, it would only be in the way
        _require_settings(recipe, config, sources, console)
    store = _store(config, generation_identity(recipe, config, sources))
    keep_token_table(store.files, sources.tokenizer, store.identity.vocabulary)
    plan = _plan(config, manifest, store, save=True)
    taught = Taught(plan.sequences, plan.held)
    if plan.pending:
        console.info(
            f"generate: {plan.pending_sequences:,} of {plan.sequences:,} prompts to answer, {config.decoding.n} "
            f"response{'s' * (config.decoding.n > 1)} each, in {len(plan.pending):,} units"
        )
        require_room(store.uri, 0, store.files.free_bytes(), recipe=recipe)
        _run(recipe, config, plan, manifest, store, sources, taught, console)
    else:
        console.info(f"generate: all {plan.sequences:,} prompts are answered in {store.uri}; no teacher is needed")
    reasons = judge(recipe, config, manifest, store, function)
    _say(reasons, console)
    return Generated(store, taught, prompts, reasons)


def _require_settings(recipe: Recipe, config: GenerateConfig, sources: Sources, console: Console) -> None:
    """Raises RecipeError for a quantisation that vLLM does not know, or not for this teacher; without its weights. On a
    cluster the first engine says so: the driver need not have vLLM."""
    from stillroom.pipeline.cluster import address_of

    if config.engine.quantization is not None and address_of(recipe.ray) is None:
        console.info(f"generate: asking vLLM about quantization {config.engine.quantization} (some 10 s, to import it)")
        require_settings(generator_spec(recipe, config, sources))


def _store(config: GenerateConfig, identity: GenerationIdentity) -> GenerationStore:
    """Founded if it is not there. Raises IdentityMismatch if another lives there."""
    try:
        return create_generations(config.path, identity)
    except IdentityMismatch as error:
        files = open_files(config.path)
        if not holds_generations(files) or files.list(SHARDS):
            raise
        raise IdentityMismatch(f"{error} Nothing is in it yet: removing that folder does as well.") from error


def _plan(config: GenerateConfig, manifest: Manifest, store: GenerationStore, *, save: bool) -> Plan:
    return make_plan(
        manifest, store, unit_tokens=config.unit_tokens, seed=config.decoding.seed, save=save,
        beside=config.decoding.n * config.decoding.max_tokens,
    )  # fmt: skip


def pending(config: GenerateConfig, manifest: Manifest, store: GenerationStore) -> int:
    """Prompts that are not answered yet; nothing is written."""
    return _plan(config, manifest, store, save=False).pending_sequences


def require_all_generated(generated: Generated) -> None:
    """For what needs all responses: raises TeacherError if units were left out."""
    if generated.taught.quarantined:
        raise TeacherError(left_out(generated.taught.quarantined, generated.store.uri))


def generation_identity(recipe: Recipe, config: GenerateConfig, sources: Sources) -> GenerationIdentity:
    """What the recipe's teacher and decoding make of a store, without loading the teacher."""
    from stillroom.workers.digests import identity_parts
    from stillroom.workers.source import cache_folder

    text = sources.tokenizer.backend_tokenizer.to_str()
    dtype = config.engine.dtype or recipe.teacher.dtype
    parts = identity_parts(sources.teacher_folder, text, dtype=dtype, cache_dir=cache_folder())
    parts["quantisation"] = config.engine.quantization or parts["quantisation"]
    return GenerationIdentity(teacher=recipe.teacher.model, decoding=config.decoding.spec(), **parts)


def generator_spec(recipe: Recipe, config: GenerateConfig, sources: Sources) -> GeneratorSpec:
    engine = config.engine
    return GeneratorSpec(
        folder=sources.teacher_folder,
        decoding=config.decoding.spec(),
        dtype=engine.dtype or recipe.teacher.dtype,
        quantization=engine.quantization,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_model_len=engine.max_model_len,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_kv_cache_gib=engine.cpu_kv_cache_gib,
        max_num_seqs=engine.max_num_seqs,
        enforce_eager=engine.enforce_eager,
        threads=recipe.teacher.threads or max(1, int(recipe.ray.cpus_per_actor)),
        trust_remote_code=recipe.teacher.trust_remote_code,
    )


def _prompts(
    recipe: Recipe, config: GenerateConfig, sources: Sources, console: Console
) -> tuple[Manifest, dict[str, Any]]:
    manifest, counts, read = _ingest(recipe, config, sources, prompts_path(recipe))
    console.info(f"prompts: {counts.line()}{'' if read else '; unchanged'}")
    for notice in counts.notices() if read else []:
        console.notice(f"prompts: {notice}")
    return manifest, counts.as_dict()


def prompts_of(recipe: Recipe, config: GenerateConfig, sources: Sources, out: Path) -> Manifest:
    """The prompts as they are now, written to `out`."""
    return _ingest(recipe, config, sources, out)[0]


def _ingest(recipe: Recipe, config: GenerateConfig, sources: Sources, out: Path) -> tuple[Manifest, PromptCounts, bool]:
    from stillroom.workers.source import positions_of

    limit = positions_of(sources.teacher_folder, trust_remote_code=recipe.teacher.trust_remote_code)
    asked = config.engine.max_model_len
    if limit is not None and asked is not None and asked > limit:
        raise RecipeError(
            f"generate.engine.max_model_len is {asked:,}, the teacher's positions end at {limit:,}: lower it, or leave "
            "it out"
        )
    return ingest_prompts(config, recipe.corpus, sources.tokenizer, window=asked or limit, out=out)


def prompts_path(recipe: Recipe) -> Path:
    return recipe.run_dir / "prompts.parquet"


def _run(
    recipe: Recipe,
    config: GenerateConfig,
    plan: Plan,
    manifest: Manifest,
    store: GenerationStore,
    sources: Sources,
    taught: Taught,
    console: Console,
) -> None:
    from stillroom.pipeline.cluster import Actors, address_of, session
    from stillroom.pipeline.pool import Pool
    from stillroom.pipeline.status import GeneratingStatus
    from stillroom.workers.actor import remote_generator

    if address_of(recipe.ray) is None:
        require_vllm()  # on a cluster the nodes have it, and the driver need not
    spec, ledger = generator_spec(recipe, config, sources), Ledger(recipe.run_dir / "ledger.generate.jsonl")
    batch = Batch(store, taught, ledger, "", TeachingAccount(store.files, recipe.name))

    def create(**options: Any) -> Any:
        return remote_generator(**options).remote(spec, store.identity, store.uri)

    with session(recipe.ray):
        pool = Pool(Actors(create, recipe.ray), recipe.ray, console.notice)
        count = f"{recipe.ray.actors} engines of vLLM are" if recipe.ray.actors > 1 else "vLLM is"
        console.info(f"generate: {count} starting (import and weights; 40 s is usual on a CPU)")
        status = GeneratingStatus(recipe, plan, manifest, store, batch, pool, console)
        state: State = "stopped"
        try:
            pool.start(status.waiting)
            status.begin()
            with console.progress(plan.pending_sequences, "prompts", label="generate") as progress:
                _drain(pool.run(_payloads(plan, manifest)), batch, status, progress)
            state = "done"
        finally:
            with uninterrupted():  # as in precompute._score
                try:
                    batch.commit()
                    status.close(state)
                finally:
                    pool.stop()


def _payloads(plan: Plan, manifest: Manifest) -> Iterator[tuple[Unit, list[Sequence], TruthRequest]]:
    """Units with their prompts' ids, read only when an actor is free."""
    for unit in plan.pending:
        rows = manifest.rows([plan.rows[s] for s in unit.sequences])
        yield unit, [row.sequence for row in rows], TruthRequest()


def _drain(events: Iterator[Any], batch: Batch, status: "GeneratingStatus", progress: Progress) -> None:
    for event in events:
        if isinstance(event, Receipt):
            batch.add(event)
            progress.advance(event.sequences)
            progress.note(f"{batch.taught.rows:,} tokens written")
        elif event is not None:
            status.failed(event)
        status.tick(committed=batch.commit_if_due())


def judge(
    recipe: Recipe,
    config: GenerateConfig,
    manifest: Manifest,
    store: GenerationStore,
    function: Judge | None,
    *,
    out: Path | None = None,
) -> Counter[str]:
    """Judge every response to the recipe's prompts and write the verdicts; how many there are of each reason.

    out: where, if not in the run's folder.
    """
    meta = {
        "store": store.uri,
        "identity": store.identity.id,
        "tokenizer": store.identity.tokenizer,
        "prompts": str(prompts_path(recipe)),
        "quality": config.quality.model_dump(mode="json"),
    }
    return write_verdicts(out or recipe.run_dir / VERDICTS, _verdicts(config, manifest, store, function), meta)


def _verdicts(
    config: GenerateConfig, manifest: Manifest, store: GenerationStore, function: Judge | None
) -> Iterator[Verdict]:
    texts = read_texts(manifest.path)
    for stored in store.units():
        for prompt, responses in groupby(stored.responses, key=lambda response: response.prompt):
            if prompt in texts:  # another recipe's lie in the same store
                said = texts[prompt]
                yield from judge_prompt(
                    list(responses), config.quality, unit=stored.unit, prompt=said.text, reference=said.reference,
                    function=function,
                )  # fmt: skip


def _say(reasons: Counter[str], console: Console) -> None:
    total = reasons.total()
    dropped = ", ".join(f"{reasons[reason]:,} {reason}" for reason in REASONS if reasons[reason])
    console.info(f"generate: {reasons[KEPT]:,} of {total:,} responses kept{dropped and f'; dropped: {dropped}'}")
    if total and not reasons[KEPT]:
        console.notice(f"none of the {total:,} responses is kept: see generate.quality")
