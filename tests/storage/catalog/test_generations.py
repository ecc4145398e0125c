"""`ls` and `inspect` of stores of generations, beside those of signal; in a folder and in a bucket."""

import json
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.cli import main
from stillroom.storage.care.gc import collect_garbage
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog import generations
from stillroom.storage.catalog.generations import engine_in_words, generation_rows, inspect_generations
from stillroom.storage.catalog.stores import list_stores, problem_rows, reuse_rows, table_rows
from stillroom.storage.catalog.tables import scaled
from stillroom.storage.catalog.views import TokenRow, write_token_table
from stillroom.storage.errors import CorruptShard, NoStore, StoreError
from stillroom.storage.generations.store import GenerationStore, create_generations
from tests.s3_server import BUCKET, S3Server
from tests.storage.catalog.widths import width
from tests.storage.generations.builders import UNITS, decoding, filled, identity, put, unit_of
from tests.strategies import random_sequences, tiny_store


@pytest.fixture
def store(tmp_path: Path) -> GenerationStore:
    return filled(str(tmp_path / "root" / "said"))


@pytest.fixture
def root(store: GenerationStore) -> str:
    return str(Path(store.uri).parent)


class TestList:
    def test_kinds_stand_side_by_side(self, store: GenerationStore, root: str) -> None:
        tiny_store(Path(root) / "b", random_sequences(np.random.default_rng(1), 3))
        signal, said = list_stores(root)
        assert (signal["kind"], said["kind"]) == ("signal", "generations")
        assert [row["store"] for row in table_rows([signal, said], root)] == ["b"]
        assert reuse_rows([signal, said], root) == problem_rows([signal, said], root) == []
        (row,) = generation_rows([signal, said], root)
        assert row.pop("decoding").replace("\n", " ") == "sampled, n = 2, T = 1, seed 0, up to 8 tokens"
        assert row == {
            "store": "said", "teacher": "made up float32", "engine": "vllm 0.1, cpu", "units": "2", "prompts": "3",
            "responses": "6", "tokens": "15", "size": f"{scaled(said['bytes'])}B",
        }  # fmt: skip
        assert list_stores(store.uri) == [said]
        assert generation_rows([said], store.uri)[0]["store"] == "."

    def test_an_empty_one_has_no_engine(self, tmp_path: Path) -> None:
        create_generations(str(tmp_path / "s"), identity())
        (found,) = list_stores(str(tmp_path))
        assert (found["units"], found["tokens"], found["bytes_per_token"], found["engine"]) == (0, 0, None, None)
        assert generation_rows([found], str(tmp_path))[0]["engine"] == "–"

    def test_a_lost_shard_hides_nothing_else(self, store: GenerationStore, root: str) -> None:
        Path(store.uri, store.committed()[unit_of(UNITS[0]).id].path).unlink()
        (found,) = list_stores(root)
        assert (found["prompts"], found["tokens"]) == (3, None)
        assert generation_rows([found], root)[0]["tokens"] == "–"
        assert "cannot read" in problem_rows([found], root)[0]["problem"]

    def test_tokens_of_many_shards_are_estimated(
        self, store: GenerationStore, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert list_stores(root)[0]["tokens_estimated"] is False
        monkeypatch.setattr(generations, "SAMPLED_SHARDS", 1)
        (found,) = list_stores(root)
        assert found["tokens_estimated"] is True
        assert 8 < found["tokens"] < 22  # twice those of one of the two units, by bytes

    def test_the_table_fits_120_columns(self, root: str, capsys: pytest.CaptureFixture[str]) -> None:
        filled(f"{root}/{'x' * 80}", decoding=decoding(stop=("\n\n", "###"), top_p=0.95, top_k=40, min_tokens=3))
        assert main(["ls", root]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "x" * 80 in " ".join(lines)  # no terminal: to be copied
        shown = " ".join(" ".join(lines).split())
        assert "seed 0" in shown
        assert "'###'" in shown
        assert main(["ls", root, "--json"]) == 0
        stores = json.loads(capsys.readouterr().out)["stores"]
        assert stores[1]["decoding_in_words"].endswith(r"3 to 8 tokens, stop at '\n\n' or '###'")
        rows = generation_rows(stores, root, fold=True)
        assert rows[1]["store"].replace("\n", "") == "x" * 80
        assert width(rows) <= 120


class TestInspect:
    def test_says_what_was_asked_and_what_came(self, store: GenerationStore) -> None:
        found = inspect_generations(store.uri)
        assert found["identity"] == store.identity.id
        assert found["identity_parts"]["decoding"]["temperature"] == 1.0
        assert found["response_tokens"] == {"mean": 2.5, "p50": 2.5, "p95": 3.0, "longest": 3}
        assert found["finish_share"] == {"eos": 0.5, "stop": 0.0, "length": 0.5}
        assert found["truncated_share"] == 0.5
        assert found["mean_logprob"] == pytest.approx(-(3 / 8 + 6 / 8) / 5, abs=1e-4)
        assert set(found["columns_bytes_per_token"]) == {
            "prompt", "sample", "prompt_ids", "response_ids", "logprobs", "finish", "text",
        }  # fmt: skip
        sizes = found["on_disk"]
        assert sizes["shards_bytes"] == found["bytes"]
        assert sum(sizes.values()) == sum(f.stat().st_size for f in Path(store.uri).rglob("*") if f.is_file())

    def test_an_empty_store(self, tmp_path: Path) -> None:
        create_generations(str(tmp_path), identity())
        found = inspect_generations(str(tmp_path), texts=3)
        assert found["response_tokens"] is found["mean_logprob"] is None
        assert found["responses_shown"] == []

    def test_shows_texts(self, store: GenerationStore) -> None:
        two = inspect_generations(store.uri, texts=2)["responses_shown"]
        assert len(two) == 2
        assert {row["prompt"] for row in two} == {None}  # ids without what they mean
        write_token_table(store.files, [TokenRow(i, f"t{i}", f"<{i}>") for i in range(320)])
        every = inspect_generations(store.uri, texts=99)["responses_shown"]
        assert len(every) == 6
        assert {row["prompt"] for row in every} == {"<1><5><9>", "<1><6>", "<1><7><3><4>"}
        assert all("tokens" not in row for row in every)
        one = next(row for row in every if row["prompt"] == "<1><6>" and row["sample"] == 1)
        del one["prompt_digest"]
        assert one == {
            "prompt": "<1><6>", "sample": 1, "finish": "length", "response_tokens": 3, "total_logprob": -0.75,
            "response": "text (7, 8, 11)",
        }  # fmt: skip

    def test_shows_a_unit_with_its_tokens(self, store: GenerationStore) -> None:
        unit = unit_of(UNITS[1]).id
        found = inspect_generations(store.uri, unit[:6], tokens=True)
        assert (found["unit"], found["engine"]["vllm"]) == (unit, "0.1")
        assert [row["sample"] for row in found["responses_shown"]] == [0, 1]
        assert found["responses_shown"][0]["prompt_ids"] == [1, 7, 3, 4]
        assert found["responses_shown"][0]["tokens"] == [{"id": 7, "logprob": -0.125}, {"id": 2, "logprob": -0.25}]
        with pytest.raises(StoreError, match="2 committed units begin with ''"):
            inspect_generations(store.uri, "")

    def test_a_damaged_shard_is_named(self, store: GenerationStore) -> None:
        ref = store.committed()[unit_of(UNITS[0]).id]
        Path(store.uri, ref.path).write_bytes(b"PAR1")
        with pytest.raises(CorruptShard, match=ref.path):
            inspect_generations(store.uri)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"method": "greedy", "n": 1, "temperature": None, "seed": None}, "greedy, up to 8 tokens"),
        ({"n": 1, "top_k": 5, "top_p": 0.5}, "sampled, n = 1, T = 1, top-p 0.5, top-k 5, seed 0, up to 8 tokens"),
        ({"temperature": 0.0}, "sampled, n = 2, T = 0, seed 0, up to 8 tokens"),
        (
            {"method": "beam", "beams": 4, "length_penalty": 1.0},
            "beam search, best 2 of 4, length penalty 1, up to 8 tokens",
        ),
    ],
)
def test_decoding_in_words(over: dict[str, object], words: str) -> None:
    assert decoding(**over).in_words() == words


def test_an_engine_that_says_little() -> None:
    assert [engine_in_words(e) for e in (None, {}, {"a": 1}, {"engine": "x"})] == ["–", "–", "unknown", "x"]


@pytest.mark.real
def test_a_bucket_is_as_a_folder(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commits, resumes, is listed, inspected, verified, repaired and cleaned."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"s3://{BUCKET}/{tmp_path.name}"
    local, remote = filled(str(tmp_path / "deep" / "said")), filled(f"{prefix}/deep/said", UNITS[:1])
    assert put(remote, UNITS[0]) is None  # a second driver, and a resume, find it done
    again = create_generations(remote.uri, identity())
    again.save_plan([unit_of(UNITS[1])])
    assert put(again, UNITS[1]) is not None
    here, there = list_stores(str(tmp_path)), list_stores(prefix)
    assert there == [here[0] | {"store": remote.uri}]
    assert inspect_generations(remote.uri, texts=2) | {"store": "", "on_disk": ""} == (
        inspect_generations(local.uri, texts=2) | {"store": "", "on_disk": ""}
    )
    assert main(["verify", remote.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["responses"] == 6
    victim = remote.committed()[unit_of(UNITS[0]).id]
    data = bytearray(remote.files.read(victim.path))
    data[100] ^= 1
    remote.files.write(victim.path, bytes(data))
    assert repair_store(remote.uri)["repair"]["units_dropped"] == [victim.unit]
    assert put(remote, UNITS[0], engine="another") != victim
    found = collect_garbage(remote.uri, older_than_s=-7200.0)
    assert [line["file"] for line in found["removed"]] == [victim.path]
    assert verify_store(remote.uri)["problems"] == []
    with pytest.raises(NoStore, match="is no store"):
        verify_store(f"{prefix}/nowhere")
    assert main(["verify", f"{prefix}/nowhere"]) == 2
