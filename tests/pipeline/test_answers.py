"""Students' answers beside the teacher's: likeness against its definitions, which prompts are asked, and how."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.answers import Question, compared, questions, request
from stillroom.pipeline.prompts import texts_path
from stillroom.pipeline.quality.likeness import likeness, require_installed, rouge_l
from stillroom.storage.errors import RecipeError, StillroomError
from stillroom.storage.generations.records import Generation
from stillroom.storage.manifest import Manifest
from tests.e2e.runs import Setup, sentences
from tests.pipeline.corpora import ingested, write_jsonl
from tests.pipeline.generations import kept_by_hand
from tests.pipeline.test_generate import prompts_of
from tests.tiny import tiny_tokenizer

WORDS = ("thyme", "mint", "rose", "anise", "sage", "the still", "copper", "glass")


def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def bleu(answers: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of plain words as Papineni et al. 2002 define it, without smoothing: every order must have a match."""
    matched, total, length, closest = [0] * 4, [0] * 4, 0, 0
    for answer, told in zip(answers, references, strict=True):
        words, sides = answer.split(), [r.split() for r in told]
        length += len(words)
        closest += min((abs(len(s) - len(words)), len(s)) for s in sides)[1]
        for n in range(1, 5):
            most: Counter[tuple[str, ...]] = Counter()
            for side in sides:
                most |= grams(side, n)
            matched[n - 1] += (grams(words, n) & most).total()
            total[n - 1] += grams(words, n).total()
    precision = sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4
    return 100 * math.exp(min(0.0, 1 - closest / length) + precision)


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


class TestLikeness:
    ANSWERS = ("the still drips into a clear glass", "copper cools while the cellar keeps its jars")
    REFERENCES = (
        ["the still drips into a jar of glass", "a still drips into a clear glass tonight"],
        ["the copper cools while the cellar keeps jars"],
    )

    def test_is_as_defined(self) -> None:
        found = likeness(self.ANSWERS, self.REFERENCES)
        assert found.bleu == pytest.approx(bleu(list(self.ANSWERS), list(self.REFERENCES)), rel=1e-6)
        expected = []
        for answer, told in zip(self.ANSWERS, self.REFERENCES, strict=True):
            words = answer.split()
            expected.append(max(2 * longest_common(words, r.split()) / (len(words) + len(r.split())) for r in told))
        assert found.rouge_l == pytest.approx(sum(expected) / 2)
        assert found.bleu_signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")

    def test_of_equal_texts_is_whole_and_of_none_is_nothing(self) -> None:
        same = likeness(self.ANSWERS, [[answer] for answer in self.ANSWERS])
        assert (round(same.bleu, 6), same.rouge_l) == (100.0, 1.0)
        assert "nrefs:1|" in same.bleu_signature
        other = likeness(["", "anise"], [["rose"], ["mint"]])
        assert other.bleu < 1e-6
        assert other.rouge_l == 0.0

    def test_without_the_packages_says_which_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        require_installed()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else object())
        with pytest.raises(StillroomError, match=r"needs sacrebleu, not installed here.*stillroom\[answers\]"):
            require_installed()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path / "tokenizer")


def generations(folder: Path, tokenizer: Any) -> list[Generation]:
    """Of eight prompts, two kept responses each, with the prompts' texts beside them."""
    found = kept_by_hand(folder, tokenizer, WORDS)
    manifest = prompts_of(tokenizer, folder, [{"prompt": word} for word in WORDS])
    texts_path(manifest.path).replace(folder / "prompts.texts.parquet")
    return found


def corpus(tokenizer: Any, folder: Path, *more: Any, **settings: Any) -> Manifest:
    return ingested(tokenizer, folder, [f"generations:{folder / 'verdicts.parquet'}", *more], window=200, **settings)


class TestQuestions:
    def test_are_the_held_out_prompts_as_they_were_asked(self, tokenizer: Any, tmp_path: Path) -> None:
        found = generations(tmp_path, tokenizer)
        manifest = corpus(tokenizer, tmp_path, heldout=0.5)
        asked = questions(manifest, tokenizer, 9)
        trained = {row.sequence.digest for row in manifest if not row.heldout}
        kept = {g.prompt: g for g in found if g.sequence.digest not in trained}
        assert 2 <= len(asked) < len(WORDS)
        assert [q.prompt for q in asked] == sorted(kept)
        for question in asked:
            assert list(question.ids) == kept[question.prompt].prompt_ids.tolist()
            assert question.text in WORDS
            assert question.references == ("mint and rose", "int and rose")
            assert not question.retokenised
        assert questions(manifest, tokenizer, 1) == asked[:1]

    def test_do_not_depend_on_what_a_limit_cut_off(self, tokenizer: Any, tmp_path: Path) -> None:
        generations(tmp_path, tokenizer)
        asked = questions(corpus(tokenizer, tmp_path, heldout=0.5), tokenizer, 9)
        cut = corpus(tokenizer, tmp_path, heldout=0.5, limit_documents=12)
        assert questions(cut, tokenizer, 9) == asked

    def test_another_tokenizer_is_asked_the_text(self, tokenizer: Any, tmp_path: Path) -> None:
        generations(tmp_path, tokenizer)
        other = tiny_tokenizer(tmp_path / "other", vocabulary=300)
        asked = questions(corpus(other, tmp_path, heldout=0.5), other, 9)
        assert all(question.retokenised for question in asked)
        for question in asked:
            said = other.decode(list(question.ids))
            assert said == f"<|start|>user\n{question.text}<|end|>\n<|start|>assistant\n"
        plain = questions(corpus(other, tmp_path, heldout=0.5, pairs_as="plain"), other, 9)
        assert [other.decode(list(question.ids)) for question in plain] == [question.text for question in plain]

    def test_of_a_corpus_without_generations_there_are_none(self, tokenizer: Any, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "x.jsonl", [{"text": f"{n} of thyme"} for n in range(9)])
        assert questions(ingested(tokenizer, tmp_path, ["x.jsonl"], heldout=0.5), tokenizer, 9) == []


class TestCompared:
    ASKED = (
        Question("p1", "say rose", (5, 6), ("a red rose", "one rose"), ("#",), False),
        Question("p2", "say mint", (7,), ("green mint",), (), False),
        Question("p3", "too long", (8,), ("thyme",), (), False),
    )

    def test_what_the_student_is_told(self) -> None:
        assert request(self.ASKED, max_tokens=4) == {"prompts": [[5, 6], [7], [8]], "max_tokens": 4, "stop": ["#"]}

    def test_the_file_holds_both_sides(self, tmp_path: Path) -> None:
        given = [
            {"text": "a rose", "tokens": 3, "ended": True}, {"text": "mint", "tokens": 4, "ended": False}, None,
        ]  # fmt: skip
        found = compared(self.ASKED, given, tmp_path, "small")
        assert found is not None
        lines = [json.loads(line) for line in (tmp_path / found["file"]).read_text().splitlines()]
        assert [(line["said"], line["student"], line["teacher"]) for line in lines] == [
            ("say rose", "a rose", ["a red rose", "one rose"]), ("say mint", "mint", ["green mint"]),
        ]  # fmt: skip
        expected = likeness(["a rose", "mint"], [["a red rose", "one rose"], ["green mint"]])
        assert found == {
            "prompts": 2, "references": 3, "left_out": 1, "ended": 0.5, **expected.as_dict(),
            "file": "answers/small.jsonl",
        }  # fmt: skip
        assert [line["rouge_l"] for line in lines] == [
            rouge_l("a rose", ["a red rose"]),
            rouge_l("mint", ["green mint"]),
        ]

    def test_of_no_answer_there_is_nothing(self, tmp_path: Path) -> None:
        assert compared(self.ASKED[:1], [None], tmp_path, "small") is None


class TestRecipe:
    def section(self, tmp_path: Path) -> dict[str, Any]:
        return {"prompts": [str(write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "mint"}]))]}

    @pytest.mark.parametrize(
        ("over", "what"),
        [
            ({}, "no teacher responses to compare with: the recipe has no generate section"),
            ({"generate": True}, "no teacher responses to compare with: corpus.sources has no generations"),
            ({"generate": True, "corpus__sources": ["generations"], "corpus__heldout": 0.0}, "corpus.heldout is 0"),
            (
                {"generate": True, "corpus__sources": ["generations"], "evaluate__answers": {"prompts": 0}},
                "evaluate.answers.prompts: expected at least 1, got 0",
            ),
        ],
    )
    def test_refuses_answers_to_nothing(self, tmp_path: Path, over: dict[str, Any], what: str) -> None:
        section = {"generate": self.section(tmp_path)} if over.pop("generate", False) else {}
        setup = Setup.make(tmp_path, sentences(1, 2), **({"evaluate__answers": {"prompts": 4}} | section | over))
        with pytest.raises(RecipeError, match=what):
            setup.recipe()

    def test_takes_the_generations_of_another_recipe(self, tmp_path: Path) -> None:
        source = "generations:runs/other/verdicts.parquet"
        setup = Setup.make(tmp_path, sentences(1, 2), corpus__sources=[source], evaluate__answers={"prompts": 4})
        assert setup.recipe().evaluate.answers is not None

    def test_a_quantised_teacher_is_not_generated_from_unsaid(self, tmp_path: Path) -> None:
        setup = Setup.make(tmp_path, sentences(1, 2), generate=self.section(tmp_path), teacher__quantisation="int8")
        with pytest.raises(RecipeError, match=r"teacher\.quantisation is int8.*generate\.engine\.quantization"):
            setup.recipe()
        assert setup.recipe("generate.engine.quantization=fp8").teacher.quantisation == "int8"
