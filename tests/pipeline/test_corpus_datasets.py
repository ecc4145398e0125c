"""Datasets that the real `datasets` library saved on disk, read without it."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.storage.errors import RecipeError
from tests.pipeline.corpora import counts, ingested, learned, texts
from tests.tiny import tiny_tokenizer

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


def test_dataset_in_several_files_after_a_shuffle(tokenizer: Any, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": [f"jar {i}" for i in range(40)], "n": list(range(40))})
    shuffled = dataset.shuffle(seed=1).select(range(30))
    shuffled.save_to_disk(tmp_path / "saved", num_shards=3)
    manifest = ingested(tokenizer, tmp_path, "saved", append_eos=False)
    assert texts(tokenizer, manifest) == list(shuffled["text"])
    assert manifest.rows([29])[0].source == "saved/data-00002-of-00003.arrow"
    assert counts(manifest).passed_files == 0


def test_dataset_of_conversations(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "which jar?"}, {"role": "assistant", "content": "the mint"}]
    datasets.Dataset.from_dict({"messages": [turns, turns[:1]]}).save_to_disk(tmp_path / "saved")
    manifest = ingested(tokenizer, tmp_path, "saved")
    assert counts(manifest).forms == {"chat": 2}
    assert [learned(tokenizer, row) for row in manifest] == ["the mint<|end|>\n", ""]


def test_dataset_dict_by_split(tokenizer: Any, tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(RecipeError, match=r"splits train, test: say which to read, for example `splits: \[train\]`"):
        ingested(tokenizer, tmp_path, "saved")
    with pytest.raises(RecipeError, match="no split dev: it has train, test"):
        ingested(tokenizer, tmp_path, {"path": "saved", "splits": ["dev"]})
    both = ingested(tokenizer, tmp_path, {"path": "saved", "splits": ["test", "train"]}, append_eos=False)
    assert texts(tokenizer, both) == ["test", "train"]
    assert texts(tokenizer, ingested(tokenizer, tmp_path, "saved/train", append_eos=False)) == ["train"]


def test_dataset_dict_of_one_split_needs_no_choice(tokenizer: Any, tmp_path: Path) -> None:
    datasets.DatasetDict({"only": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "saved")
    assert counts(ingested(tokenizer, tmp_path, "saved")).documents == 1


def test_an_incomplete_dataset_is_named(tokenizer: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(RecipeError, match=r"saved is an incomplete dataset: .*data-00001-of-00002\.arrow"):
        ingested(tokenizer, tmp_path, "saved")


def test_a_cut_arrow_file_is_a_bad_line(tokenizer: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["jar"] * 3000}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.9)])
    found = counts(ingested(tokenizer, tmp_path, "saved"))
    assert found.bad_lines == 1
    assert found.documents == 2000
    assert "cannot be read from this row on" in found.bad_examples[0]
