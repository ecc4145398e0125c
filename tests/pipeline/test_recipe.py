"""A recipe that is right is read whole; one that is wrong is refused in one line that says what to put right."""

from pathlib import Path

import pytest

from stillroom.pipeline.recipe import Recipe, check_files, load_recipe, notices, save_resolved
from stillroom.pipeline.recipe.document import KeyPath
from stillroom.pipeline.recipe.fields import fields_of, meaning
from stillroom.pipeline.recipe.reference import reference_rows, reference_text
from stillroom.pipeline.recipe.signal_schema import TopKConfig
from stillroom.pipeline.recipe.starter import write_starter
from stillroom.storage.errors import RecipeError, UsageError
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, SignalSpec, TopKSpec

RECIPE = """\
name: first
teacher:
  model: org/teacher
  dtype: float32
corpus:
  sources: text.txt
  window: 128
signal:
  topk:
    k: 32
    gap_step: 1/16
students:
  - name: small
    model:
      cut:
        layers: 2
    lr: 3e-5
  - name: large
    model: {cut: {layers: [0, 1, 3]}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe above with its corpus beside it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the still drips\n")
    Path("recipe.yaml").write_text(RECIPE)
    return Path("recipe.yaml")


def below_null(path: KeyPath) -> bool:
    """Whether a field lies in a section that is not there unless asked for: it is said as null."""
    return any(
        path[: len(section)] == section and path != section
        for section in (
            ("signal", "topk", "nucleus"),
            *(("signal", part) for part in ("sampled", "hidden", "layers", "attention")),
            *(("students", 0, section) for section in ("advance", "features", "keep_best", "lora", "mix", "phases")),
            ("generate",),
            ("evaluate", "answers"),
            ("evaluate", "lm_eval"),
        )
    )


def topk_of(recipe: Recipe) -> TopKConfig:
    assert recipe.signal.topk is not None
    return recipe.signal.topk


def refusal(file: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    assert caught.value.exit_code == 2
    return message


class TestReading:
    def test_values_and_defaults(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file)
        assert recipe.teacher.model == "org/teacher"
        assert recipe.teacher.batch_tokens == 4096
        assert recipe.signal.spec(width=576) == SignalSpec(TopKSpec(32, 1 / 16))
        assert [student.name for student in recipe.students] == ["small", "large"]
        assert recipe.run_dir == Path("runs/first")
        assert recipe.store.path == "runs/first/store"

    def test_store_and_run_dir_given(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file, ["run_dir=elsewhere", "store.path=s3://bucket/prefix"])
        assert (recipe.run_dir, recipe.store.path) == (Path("elsewhere"), "s3://bucket/prefix")
        assert load_recipe(recipe_file, ["run_dir=elsewhere"]).store.path == "elsewhere/store"

    def test_an_empty_section_is_one_of_defaults(self, recipe_file: Path) -> None:
        plain = load_recipe(recipe_file)
        recipe_file.write_text(RECIPE + "ray:\n  # actors: 1\nevaluate:\n")
        assert load_recipe(recipe_file) == plain

    def test_an_empty_section_of_a_student_too(self, recipe_file: Path) -> None:
        recipe_file.write_text(RECIPE + "    losses:\n")
        assert load_recipe(recipe_file).students[1].losses.alpha == 0.7

    def test_scalars_are_yaml_1_2(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file, ["students.0.lr=1e-5", "name=no", "store.min_free_bytes=1_000"])
        assert (recipe.students[0].lr, recipe.name, recipe.store.min_free_bytes) == (1e-5, "no", 1000)
        assert load_recipe(recipe_file, ["name=2024-01-01"]).name == "2024-01-01"

    def test_anchors_and_merge_keys(self, recipe_file: Path) -> None:
        text = RECIPE.replace("  - name: small\n", "  - &base\n    name: small\n") + (
            "  - <<: *base\n    name: third\n"  # its own name wins over the merged one
        )
        recipe_file.write_text(text)
        recipe = load_recipe(recipe_file)
        assert recipe.students[2].lr == 3e-5
        assert recipe.students[2].name == "third"

    def test_a_recipe_does_not_change(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file)
        with pytest.raises(ValueError, match="frozen"):
            recipe.name = "other"


class TestSignal:
    """What is kept, from the recipe's words to the spec that a store is founded on."""

    def test_the_default_is_the_top_64(self, recipe_file: Path) -> None:
        recipe_file.write_text(RECIPE.replace("signal:\n  topk:\n    k: 32\n    gap_step: 1/16\n", ""))
        assert load_recipe(recipe_file).signal.spec(width=576) == SignalSpec(TopKSpec(64, 1 / 8))

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["signal.topk.gap_step=null"], SignalSpec(TopKSpec(32, None))),
            (["signal.topk.layout=packed"], SignalSpec(TopKSpec(32, 1 / 16, None, "packed"))),
            (["signal.topk.nucleus={mass: 0.9}"], SignalSpec(TopKSpec(32, 1 / 16, NucleusSpec(0.9, 1.0)))),
            (
                ["signal.topk.nucleus={mass: 0.98, temperature: 2}"],
                SignalSpec(TopKSpec(32, 1 / 16, NucleusSpec(0.98, 2.0))),
            ),
            (["signal.topk=null", "signal.sampled={}"], SignalSpec(sampled=SampledSpec(50))),
            (["signal.topk=null", "signal.hidden={dtype: bfloat16}"], SignalSpec(hidden=HiddenSpec(576, "bfloat16"))),
            (
                ["signal.sampled={draws: 12}", "signal.hidden={}"],
                SignalSpec(TopKSpec(32, 1 / 16), SampledSpec(12), HiddenSpec(576, "int16")),
            ),
        ],
    )
    def test_parts(self, recipe_file: Path, words: list[str], expected: SignalSpec) -> None:
        recipe = load_recipe(recipe_file, words)
        assert recipe.signal.spec(width=576) == expected
        save_resolved(recipe, Path("resolved.yaml"))
        assert load_recipe(Path("resolved.yaml")) == recipe

    def test_the_calibration_is_the_stores(self, recipe_file: Path) -> None:
        spec = load_recipe(recipe_file, ["signal.hidden={}"]).signal.spec(width=8, calibration="ab" * 32)
        assert spec.hidden == HiddenSpec(8, "int16", "ab" * 32)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["signal.topk=null"], "signal: nothing is kept: give one or more of topk, sampled, hidden, layers"),
            (["signal.topk.nucleus={mass: 1}"], "signal.topk.nucleus.mass: expected less than 1, got 1"),
            (["signal.topk.nucleus={mass: 0}"], "signal.topk.nucleus.mass: expected more than 0, got 0"),
            (["signal.topk.nucleus={}"], "signal.topk.nucleus.mass is missing"),
            (
                ["signal.topk.nucleus={mass: 0.5, temperature: 0.5}"],
                "signal.topk.nucleus.temperature: expected at least 1, got 0.5",
            ),
            (
                ["signal.topk.nucleus={mass: 0.5, temperature: 11}"],
                "signal.topk.nucleus.temperature: expected at most 10, got 11",
            ),
            (["signal.topk.layout=tight"], 'signal.topk.layout: expected plain or packed, got "tight"'),
            (["signal.sampled={draws: 40000}"], "signal.sampled.draws: expected at most 32767, got 40000"),
            (["signal.hidden={dtype: int4}"], "signal.hidden.dtype: expected int16, int8 or bfloat16, got"),
            (["signal.k=8"], "unknown key signal.k (did you mean "),
        ],
    )
    def test_refused(self, recipe_file: Path, words: list[str], message: str) -> None:
        assert message in refusal(recipe_file, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.processes=9"], "train.processes is 9, students.0.batch_packs 8: each process takes whole packs"),
        (["train.processes=2", "students.0.device=cuda:1"], "students.0.device cuda:1: processes take GPUs by their"),
        (["train.processes=0"], "train.processes: expected at least 1, got 0"),
    ],
)
def test_processes_that_cannot_share_a_student_are_refused(recipe_file: Path, words: list[str], message: str) -> None:
    assert message in refusal(recipe_file, *words)
    assert load_recipe(recipe_file, ["train.processes=8"]).train.processes == 8


class TestResolved:
    def test_loads_back_equal(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file, ["students.0.model={from: org/student}", "signal.topk.gap_step=null"])
        save_resolved(recipe, Path("runs/resolved.yaml"))
        assert load_recipe(Path("runs/resolved.yaml")) == recipe

    def test_says_every_value(self, recipe_file: Path) -> None:
        save_resolved(load_recipe(recipe_file), Path("resolved.yaml"))
        text = Path("resolved.yaml").read_text()
        leaves = [path[-1] for path, info in fields_of(Recipe) if path[-1] != "from" and not below_null(path)]
        assert [leaf for leaf in leaves if f"{leaf}:" not in text] == []
        assert "path: runs/first/store" in text

    @pytest.mark.parametrize("name", ["1e-5", "no", "on", "1_0", "0x1", "2024-01-01", "null", "true", "1.5"])
    def test_text_that_looks_like_something_else_stays_text(self, recipe_file: Path, name: str) -> None:
        recipe = load_recipe(recipe_file, [f'name="{name}"'])
        save_resolved(recipe, Path("resolved.yaml"))
        assert load_recipe(Path("resolved.yaml")).name == name

    def test_leaves_no_half_file(self, recipe_file: Path) -> None:
        save_resolved(load_recipe(recipe_file), Path("out/resolved.yaml"))
        save_resolved(load_recipe(recipe_file), Path("out/resolved.yaml"))
        assert [entry.name for entry in Path("out").iterdir()] == ["resolved.yaml"]

    def test_a_folder_in_the_way(self, recipe_file: Path) -> None:
        with pytest.raises(RecipeError, match=r"cannot write text.txt/resolved.yaml"):
            save_resolved(load_recipe(recipe_file), Path("text.txt/resolved.yaml"))


class TestRefusedInTheFile:
    """Each message names file and line, the dotted key, what was expected and what was given."""

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("    k: 32", "    kk: 32", "10: unknown key signal.topk.kk (did you mean k?)"),
            ("window: 128", "windw: 128", "7: unknown key corpus.windw (did you mean window?)"),
            ("name: first", "name: first\nk: 8", "2: unknown key k (did you mean signal.topk.k?)"),
            ("lr: 3e-5", "step: 9", "17: unknown key students.0.step (did you mean steps?)"),
            ("    k: 32", "    k: many", '10: signal.topk.k: expected whole number, at least 1, got "many"'),
            ("    k: 32", '    k: "32"', '10: signal.topk.k: expected whole number, at least 1, got "32"'),
            ("    k: 32", "    k: true", "10: signal.topk.k: expected whole number, at least 1, got true"),
            ("    k: 32", "    k: 1.5", "10: signal.topk.k: expected a whole number, got 1.5"),
            ("    k: 32", "    k: 0", "10: signal.topk.k: expected at least 1, got 0"),
            ("    k: 32", "    k:", "10: signal.topk.k: expected a whole number, got nothing (null)"),
            ("gap_step: 1/16", "gap_step: 1/0", '11: signal.topk.gap_step: expected a number, got "1/0"'),
            ("gap_step: 1/16", "gap_step: 9", "11: signal.topk.gap_step: expected at most 4, got 9"),
            ("  model: org/teacher\n", "", "2: teacher.model is missing; expected a folder that holds a model"),
            ("name: first", "name: a/b", "1: name: expected name of the run: letters, digits, dots, dashes"),
            ("float32", "float23", "4: teacher.dtype: expected float32, bfloat16 or float16, got "
             '"float23" (did you mean float32?)'),
            ("name: large", "name: small", "12: students: expected a different name for each student, got small more"),
            ("[0, 1, 3]", "[0, a]", '19: students.1.model.cut.layers.1: expected a whole number, got "a"'),
            ("layers: 2", "layers: two", "16: students.0.model.cut.layers: expected a whole number or a list, got "
             '"two"'),
            ("signal:\n  topk:\n    k: 32\n    gap_step: 1/16", "signal: 3",
             "8: signal: expected a section with keys of its own, got 3"),
            ("lr: 3e-5", "losses: {output: js}", "17: students.0.losses.output: expected output losses with their "
             "weights, such as {js: 1}, got js"),
            ("lr: 3e-5", "packing: yes", '17: students.0.packing: expected true or false, got "yes"'),
        ],
    )  # fmt: skip
    def test_message(self, recipe_file: Path, old: str, new: str, message: str) -> None:
        assert old in RECIPE
        assert refusal(recipe_file, text=RECIPE.replace(old, new, 1)).startswith(f"recipe.yaml:{message}")

    def test_a_missing_key_of_the_top_has_no_line(self, recipe_file: Path) -> None:
        message = refusal(recipe_file, text=RECIPE.replace("name: first\n", ""))
        assert message.startswith("recipe.yaml: name is missing; expected name of the run: letters")

    def test_several_mistakes_are_counted(self, recipe_file: Path) -> None:
        text = RECIPE.replace("k: 32", "k: -1").replace("window: 128", "window: 0").replace("name: first", "nam: first")
        assert refusal(recipe_file, text=text) == (
            "recipe.yaml:1: unknown key nam (did you mean name?) (and 3 more to put right)"
        )

    def test_a_students_own_check_names_the_student(self, recipe_file: Path) -> None:
        message = refusal(recipe_file, text=RECIPE.replace("    lr: 3e-5", "    steps: 1\n    epochs: 1"))
        assert message.startswith("recipe.yaml:13: students.0: ")
        assert "not both" in message

    def test_a_gpu_teacher_needs_a_gpu_from_ray(self, recipe_file: Path) -> None:
        assert "ray.gpus_per_actor is 0" in refusal(recipe_file, "teacher.device=cuda")
        assert load_recipe(recipe_file, ["teacher.device=cuda", "ray.gpus_per_actor=0.5"]).ray.gpus_per_actor == 0.5


class TestRefusedAsYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "recipe.yaml: an empty recipe"),
            ("# nothing\n", "recipe.yaml: an empty recipe"),
            ("- a\n", "recipe.yaml:1: expected a mapping"),
            ("name: a\nname: b\n", "recipe.yaml:2: key name stands twice in this section, first in line 1"),
            ("name: a\nray:\n  actors: 1\n  actors: 2\n", "recipe.yaml:4: key actors stands twice"),
            ("name: [\n", "recipe.yaml:2: not valid YAML"),
            ("name: a\n\tray: 1\n", "recipe.yaml:2: not valid YAML"),
            ("1: a\n", "recipe.yaml:1: expected a key that is text, got 1"),
            ("? [a]\n: b\n", "recipe.yaml:1: expected a key that is text, got a list or a mapping"),
            ("name: !!python/object:os.system x\n", "recipe.yaml:1: expected plain YAML"),
            ("name: !!timestamp 2024-01-01\n", "recipe.yaml:1: expected plain YAML"),
            ("ray: &r {a: *r}\n", "recipe.yaml:1: an anchor that contains itself"),
            ("name: *nobody\n", "recipe.yaml:1: not valid YAML: found undefined alias"),
            ("name: a\n---\nname: b\n", "recipe.yaml:2: not valid YAML"),
            ("name: \x00\n", "recipe.yaml: not valid YAML"),
        ],
    )
    def test_message(self, recipe_file: Path, text: str, message: str) -> None:
        assert refusal(recipe_file, text=text).startswith(message)

    def test_not_utf_8(self, recipe_file: Path) -> None:
        recipe_file.write_bytes(b"name: \xff\n")
        assert refusal(recipe_file) == "recipe.yaml: not UTF-8 text at byte 6"

    def test_no_such_file_names_the_nearest(self, recipe_file: Path) -> None:
        assert refusal(Path("recipes.yaml")).startswith("recipes.yaml: no such recipe file (did you mean recipe.yaml?)")
        assert "there is no folder away" in refusal(Path("away/recipe.yaml"))
        assert refusal(Path(".")) == ".: a folder; expected a recipe file (YAML)"


class TestOverrides:
    def test_values_are_yaml(self, recipe_file: Path) -> None:
        recipe = load_recipe(
            recipe_file,
            [
                "signal.topk.k=8",
                "teacher.threads=null",
                "students.0.betas=[0.5, 0.6]",
                "ray.actors=2",
                "students.1.seed=7",
            ],
        )
        assert (topk_of(recipe).k, recipe.teacher.threads, recipe.ray.actors) == (8, None, 2)
        assert recipe.students[0].betas == (0.5, 0.6)
        assert recipe.students[1].seed == 7

    def test_the_last_word_wins_and_the_file_is_untouched(self, recipe_file: Path) -> None:
        assert topk_of(load_recipe(recipe_file, ["signal.topk.k=8", "signal.topk.k=9"])).k == 9
        assert topk_of(load_recipe(recipe_file)).k == 32

    def test_a_value_may_hold_an_equals_sign(self, recipe_file: Path) -> None:
        assert load_recipe(recipe_file, ["teacher.model=a=b"]).teacher.model == "a=b"

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("signal.topk.kk=3", "command line: unknown key signal.topk.kk (did you mean k?)"),
            ("signal.new.key=3", "command line: unknown key signal.new"),
            ("signal.topk.k=ten", 'command line: signal.topk.k: expected whole number, at least 1, got "ten"'),
            ("students.2.seed=1", "command line: students.2.seed=1: students has no item 2; its items are 0 to 1"),
            ("students.first.seed=1", "command line: students.first.seed=1: students has no item first"),
            ("signal.0=1", "command line: signal.0=1: signal is no list and has no item 0"),
            ("name.first=1", 'command line: name.first=1: name is "first" and has no key first'),
            ("signal.topk.k", "command line: signal.topk.k: expected key=value"),
            ("=3", "command line: =3: expected key=value"),
            ("signal..k=3", "command line: signal..k=3: expected key=value"),
            ("signal.topk.k={", "command line: signal.topk.k:1: not valid YAML"),
            ("signal={k: 1, k: 2}", "command line: signal:1: key k stands twice"),
        ],
    )
    def test_refused(self, recipe_file: Path, word: str, message: str) -> None:
        assert refusal(recipe_file, word).startswith(message)


class TestMix:
    WORDS = ("corpus.sources=[text.txt, {path: text.txt, name: other}]", "students.0.steps=9")

    def test_shares_of_sources_the_corpus_has(self, recipe_file: Path) -> None:
        mix = "students.0.mix={by: sampling, shares: {other: {from: 0.9, to: 0.5}}}"
        found = load_recipe(recipe_file, [*self.WORDS, mix]).students[0].mix
        assert found is not None
        assert (found.by, list(found.shares)) == ("sampling", ["other"])

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("mix={shares: {othre: 0.5}}", "students.0.mix.shares.othre: no source has this name; the corpus has text"),
            ("mix={shares: {other: 1.5}}", "students.0.mix: shares.other: must lie in 0 … 1, got 1.5"),
            ("mix={by: wieght, shares: {other: 1}}", "students.0.mix.by: expected weight or sampling, got "),
            ("mix={shares: {}}", "students.0.mix.shares: "),
        ],
    )  # fmt: skip
    def test_others_are_refused_before_anything_is_read(self, recipe_file: Path, word: str, message: str) -> None:
        with pytest.raises(RecipeError) as found:
            load_recipe(recipe_file, [*self.WORDS, f"students.0.{word}"])
        assert message in str(found.value)

    def test_two_sources_of_one_name_cannot_be_mixed(self, recipe_file: Path) -> None:
        words = ["corpus.sources=[text.txt, text.txt]", "students.0.mix={shares: {text: 0.5}}"]
        with pytest.raises(RecipeError, match="several sources are called text: give each a `name`"):
            load_recipe(recipe_file, words)


class TestFiles:
    def test_a_missing_source_names_the_nearest(self, recipe_file: Path) -> None:
        assert refusal(recipe_file, text=RECIPE.replace("text.txt", "txt.txt")) == (
            "recipe.yaml:6: corpus.sources.0.path: no such file or folder: txt.txt (did you mean text.txt?)"
        )

    def test_globs_folders_and_python_text(self, recipe_file: Path) -> None:
        for source in ("*.txt", ".", "python:pydoc_data"):
            assert load_recipe(recipe_file, [f'corpus.sources="{source}"']).corpus.sources[0].path == source
        assert "corpus.sources.1.path: no such" in refusal(recipe_file, "corpus.sources=[text.txt, '*.jsonl']")

    def test_a_model_by_path_must_be_there(self, recipe_file: Path) -> None:
        Path("models/tiny").mkdir(parents=True)
        assert load_recipe(recipe_file, ["teacher.model=models/tiny"]).teacher.model == "models/tiny"
        assert "did you mean models/tiny?" in refusal(recipe_file, "teacher.model=models/tinny")
        assert "teacher.model: no such" in refusal(recipe_file, "teacher.model=./tiny")
        assert "students.0.model.from: no such" in refusal(recipe_file, "students.0.model={from: /nowhere/model}")

    def test_a_hugging_face_id_is_taken_at_its_word(self, recipe_file: Path) -> None:
        assert load_recipe(recipe_file, ["teacher.model=HuggingFaceTB/SmolLM2-135M"]).teacher.model

    def test_a_recipe_whose_corpus_is_gone_can_still_be_read(self, recipe_file: Path) -> None:
        Path("text.txt").unlink()
        recipe = load_recipe(recipe_file, files=False)
        with pytest.raises(RecipeError, match=r"^corpus\.sources\.0\.path: no such file"):
            check_files(recipe)


class TestNotices:
    def test_none_within_the_advised_ranges(self, recipe_file: Path) -> None:
        assert notices(load_recipe(recipe_file)) == []

    @pytest.mark.parametrize(
        ("word", "named"),
        [
            ("students.1.losses.temperature=5", "student large: losses.temperature is 5: above 2, top-k"),
            ("students.1.losses.alpha=0.3", "student large: losses.alpha is 0.3; 0.5 … 0.9"),
            ("students.1.lr=1e-3", "student large: lr is 0.001; 1e-5 … 5e-5"),
            ("signal.topk.k=8", "signal.topk.k is 8"),
            ("signal.topk.gap_step=1/2", "signal.topk.gap_step is 0.5"),
            ("store.unit_tokens=100", "store.unit_tokens (100) is below teacher.batch_tokens (4096)"),
            ("teacher.trust_remote_code=true", "teacher.trust_remote_code is on"),
            ("students=[]", "the recipe has no students"),
        ],
    )
    def test_named(self, recipe_file: Path, word: str, named: str) -> None:
        lines = notices(load_recipe(recipe_file, [word]))
        assert len(lines) == 1
        assert lines[0].startswith(named)


class TestStarterAndReference:
    def test_every_field_is_documented(self) -> None:
        assert [path for path, info in fields_of(Recipe) if not meaning(info)] == []

    def test_reference_names_every_field(self) -> None:
        rows = {row["key"]: row for row in reference_rows()}
        assert rows["signal.topk.k"]["default"] == 64
        assert rows["teacher.model"]["required"]
        assert rows["students.0.model.from"]["type"] == "text or null"
        assert rows["teacher.dtype"]["type"] == "float32 | bfloat16 | float16"
        assert all(f"{key}  (" in reference_text() for key in rows)

    def test_the_starter_loads_and_says_every_field(self, recipe_file: Path) -> None:
        written = write_starter(Path("new.yaml"), "org/teacher", "text.txt")
        text = Path("new.yaml").read_text()
        assert load_recipe(Path("new.yaml")) == written
        assert written.teacher.model == "org/teacher"
        assert written.corpus.sources[0].path == "text.txt"
        assert [path for path, _ in fields_of(Recipe) if f" {path[-1]}:" not in text.replace("\n", "\n ")
                and path[-1] != "layers" and not below_null(path)] == []  # fmt: skip

    def test_its_commented_values_are_the_defaults(self, recipe_file: Path) -> None:
        """Every `# key: value` without its `#` gives the same recipe, but for the keys that exclude another."""
        written = write_starter(Path("new.yaml"), "org/teacher", "text.txt")
        keys = {path[-1] for path, _ in fields_of(Recipe)}
        lines = []
        for line in Path("new.yaml").read_text().splitlines():
            bare = line.replace("# ", "", 1)
            key, colon, _ = bare.strip().partition(": ")
            lines.append(bare if line.lstrip().startswith("#") and colon and key in keys else line)
        Path("full.yaml").write_text("\n".join(lines))
        assert "\n  dtype: " in Path("full.yaml").read_text()
        assert load_recipe(Path("full.yaml")) == written

    def test_half_of_the_teachers_layers(self, recipe_file: Path) -> None:
        Path("teacher").mkdir()
        Path("teacher/config.json").write_text('{"num_hidden_layers": 6}')
        written = write_starter(Path("new.yaml"), "./teacher", "text.txt")
        assert written.students[0].model.cut is not None
        assert written.students[0].model.cut.layers == 3

    @pytest.mark.parametrize("corpus", ["no: #text.txt", "it's.txt", "{x}.txt", " - a.txt"])
    def test_odd_names_are_quoted(self, recipe_file: Path, corpus: str) -> None:
        Path(corpus).parent.mkdir(exist_ok=True)
        Path(corpus).write_text("x")
        if ":" in corpus.split("/")[0]:
            corpus = f"./{corpus}"
        assert write_starter(Path("new.yaml"), "org/teacher", corpus).corpus.sources[0].path == corpus

    def test_refuses_to_overwrite(self, recipe_file: Path) -> None:
        before = recipe_file.read_text()
        with pytest.raises(UsageError, match=r"^recipe.yaml exists; --force"):
            write_starter(recipe_file, "org/teacher", "text.txt")
        assert recipe_file.read_text() == before
        write_starter(recipe_file, "org/teacher", "text.txt", force=True)
        assert recipe_file.read_text() != before

    def test_refuses_what_is_not_there(self, recipe_file: Path) -> None:
        with pytest.raises(UsageError, match=r"^CORPUS: no such file or folder: text.tx \(did you mean text.txt\?\)"):
            write_starter(Path("new.yaml"), "org/teacher", "text.tx")
        with pytest.raises(UsageError, match=r"^MODEL: no such"):
            write_starter(Path("new.yaml"), "./teacher", "text.txt")
        assert not Path("new.yaml").exists()
