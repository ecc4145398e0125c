"""Downstream tasks: what of the harness's results is kept, and a local task run by the real harness, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline import harness
from stillroom.pipeline.console import Console
from stillroom.pipeline.harness import held_tasks, metrics_of, request_of, require_lm_eval, shown, tasks_of
from stillroom.pipeline.recipe.files import check_files
from stillroom.pipeline.recipe.schema import LmEvalConfig, Recipe
from stillroom.storage.errors import RecipeError, StillroomError
from tests.tiny import tiny_teacher

DOCUMENTS = [
    {"words": "the still drips into a clear", "ends": ["glass", "cellar", "book"], "right": 0},
    {"words": "jars of thyme mint rose and", "ends": ["copper", "anise", "water"], "right": 1},
    {"words": "written down in the book of", "ends": ["drop", "rose", "waters"], "right": 2},
    {"words": "the cellar keeps its", "ends": ["jars", "still"], "right": 0},
]
TASK = """task: stills
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: words
doc_to_choice: ends
doc_to_target: right
metric_list:
  - metric: acc
"""


def recipe_of(folder: Path, **lm_eval: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "downstream", "run_dir": str(folder / "run"), "teacher": {"model": str(folder / "model")},
            "corpus": {"sources": [{"path": str(folder / "text.txt")}]},
            "evaluate": {"lm_eval": {"tasks": ["stills"], "include_path": str(folder / "tasks"), **lm_eval}},
        }
    )  # fmt: skip


@torch.no_grad()
def accuracy(folder: Path, documents: list[dict[str, Any]]) -> float:
    """Share of documents whose right end has the highest log-probability: what the harness counts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for document in documents:
        start, scores = len(tokenizer(document["words"])["input_ids"]), []
        for end in document["ends"]:
            ids = torch.tensor(tokenizer(f"{document['words']} {end}")["input_ids"])
            log_p_TV = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            scores.append(float(log_p_TV[start - 1 : -1].gather(-1, ids[start:, None]).sum()))
        right += scores.index(max(scores)) == document["right"]
    return right / len(documents)


def test_numbers_are_kept_without_standard_errors() -> None:
    results: dict[str, dict[str, Any]] = {
        "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc_norm,none": 0.5, "sample_len": 4},
        "gsm": {"alias": "gsm", "exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.1},
        "group": {"alias": "group"},
    }
    found = metrics_of(results)
    assert found == {
        "arc": {"acc": 0.25, "acc_norm": 0.5}, "gsm": {"exact_match (strict-match)": 0.0}, "group": {},
    }  # fmt: skip
    models: list[dict[str, Any]] = [{"name": "teacher"}, {"name": "s", "lm_eval": found}]
    assert shown(models) == [("arc", "acc_norm"), ("gsm", "exact_match (strict-match)")]
    assert shown([{"name": "s"}]) == []


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(StillroomError, match=r"pip install 'stillroom\[lm-eval\]'"):
        require_lm_eval()


def test_a_folder_of_tasks_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    tiny_teacher(tmp_path / "model")
    with pytest.raises(RecipeError, match=r"evaluate\.lm_eval\.include_path: no such file or folder"):
        check_files(recipe_of(tmp_path))


@pytest.mark.real
@pytest.mark.slow
def test_a_local_task_is_measured_as_the_model_answers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    folder, tasks = tiny_teacher(tmp_path / "model"), tmp_path / "tasks"
    tasks.mkdir()
    data = tasks / "stills.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tasks / "stills.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for limit in (None, 3):
        recipe = recipe_of(tmp_path, limit=limit)
        asked = recipe.evaluate.lm_eval
        assert asked is not None
        found = tasks_of(recipe, asked, folder, "small", Console())
        assert found == {"stills": {"acc": pytest.approx(accuracy(folder, DOCUMENTS[:limit]))}}
        assert held_tasks(recipe, asked, folder, "small") == found, "not measured again"
    other = LmEvalConfig.model_validate({"tasks": ["none_such"]})
    assert held_tasks(recipe, other, folder, "small") is None
    assert request_of(recipe, other, folder, "small")["include"] == {}
    with pytest.raises(StillroomError, match=r"small in .* failed: the harness \S+ has no task none_such"):
        tasks_of(recipe, other, folder, "small", Console())
