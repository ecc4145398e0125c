"""Prompts, the recipe's section, and generations as a corpus: all that needs no engine."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.prompt_counts import REPEATED, PromptCounts
from stillroom.pipeline.generate import _payloads, _plan, _prompts, generate, generation_identity
from stillroom.pipeline.prompts import ingest_prompts, read_texts
from stillroom.pipeline.recipe import load_recipe
from stillroom.pipeline.recipe.generate_schema import GenerateConfig
from stillroom.pipeline.sources import Sources
from stillroom.storage.errors import CorpusError, IdentityMismatch, RecipeError, StoreError, TeacherError
from stillroom.storage.generations.store import create_generations
from stillroom.storage.manifest import Manifest
from stillroom.workers.generator import GeneratorSpec
from tests.e2e.runs import Setup, sentences
from tests.pipeline.corpora import counts, ingested, write_jsonl
from tests.pipeline.generations import kept_by_hand
from tests.storage.generations.builders import UNITS, identity, put
from tests.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path / "tokenizer")


def prompts_of(tokenizer: Any, folder: Path, records: list[Any], window: int | None = 200, **over: Any) -> Manifest:
    write_jsonl(folder / "prompts.jsonl", records)
    config = GenerateConfig.model_validate({"prompts": "prompts.jsonl", "decoding": {"max_tokens": 20}} | over)
    corpus = CorpusConfig(sources="unread")  # type: ignore[arg-type]
    return ingest_prompts(config, corpus, tokenizer, window=window, out=folder / "p.parquet", root=folder)[0]


def asked(tokenizer: Any, manifest: Manifest) -> list[str]:
    return [tokenizer.decode(row.sequence.input_ids.tolist()) for row in manifest]


class TestPrompts:
    def test_go_through_the_template_opened_for_the_answer(self, tokenizer: Any, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "mint"}, {"role": "assistant", "content": "rose"}]
        records = [{"prompt": "the still"}, {"messages": turns}, {"messages": turns[:1]}, {"text": "a text"}]
        manifest = prompts_of(tokenizer, tmp_path, records, system="be brief")
        head = "<|start|>system\nbe brief<|end|>\n<|start|>user\n"
        tail = "<|end|>\n<|start|>assistant\n"
        assert asked(tokenizer, manifest) == [f"{head}{said}{tail}" for said in ("the still", "mint", "mint", "a text")]
        assert {row.trained for row in manifest} == {0}
        texts = read_texts(manifest.path)
        assert [texts[row.sequence.digest].reference for row in manifest] == [None, "rose", "rose", None]
        assert manifest.meta.counts["duplicates"] == 1

    def test_plain_ones_are_as_they_are(self, tokenizer: Any, tmp_path: Path) -> None:
        manifest = prompts_of(tokenizer, tmp_path, [{"prompt": "the still "}], prompts_as="plain")
        assert asked(tokenizer, manifest) == ["the still "]

    def test_what_cannot_be_asked_is_named(self, tokenizer: Any, tmp_path: Path) -> None:
        records = [{"prompt": "  "}, {"prompt": "copper " * 90}, {"prompt": 3}, "{", {"prompt": "mint"}]
        manifest = prompts_of(tokenizer, tmp_path, records, window=120)
        examples = manifest.meta.counts["bad_examples"]
        assert len(manifest) == 1
        assert [e.split(": ", 1)[0] for e in examples] == [f"prompts.jsonl:{n}" for n in (1, 3, 4, 2)]
        assert "empty" in examples[0]
        assert "do not fit in 120" in examples[3]
        assert PromptCounts(**manifest.meta.counts).notices() == [
            f"1 left out ({kind}), the first is {example}"
            for kind, example in zip(("empty", "without a prompt", "unreadable", "too long"), examples, strict=True)
        ]
        for number, what in ((0, "empty"), (1, "fit"), (2, "no text"), (3, "JSON")):
            with pytest.raises(CorpusError, match=what):
                prompts_of(tokenizer, tmp_path, [records[number]], window=120, strict=True)
        with pytest.raises(CorpusError, match="no prompt in"):
            prompts_of(tokenizer, tmp_path, records[:2], window=120)

    def test_one_of_each_kind_is_shown_with_how_many_there_are(self, tokenizer: Any, tmp_path: Path) -> None:
        records = [*[{"prompt": " "}] * 30, {"prompt": "mint"}, {"prompt": "copper " * 90}, {"prompt": "rose"},
                   *[{"prompt": "mint"}] * 2, {"prompt": "copper " * 80}]  # fmt: skip
        counts = prompts_of(tokenizer, tmp_path, records, window=120).meta.counts
        assert [(entry["kind"], entry["prompts"], entry["example"][:16]) for entry in counts["left_out"]] == [
            ("empty", 30, "prompts.jsonl:1:"), ("too long", 2, "prompts.jsonl:32"), (REPEATED, 2, "prompts.jsonl:34"),
        ]  # fmt: skip
        said = PromptCounts(**counts).notices()
        assert said[2].endswith("and are answered once, the first is prompts.jsonl:34, as prompts.jsonl:31")
        assert (counts["bad"], len(counts["bad_examples"])) == (32, 20)

    def test_counts_of_an_earlier_release_are_read(self) -> None:
        old = PromptCounts(bad=1, bad_examples=["a:1: empty"]).as_dict()
        del old["left_out"]
        assert PromptCounts(**old).notices() == []

    def test_are_read_again_only_if_something_changed(self, tokenizer: Any, tmp_path: Path) -> None:
        first = prompts_of(tokenizer, tmp_path, [{"prompt": "mint"}]).path.stat().st_mtime_ns
        config = GenerateConfig.model_validate({"prompts": "prompts.jsonl", "decoding": {"max_tokens": 20}})
        corpus = CorpusConfig(sources="unread")  # type: ignore[arg-type]
        for window, read in ((200, False), (201, True)):
            _, _, again = ingest_prompts(
                config, corpus, tokenizer, window=window, out=tmp_path / "p.parquet", root=tmp_path
            )
            assert again is read
        assert (tmp_path / "p.parquet").stat().st_mtime_ns != first

    def test_documents_are_continued_from_random_stretches(self, tokenizer: Any, tmp_path: Path) -> None:
        documents = ["the still drips into a clear glass while the copper cools " * 4, "mint"]
        source = {"path": "prompts.jsonl", "continue_tokens": [5, 9], "continuations": 3}
        records = [{"text": d} for d in documents]
        manifest = prompts_of(tokenizer, tmp_path, records, prompts=[source])
        first = [row.sequence.input_ids.tolist() for row in manifest]
        whole = tokenizer(documents[0])["input_ids"]
        assert len(first) == 3
        assert all(5 <= len(ids) <= 9 for ids in first)
        assert all(any(whole[at : at + len(ids)] == ids for at in range(len(whole))) for ids in first)
        assert "shorter than continue_tokens" in manifest.meta.counts["bad_examples"][0]
        again = prompts_of(tokenizer, tmp_path, records[::-1], prompts=[source])
        assert sorted(row.sequence.digest for row in again) == sorted(row.sequence.digest for row in manifest)
        other = prompts_of(tokenizer, tmp_path, records, prompts=[source], decoding={"max_tokens": 20, "seed": 1})
        assert [row.sequence.input_ids.tolist() for row in other] != first

    def test_stop_at_a_limit(self, tokenizer: Any, tmp_path: Path) -> None:
        manifest = prompts_of(tokenizer, tmp_path, [{"prompt": w} for w in ("a", "b", "c")], limit_prompts=2)
        assert len(manifest) == 2


class TestRecipe:
    @pytest.mark.parametrize(
        ("section", "what"),
        [
            ({"decoding": {"method": "greedy", "n": 2}}, "greedy gives one response"),
            ({"decoding": {"method": "beam", "n": 5}}, "at least n beams"),
            ({"decoding": {"method": "beam", "stop": ["a"]}}, "knows neither stop"),
            ({"decoding": {"min_tokens": 9, "max_tokens": 8}}, "at most max_tokens"),
            ({"quality": {"best_by": "score"}}, "need a function"),
            ({"quality": {"function": "no_name"}}, "module:name"),
            ({"engine": {"tensor_parallel_size": 2}}, r"ray\.gpus_per_actor"),
            ({"path": "same"}, "a folder of its own"),
        ],
    )
    def test_refuses_what_cannot_be(self, tmp_path: Path, section: dict[str, Any], what: str) -> None:
        setup = Setup.make(tmp_path, sentences(1, 2), generate={"prompts": ["x"]} | section, store__path="same")
        with pytest.raises(RecipeError, match=what):
            setup.recipe()

    def test_what_a_method_does_not_use_is_no_part_of_it(self) -> None:
        def decoding(**over: Any) -> Any:
            return GenerateConfig.model_validate({"prompts": "x", "decoding": over}).decoding.spec()

        assert decoding(method="greedy", temperature=0.1, seed=3) == decoding(method="greedy")
        assert decoding(method="sample", beams=9) == decoding(method="sample")
        assert decoding(method="sample", seed=3) != decoding(method="sample")

    def test_the_source_generations_needs_the_section(self, tmp_path: Path) -> None:
        setup = Setup.make(tmp_path, sentences(1, 2), corpus__sources=["generations"])
        with pytest.raises(RecipeError, match="no generate section"):
            setup.recipe()


class TestBeforeTheEngine:
    @pytest.fixture
    def setup(self, tmp_path: Path) -> Setup:
        write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "mint"}])
        section = {"prompts": [str(tmp_path / "prompts.jsonl")], "decoding": {"max_tokens": 8}}
        return Setup.make(tmp_path / "run", sentences(1, 2), generate=section)

    def test_a_store_that_cannot_be_written(self, setup: Setup, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        recipe = setup.recipe(f"generate.path={tmp_path / 'file' / 'store'}")
        with pytest.raises(StoreError, match="cannot write"):
            generate(recipe, Sources(recipe, Console(quiet=True)), Console(quiet=True))

    def test_a_window_beyond_the_models(self, setup: Setup) -> None:
        recipe = setup.recipe("generate.engine.max_model_len=100000")
        with pytest.raises(RecipeError, match="positions end at 256"):
            generate(recipe, Sources(recipe, Console(quiet=True)), Console(quiet=True))

    def test_a_window_that_a_response_fills(self, setup: Setup) -> None:
        recipe = setup.recipe("generate.engine.max_model_len=8")
        with pytest.raises(CorpusError, match="up to 8 of a response do not fit in 8"):
            generate(recipe, Sources(recipe, Console(quiet=True)), Console(quiet=True))

    def test_the_requests_are_the_same_for_any_number_of_actors(self, tmp_path: Path) -> None:
        """Units, prompts, and with them the seeds, which are of a prompt and a sample's number."""
        write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n} jars"} for n in range(20)])
        section = {"prompts": [str(tmp_path / "prompts.jsonl")], "decoding": {"max_tokens": 8}, "unit_tokens": 100}
        setup = Setup.make(tmp_path / "run", sentences(1, 2), generate=section)
        asked = []
        for number, actors in enumerate((1, 2, 5)):
            recipe = setup.recipe(f"ray.actors={actors}", f"run_dir={tmp_path / str(number)}")
            assert recipe.generate is not None
            sources = Sources(recipe, Console(quiet=True))
            manifest, _ = _prompts(recipe, recipe.generate, sources, Console(quiet=True))
            store = create_generations(recipe.generate.path, generation_identity(recipe, recipe.generate, sources))
            payloads = list(_payloads(_plan(recipe.generate, manifest, store, save=True), manifest))
            seeds = [store.identity.decoding.sample_seed(s.digest, 0) for _, prompts, _ in payloads for s in prompts]
            asked.append(([unit.id for unit, _, _ in payloads], seeds))
        assert len(asked[0][0]) > 5
        assert len(set(asked[0][1])) == 20
        assert asked[0] == asked[1] == asked[2]

    def test_settings_that_vllm_refuses_found_no_store(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real refusal: tests/e2e/test_generate.py."""

        def refuse(spec: GeneratorSpec) -> None:
            raise RecipeError(f"not {spec.quantization}")

        monkeypatch.setattr("stillroom.pipeline.generate.require_settings", refuse)
        recipe = setup.recipe("generate.engine.quantization=mint")
        assert recipe.generate is not None
        with pytest.raises(RecipeError, match="not mint"):
            generate(recipe, Sources(recipe, Console(quiet=True)), Console(quiet=True))
        assert not Path(recipe.generate.path).exists()

    def test_a_store_with_nothing_in_it_may_be_removed(self, setup: Setup) -> None:
        recipe = setup.recipe()
        assert recipe.generate is not None
        store = create_generations(recipe.generate.path, identity())
        quiet = Console(quiet=True)
        with pytest.raises(IdentityMismatch, match=r"Nothing is in it yet: removing that folder does as well\.$"):
            generate(recipe, Sources(recipe, quiet), quiet)
        put(store, UNITS[0])
        with pytest.raises(IdentityMismatch, match=r"path of their own\.$"):
            generate(recipe, Sources(recipe, quiet), quiet)

    def test_no_vllm_says_which_extra(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        recipe = setup.recipe()
        with pytest.raises(TeacherError, match=r"stillroom\[vllm\]"):
            generate(recipe, Sources(recipe, Console(quiet=True)), Console(quiet=True))


class TestCorpus:
    """Of `kept_by_hand`, with ids that no tokenizer would make of their text."""

    def test_ids_are_carried(self, tokenizer: Any, tmp_path: Path) -> None:
        found = kept_by_hand(tmp_path, tokenizer)
        manifest = ingested(tokenizer, tmp_path, [{"path": "generations:verdicts.parquet", "weight": 0.25}], window=200)
        rows = list(manifest)
        assert [row.sequence.digest for row in rows] == [g.sequence.digest for g in found]
        for number, (row, generation) in enumerate(zip(rows, found, strict=True), 1):
            assert row.mask.tolist() == [False] * len(generation.prompt_ids) + [True] * len(generation.response_ids)
            assert (row.weight, row.source, row.line) == (0.25, "generations:verdicts.parquet", number)
        spelt = tokenizer(found[0].text, add_special_tokens=False)["input_ids"]
        assert len(spelt) < len(found[0].response_ids) - 1  # else this shows nothing
        assert counts(manifest).retokenised_documents == 0

    def test_all_responses_to_a_prompt_are_on_one_side(self, tokenizer: Any, tmp_path: Path) -> None:
        kept_by_hand(tmp_path, tokenizer)
        for seed in range(4):
            text = {"path": "x.jsonl"}
            write_jsonl(tmp_path / "x.jsonl", [{"text": f"{n} of thyme"} for n in range(9)])
            sources = ["generations:verdicts.parquet", text]
            manifest = ingested(tokenizer, tmp_path, sources, window=200, heldout=0.5, split_seed=seed)
            assert len({row.heldout for row in manifest if row.source.startswith("generations")}) == 1

    def test_another_tokenizer_takes_the_text(self, tokenizer: Any, tmp_path: Path) -> None:
        kept_by_hand(tmp_path, tokenizer)
        manifest = prompts_of(tokenizer, tmp_path, [{"prompt": "thyme"}])
        manifest.path.with_suffix(".texts.parquet").replace(tmp_path / "prompts.texts.parquet")
        other = tiny_tokenizer(tmp_path / "other", vocabulary=300)
        corpus = ingested(other, tmp_path, ["generations:verdicts.parquet"], window=200)
        said = [other.decode(row.sequence.input_ids[row.mask].tolist()) for row in corpus]
        assert said == ["mint and rose<|end|>\n", "int and rose<|end|>\n"]
        assert counts(corpus).retokenised_documents == 2
        assert any("another tokenizer" in notice for notice in counts(corpus).notices())

    def test_other_generations_by_now_are_told(self, tokenizer: Any, tmp_path: Path) -> None:
        kept_by_hand(tmp_path, tokenizer)
        moved = tmp_path / "generations"
        moved.rename(tmp_path / "before")
        create_generations(str(moved), identity(dtype="bfloat16"))
        with pytest.raises(IdentityMismatch, match="generate` again"):
            ingested(tokenizer, tmp_path, ["generations:verdicts.parquet"])

    def test_none_yet_is_told(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="not there yet"):
            ingested(tokenizer, tmp_path, ["generations:verdicts.parquet"])


def test_the_resolved_recipe_loads_as_the_same(tmp_path: Path) -> None:
    there = {"prompts": [str(write_jsonl(tmp_path / "prompts.jsonl", []))]}
    setup = Setup.make(tmp_path, sentences(1, 2), generate=there, corpus__sources=["generations"])
    recipe = setup.recipe()
    assert recipe.corpus.sources[0].path == f"generations:{recipe.run_dir / 'verdicts.parquet'}"
    again = type(recipe).model_validate(json.loads(recipe.model_dump_json(by_alias=True)))
    assert again == recipe


def test_prompts_that_are_not_there_are_told_with_their_place(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, sentences(1, 2), generate={"prompts": [str(tmp_path / "corpus.jsno")]})
    with pytest.raises(RecipeError, match=r"generate\.prompts\.0\.path: no such file.*did you mean .*corpus\.jsonl"):
        load_recipe(setup.folder / "recipe.yaml")
