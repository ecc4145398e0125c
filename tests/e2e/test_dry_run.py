"""A dry run after one changed field names what the field invalidates, for every field of a recipe.

The base is a real chain that is done: two stages, the second taught by the first one's student. A table says for each
field what of the first stage its change touches; what that means for the second follows (a student that is trained
anew is another teacher). A second one says what changes of the chain itself touch.
"""

import json
from typing import Any

import pytest
import yaml

from stillroom.pipeline.console import Console
from stillroom.pipeline.generate import _plan, generation_identity, judge, prompts_of, prompts_path
from stillroom.pipeline.recipe import load_chain
from stillroom.pipeline.recipe.document import dotted
from stillroom.pipeline.recipe.fields import fields_of, models_in
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.stages.dry_run import parts_of
from stillroom.pipeline.student.bindings import differences
from stillroom.pipeline.student.config import StudentConfig
from stillroom.storage.generations.store import create_generations
from tests.e2e.runs import Setup, kill_group, sentences, wait_for
from tests.storage.generations.builders import put
from tests.tiny import tiny_teacher

pytestmark = [pytest.mark.real, pytest.mark.slow]

PARTS = ("corpus", "teach", "train", "evaluate")
NOTHING: frozenset[str] = frozenset()
READ = frozenset({"corpus"})  # read again, and the same sequences come of it
SPLIT = frozenset({"corpus", "train", "evaluate"})  # the same sequences: no teacher
ALL = frozenset(PARTS)
TEACH = frozenset({"teach", "train", "evaluate"})
TRAIN = frozenset({"train", "evaluate"})
EVALUATE = frozenset({"evaluate"})

S = "stages.0.students.0"
CUT = {"cut": {"layers": 1}}
A, C = "{name: a, model: {cut: {layers: 2}}}", "{name: c, model: {cut: {layers: 1}}}"

#: What is not one `field=value`: further words that the field cannot be without.
WITH = {
    "run_dir": ["run_dir=FOLDER/other"],
    "teacher.model": ["teacher.model=FOLDER/other-teacher"],
    "teacher.split": ["teacher.split=tensors", "teacher.ranks=2"],
    "teacher.ranks": ["teacher.split=tensors", "teacher.ranks=2"],
    "corpus.sources.0.path": ["corpus.sources.0.path=FOLDER/other.jsonl"],
    "store.path": ["store.path=FOLDER/store"],
    "students.0.model.from": [f"{S}.model={{from: FOLDER/other-teacher}}"],
    "students.0.epochs": [f"{S}.steps=null", f"{S}.epochs=1"],
    "students.0.lora.alpha": [f"{S}.lora.alpha=4"],
    "evaluate.lm_eval.include_path": ["evaluate.lm_eval={tasks: [x], include_path: FOLDER}"],
    "evaluate.lm_eval.limit": ["evaluate.lm_eval={tasks: [x], limit: 3}"],
}

#: By field: another value, and what of a stage that touches.
TABLE: dict[str, tuple[Any, frozenset[str]]] = {
    "name": ("other", NOTHING),
    "run_dir": (None, ALL),
    "teacher.model": (None, TEACH),
    "teacher.dtype": ("bfloat16", TEACH),
    "teacher.quantisation": ("int8", TEACH),
    "teacher.device": ("auto", NOTHING),
    "teacher.attention": ("eager", NOTHING),
    "teacher.batch_tokens": (128, NOTHING),
    "teacher.slice_positions": (8, NOTHING),
    "teacher.threads": (1, NOTHING),
    "teacher.trust_remote_code": (True, NOTHING),
    "teacher.compile": (True, NOTHING),
    "teacher.split": (None, NOTHING),
    "teacher.ranks": (None, NOTHING),
    "corpus.sources.0.path": (None, ALL),
    "corpus.sources.0.name": ("named", READ),
    "corpus.sources.0.weight": (2.0, SPLIT),
    "corpus.sources.0.form": ("text", READ),
    "corpus.sources.0.text_field": ("body", ALL),
    "corpus.sources.0.prompt_field": ("question", READ),
    "corpus.sources.0.response_field": ("answer", READ),
    "corpus.sources.0.messages_field": ("turns", READ),
    "corpus.sources.0.txt_documents": ("line", READ),
    "corpus.sources.0.splits": (["train"], READ),
    "corpus.window": (24, ALL),
    "corpus.overlap": (2, ALL),
    "corpus.train_on": ("all", READ),
    "corpus.pairs_as": ("plain", READ),
    "corpus.chat_template_options": ({"date": "x"}, READ),
    "corpus.append_eos": (False, ALL),
    "corpus.heldout": (0.3, SPLIT),
    "corpus.split_seed": (9, SPLIT),
    "corpus.limit_documents": (20, SPLIT),
    "corpus.limit_tokens": (1500, SPLIT),
    "corpus.max_document_mib": (8, READ),
    "corpus.strict": (True, READ),
    "signal.topk.k": (4, TEACH),
    "signal.topk.gap_step": ("1/4", TEACH),
    "signal.topk.nucleus.mass": (0.5, TEACH),
    "signal.topk.nucleus.temperature": (2, TEACH),
    "signal.topk.layout": ("packed", TEACH),
    "signal.sampled.draws": (4, TEACH),
    "signal.hidden.dtype": ("bfloat16", TEACH),
    "signal.layers.layers": ([1], TEACH),
    "signal.layers.every": (2, TEACH),
    "signal.layers.named_by": ("students", TEACH),
    "signal.layers.dtype": ("float32", TEACH),
    "signal.attention.layers": ([0], TEACH),
    "signal.attention.every": (2, TEACH),
    "signal.attention.heads": ("per_head", TEACH),
    "signal.attention.max_tokens": (64, TEACH),
    "signal.attention.dtype": ("float32", TEACH),
    "signal.embeddings": (True, TEACH),
    "fidelity.positions": (8, NOTHING),
    "fidelity.max_gradient_angle_deg": (90, NOTHING),
    "fidelity.max_kl_added": (1.0, NOTHING),
    "store.path": (None, TEACH),
    "store.unit_tokens": (512, NOTHING),
    "store.min_free_bytes": (1, NOTHING),
    "store.safety": (2.0, NOTHING),
    "ray.address": ("auto", NOTHING),
    "ray.actors": (3, NOTHING),
    "ray.cpus_per_actor": (2, NOTHING),
    "ray.gpus_per_actor": (0.5, NOTHING),
    "ray.resources": ({"big": 1}, NOTHING),
    "ray.placement": ("spread", NOTHING),
    "ray.inflight_per_actor": (2, NOTHING),
    "ray.retries": (1, NOTHING),
    "ray.ship": (False, NOTHING),
    "ray.dashboard": (True, NOTHING),
    "students.0.name": ("other", TRAIN),
    "students.0.model.from": (None, TRAIN),
    "students.0.model.cut.layers": (1, TRAIN),
    "students.0.seed": (5, TRAIN),
    "students.0.steps": (7, TRAIN),
    "students.0.epochs": (None, TRAIN),
    "students.0.batch_packs": (4, TRAIN),
    "students.0.micro_packs": (2, TRAIN),
    "students.0.window": (24, TRAIN),
    "students.0.packing": (False, TRAIN),
    "students.0.losses.alpha": (0.6, TRAIN),
    "students.0.losses.signal": ("topk", TRAIN),
    "students.0.losses.temperature": (1.5, TRAIN),
    "students.0.losses.output.forward_kl": (0.5, TRAIN),
    "students.0.losses.output.reverse_kl": (0.5, TRAIN),
    "students.0.losses.output.js.weight": (0.5, TRAIN),
    "students.0.losses.output.js.mixing": (0.3, TRAIN),
    "students.0.losses.output.tv": (0.5, TRAIN),
    "students.0.losses.output.mse": (0.5, TRAIN),
    "students.0.losses.output.cosine": (0.5, TRAIN),
    "students.0.losses.label_smoothing": (0.1, TRAIN),
    "students.0.losses.fused": (False, TRAIN),
    "students.0.features.hidden.weight": (0.2, TRAIN),
    "students.0.features.attention.weight": (0.2, TRAIN),
    "students.0.features.embeddings.weight": (0.2, TRAIN),
    "students.0.features.relations.weight": (0.2, TRAIN),
    "students.0.phases.steps": ([{"steps": 6}], TRAIN),
    "students.0.phases.temperature": ([{"steps": 6, "temperature": 2}], TRAIN),
    "students.0.phases.corpus": ([{"steps": 6, "corpus": "CORPUS", "losses": {"alpha": 0}}], TRAIN),
    "students.0.phases.lr": ([{"steps": 6, "lr": 1e-4}], TRAIN),
    "students.0.mix.by": ("sampling", TRAIN),
    "students.0.mix.shares": ({"corpus": 1.0}, TRAIN),
    "students.0.lr": (2e-3, TRAIN),
    "students.0.warmup_steps": (1, TRAIN),
    "students.0.schedule": ("linear", TRAIN),
    "students.0.min_lr_ratio": (0.2, TRAIN),
    "students.0.weight_decay": (0.1, TRAIN),
    "students.0.betas": ([0.9, 0.99], TRAIN),
    "students.0.grad_clip": (2.0, TRAIN),
    "students.0.precision": ("bfloat16", TRAIN),
    "students.0.lora.rank": (2, TRAIN),
    "students.0.lora.alpha": (None, TRAIN),
    "students.0.lora.dropout": (0.1, TRAIN),
    "students.0.lora.targets": (["q_proj"], TRAIN),
    "students.0.compile": (True, NOTHING),
    "students.0.gradient_checkpointing": (True, TRAIN),
    "students.0.checkpoint_every": (3, NOTHING),
    "students.0.keep_last": (3, NOTHING),
    "students.0.keep_best.metric": ("kl", TRAIN),
    "students.0.advance.plateau.metric": ("perplexity", TRAIN),
    "students.0.advance.plateau.patience": (2, TRAIN),
    "students.0.advance.plateau.min_improvement": (0.1, TRAIN),
    "students.0.advance.gap": (0.1, TRAIN),
    "students.0.log_every": (2, NOTHING),
    "students.0.eval_every": (3, NOTHING),
    "students.0.eval_packs": (1, NOTHING),
    "students.0.on_nan": ("skip", TRAIN),
    "students.0.export_dtype": ("bfloat16", TRAIN),  # exported again
    "students.0.device": ("auto", NOTHING),
    "train.read_through": (True, NOTHING),
    "train.patience_s": (5, NOTHING),
    "train.processes": (2, NOTHING),
    "train.side_by_side": (2, NOTHING),
    "train.rank_timeout_s": (60, NOTHING),
    "evaluate.teacher": (False, NOTHING),
    "evaluate.latency_tokens": (3, EVALUATE),
    "evaluate.lm_eval.tasks": (["x"], EVALUATE),
    "evaluate.lm_eval.include_path": (None, EVALUATE),
    "evaluate.lm_eval.limit": (None, EVALUATE),
}  # fmt: skip

#: By field of a student's section that the base lacks: the section as it is trained, and as the field makes it another
#: one. Of each the table above has the whole section.
_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha": ({}, {"alpha": 0.6}),
    "signal": ({}, {"signal": "topk"}),
    "temperature": ({}, {"temperature": 1.5}),
    "output.forward_kl": ({}, {"output": {"forward_kl": 0.5}}),
    "output.reverse_kl": ({}, {"output": {"reverse_kl": 1.0}}),
    "output.js.weight": ({}, {"output": {"js": {"weight": 1.0}}}),
    "output.js.mixing": ({"output": {"js": {"weight": 1.0}}}, {"output": {"js": {"weight": 1.0, "mixing": 0.3}}}),
    "output.tv": ({}, {"output": {"tv": 1.0}}),
    "output.mse": ({}, {"output": {"mse": 1.0}}),
    "output.cosine": ({}, {"output": {"cosine": 1.0}}),
    "label_smoothing": ({}, {"label_smoothing": 0.1}),
    "fused": ({}, {"fused": False}),
}
_FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{part}.{field}": ({part: {}}, {part: {field: value}})
    for part, fields in {
        "hidden": {"weight": 0.3, "map": "last", "every": 2, "loss": "cosine", "projection": "linear"},
        "attention": {"weight": 0.3, "map": "last", "every": 2, "heads": "per_head"},
        "embeddings": {"weight": 0.3, "loss": "cosine", "projection": "linear"},
        "relations": {"weight": 0.3, "map": "last", "every": 2},
    }.items()
    for field, value in fields.items()
}


def _phase(**section: Any) -> dict[str, Any]:
    # One part of the store teaches all phases.
    return {"losses": {"signal": "topk"}, "phases": [{"steps": 6, **section}]}


INNER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"features.{field}": ({"features": a}, {"features": b}) for field, (a, b) in _FEATURES.items()},
    **{f"phases.losses.{field}": (_phase(losses=a), _phase(losses=b)) for field, (a, b) in _LOSSES.items()},
    **{f"phases.features.{field}": (_phase(features=a), _phase(features=b)) for field, (a, b) in _FEATURES.items()},
}
#: Fields with one value alone.
SINGLE = ("students.0.features.attention.loss", "students.0.phases.features.attention.loss")
#: Of the responses: GENERATED below has them. What students answer: `test_seqkd`, whose recipe is run whole.
GENERATING = ("generate.", "evaluate.answers.")

WRITTEN = frozenset({"generate", "corpus"})  # other responses, or other ones of them are kept

#: By field of `generate`: another value, and what of generating and corpus that touches.
GENERATED: dict[str, tuple[Any, frozenset[str]]] = {
    "prompts.0.path": ("OTHER", WRITTEN),
    "prompts.0.name": ("named", NOTHING),
    "prompts.0.weight": (2.0, NOTHING),
    "prompts.0.form": ("pairs", NOTHING),
    "prompts.0.text_field": ("words", NOTHING),
    "prompts.0.prompt_field": ("question", WRITTEN),
    "prompts.0.response_field": ("answer", NOTHING),
    "prompts.0.messages_field": ("turns", NOTHING),
    "prompts.0.txt_documents": ("line", NOTHING),
    "prompts.0.splits": (["train"], NOTHING),
    "prompts.0.reference_field": ("right", NOTHING),
    "prompts.0.continue_tokens": ([1, 2], WRITTEN),
    "prompts.0.continuations": (2, WRITTEN),
    "system": ("be brief", WRITTEN),
    "prompts_as": ("plain", WRITTEN),
    "limit_prompts": (1, WRITTEN),
    "strict": (True, NOTHING),
    "path": ("FOLDER/others", WRITTEN),
    "unit_tokens": (64, NOTHING),
    "decoding.method": ("greedy", WRITTEN),
    "decoding.n": (3, WRITTEN),
    "decoding.max_tokens": (9, WRITTEN),
    "decoding.min_tokens": (1, WRITTEN),
    "decoding.temperature": (0.5, WRITTEN),
    "decoding.top_p": (0.5, WRITTEN),
    "decoding.top_k": (5, WRITTEN),
    "decoding.beams": (3, WRITTEN),
    "decoding.length_penalty": (0.5, WRITTEN),
    "decoding.stop": (["mint"], WRITTEN),
    "decoding.seed": (5, WRITTEN),
    "engine.dtype": ("bfloat16", WRITTEN),
    "engine.quantization": ("fp8", WRITTEN),
    "engine.tensor_parallel_size": (2, NOTHING),
    "engine.max_model_len": (128, NOTHING),
    "engine.gpu_memory_utilization": (0.5, NOTHING),
    "engine.cpu_kv_cache_gib": (2, NOTHING),
    "engine.max_num_seqs": (4, NOTHING),
    "engine.enforce_eager": (True, NOTHING),
    "quality.min_tokens": (2, WRITTEN),
    "quality.max_tokens": (5, WRITTEN),
    "quality.truncated": ("keep", WRITTEN),
    "quality.ngram": (2, WRITTEN),
    "quality.max_repetition": (0.1, WRITTEN),
    "quality.duplicates": ("keep", WRITTEN),
    "quality.min_mean_logprob": (-0.1, WRITTEN),
    "quality.reference": ("exact", WRITTEN),
    "quality.function": ("FOLDER/judge.py:good", WRITTEN),
    "quality.min_score": (0.5, WRITTEN),
    "quality.keep": ("best", WRITTEN),
    "quality.best_by": ("total_logprob", WRITTEN),
}  # fmt: skip


def fields() -> list[str]:
    return [dotted(path) for path, info in fields_of(Recipe) if not any(models_in(info.annotation))]


def test_no_field_is_forgotten() -> None:
    named = {*TABLE, *(f"students.0.{f}" for f in INNER)}
    assert [f for f in fields() if f not in named and not f.startswith(GENERATING)] == [*SINGLE]
    assert named - {*fields()} == set()
    assert [f"generate.{f}" for f in GENERATED] == [f for f in fields() if f.startswith("generate.")]


@pytest.fixture(scope="module", name="done")
def _done(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A chain that is done."""
    folder = tmp_path_factory.mktemp("chain")
    setup = Setup.make(folder, [], teacher={"layers": 3}, evaluate={"teacher": True, "latency_tokens": 2})
    lines = [{"text": text, "body": text[::-1]} for text in sentences(3, 30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(4, 30)))
    tiny_teacher(folder / "other-teacher", layers=3, seed=7)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    student = recipe.pop("students")[0]
    del recipe["store"]["path"]
    recipe["corpus"]["sources"] = [{"path": str(folder / "corpus.jsonl")}]
    recipe["ray"] = {"actors": 1}
    recipe["student_defaults"] = {k: v for k, v in student.items() if k not in ("name", "model")} | {"steps": 6}
    recipe["stages"] = [
        {"name": "one", "students": [{"name": "a", "model": {"cut": {"layers": 2}}}]},
        {"name": "two", "teacher": {"stage": "one"}, "students": [{"name": "b", "model": {"cut": {"layers": 1}}}]},
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    setup.run()
    return setup


def invalid(setup: Setup, *overrides: str) -> dict[str, set[str]]:
    """By stage, the parts that are not done."""
    chain = load_chain(setup.folder / "recipe.yaml", overrides, files=False)
    found: dict[str, set[str]] = {stage.name: set() for stage in chain.stages}
    for part in parts_of(chain):
        if part.state != "done":
            assert part.why, part
            found[part.stage].add(part.part)
    return found


def words(setup: Setup, field: str) -> list[str]:
    """The field's other value, as the command line has it."""
    if field in WITH:
        return [word.replace("FOLDER", str(setup.folder)) for word in WITH[field]]
    value = json.dumps(TABLE[field][0]).replace(
        "CORPUS", str(setup.folder / "run" / "stages" / "one" / "corpus.parquet")
    )
    if field.startswith("students.0.phases."):
        return [f"{S}.steps=null", f"{S}.phases={value}"]
    if field.startswith("students.0."):
        field = field.replace("students.0", S, 1)
    more = []
    if ".keep_best" in field or ".advance" in field:
        more = [f"{S}.eval_every=2"]
    if field.endswith("mix.by"):
        more = [f"{S}.mix.shares={{corpus: 1.0}}"]
    if field.endswith("mix.shares"):
        more = [f"{S}.mix.by=weight"]
    if field.endswith("nucleus.temperature"):
        more = ["signal.topk.nucleus.mass=0.5"]
    if field.endswith("named_by"):
        more = ["student_defaults.features.hidden.map=[[1, 1]]"]
    if field.endswith("js.mixing"):
        more = [f"{S}.losses.output.js.weight=1"]
    if field in (
        "signal.layers.dtype",
        "signal.attention.heads",
        "signal.attention.max_tokens",
        "signal.attention.dtype",
    ):
        more = [f"{field.rpartition('.')[0]}.layers=[1]"]
    return [*more, f"{field}={value}"]


def test_a_chain_that_is_done_has_nothing_to_do(done: Setup) -> None:
    assert invalid(done) == {"one": set(), "two": set()}
    said = done.run("run", "--json")
    assert "teach: all" in said
    assert said.count("is trained already") == 2
    assert "starting" not in said
    assert "measuring" not in said


@pytest.mark.parametrize("field", TABLE)
def test_a_changed_field_names_what_it_invalidates(done: Setup, field: str) -> None:
    touched = TABLE[field][1]
    later = touched | {"teach", "train", "evaluate"} if "train" in touched else touched
    if field.startswith("students."):  # of the first stage's student alone
        later = later if touched else NOTHING
    found = invalid(done, *words(done, field))
    assert found == {"one": set(touched), "two": set(later)}


@pytest.mark.parametrize("field", INNER)
def test_a_changed_field_of_a_section_makes_another_student(field: str) -> None:
    """As any change of a student's numbers does; that a dry run names what this invalidates, the table shows."""
    trained, asked = (StudentConfig.model_validate({"name": "a", "model": CUT} | given) for given in INNER[field])
    held = {"manifest": "m", "snapshot": "s"}
    said = differences(held | {"config": trained.numbers()}, held | {"config": asked.numbers()})
    names = {line.partition(":")[0] for line in said}
    name = field.replace("phases.", "phases.0.")
    # An output loss that is named takes the place of the default one, which is told beside it.
    assert {name} <= names <= {name, f"{name.partition('output.')[0]}output.forward_kl"}, said


#: By what is done to the whole recipe: words of the command line, and what that touches. FOLDER: of the test.
CHAIN: dict[str, tuple[list[str], dict[str, frozenset[str]]]] = {
    "defaults": (["student_defaults.lr=0.5"], {"one": TRAIN, "two": TEACH}),
    "defaults that one of two has itself": (
        ["stages.0.students.0.lr=0.001", "student_defaults.lr=0.5"],
        {"one": NOTHING, "two": TRAIN},
    ),
    "defaults that no number depends on": (["student_defaults.log_every=3"], {"one": NOTHING, "two": NOTHING}),
    "a second student": (
        [f"stages.0.students=[{A}, {C}]", "stages.1.teacher.student=a"],
        {"one": TRAIN, "two": NOTHING},
    ),
    "a second student who teaches": (
        [f"stages.0.students=[{A}, {C}]", "stages.1.teacher.student=c"],
        {"one": TRAIN, "two": TEACH},
    ),
    "no student": (["stages.1.students=[]"], {"one": NOTHING, "two": NOTHING}),
    "the recipe's own teacher": (["stages.1.teacher={}"], {"one": NOTHING, "two": TRAIN}),
    "a field of one stage": (["stages.1.signal={topk: {k: 4}}"], {"one": NOTHING, "two": TEACH}),
    "another name of a stage": (["stages.1.name=second"], {"one": NOTHING, "second": ALL}),
    "one stage less": (["stages=[STAGE-0]"], {"one": NOTHING}),
    "one stage more": (
        ["stages=[STAGE-0, STAGE-1, {name: three, teacher: {stage: two}, students: [" + C + "]}]"],
        {"one": NOTHING, "two": NOTHING, "three": ALL},
    ),
    "one stage more of a teacher that is there": (
        ["stages=[STAGE-0, STAGE-1, {name: three, students: [" + C + "]}]"],
        {"one": NOTHING, "two": NOTHING, "three": ALL - {"teach"}},
    ),
    "a preset": (
        [
            "preset=deepseek", "signal.layers.every=1",
            "corpus.sources=[{path: FOLDER/corpus.jsonl, name: pretraining}, {path: FOLDER/other.jsonl, name: "
            "instruction}]",
        ],
        {"one": ALL, "two": ALL},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHAIN)
def test_a_changed_chain_names_what_that_invalidates(done: Setup, change: str) -> None:
    given, touched = CHAIN[change]
    stages = yaml.safe_load((done.folder / "recipe.yaml").read_text())["stages"]
    texts = {"FOLDER": str(done.folder), **{f"STAGE-{n}": json.dumps(stage) for n, stage in enumerate(stages)}}
    said = []
    for word in given:
        for name, text in texts.items():
            word = word.replace(name, text)
        said.append(word)
    assert invalid(done, *said) == touched


@pytest.fixture(scope="module", name="written")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A recipe whose responses are written, by hand and not by an engine, judged, and read into its corpus."""
    folder = tmp_path_factory.mktemp("written")
    prompts = [{"prompt": text, "question": text[::-1], "response": "rose"} for text in ("mint", "thyme", "anise")]
    for name, chosen in (("prompts", prompts), ("other", [*prompts[:2], {"prompt": "glass"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    (folder / "judge.py").write_text("def good(prompt, response, reference):\n    return len(response)\n")
    generate = {"prompts": [{"path": str(folder / "prompts.jsonl")}], "decoding": {"n": 2, "max_tokens": 8, "seed": 1}}
    sources = ["generations", str(folder / "corpus.jsonl")]
    setup = Setup.make(folder, sentences(3, 30), generate=generate, corpus__sources=sources)
    recipe = setup.recipe()
    made, config = Sources(recipe, Console(quiet=True)), recipe.generate
    assert config is not None
    manifest = prompts_of(recipe, config, made, prompts_path(recipe))
    store = create_generations(config.path, generation_identity(recipe, config, made))
    for unit in _plan(config, manifest, store, save=True).pending:
        ids = {row.sequence.digest: row.sequence.input_ids.tolist() for row in manifest}
        assert put(store, [ids[digest] for digest in unit.sequences])
    judge(recipe, config, manifest, store, None)
    made.manifest()
    return setup


@pytest.mark.parametrize("field", GENERATED)
def test_a_changed_field_of_generating_names_what_it_invalidates(written: Setup, field: str) -> None:
    (value, touched), folder = GENERATED[field], str(written.folder)
    said = json.dumps(value).replace("OTHER", f"{folder}/other.jsonl").replace("FOLDER", folder)
    texts = ["generate.prompts.0.form=text", "generate.prompts.0.text_field=question"]
    more = {
        "prompts.0.continue_tokens": texts,
        "prompts.0.continuations": [*texts, "generate.prompts.0.continue_tokens=[1, 2]"],
        "decoding.method": ["generate.decoding.n=1"],
        "engine.tensor_parallel_size": ["ray.gpus_per_actor=2"],
        "decoding.beams": ["generate.decoding.method=beam"],
        "decoding.length_penalty": ["generate.decoding.method=beam"],
        "quality.min_score": [f"generate.quality.function={folder}/judge.py:good"],
        "quality.best_by": ["generate.quality.keep=best"],
    }.get(field, [])
    (found,) = invalid(written, *more, f"generate.{field}={said}").values()
    assert found - {"teach", "train", "evaluate"} == touched


def test_responses_that_are_there_are_not_written_again(written: Setup) -> None:
    (found,) = invalid(written).values()
    assert found == {"teach", "train", "evaluate"}


def test_what_other_settings_made_is_put_aside_and_a_killed_chain_goes_on(done: Setup) -> None:
    """The last test here: it changes the chain."""
    change, stages = "stages.0.students.0.lr=0.002", done.folder / "run" / "stages"
    before = (stages / "one" / "students" / "a" / "result.json").read_bytes()
    refused = done.run("run", change, code=2)
    assert "train a of stage one was made by other settings: lr: 0.001 there, 0.002 asked" in refused
    assert "`--redo` puts it aside" in refused
    process = done.start("run", change, "--redo")
    log = stages / "two" / "students" / "b" / "log.jsonl"
    aside = stages / "two" / "students" / "b.replaced-1"
    wait_for(lambda: aside.exists() and log.exists() and '"step": 2' in log.read_text(), process, "the second stage")
    kill_group(process)
    assert (stages / "one" / "students" / "a.replaced-1" / "result.json").read_bytes() == before
    assert (stages / "two" / "store.replaced-1").is_dir(), "its teacher is another one by now"
    said = done.run("run", change, "--redo")
    assert "put aside" not in said
    assert said.count("is trained already") == 1
    assert invalid(done, change) == {"one": set(), "two": set()}
    summary = json.loads((done.folder / "run" / "summary.json").read_text())
    assert [(row["student"], row["steps_with_teachers"]) for row in summary["students"]] == [("a", 6), ("b", 12)]
    assert all(row["kl_to_first_teacher"] > 0 for row in summary["students"])
