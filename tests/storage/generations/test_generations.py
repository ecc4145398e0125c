"""Responses go into a store and come back as they were; what was damaged is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import CorruptShard, FormatMismatch, IdentityMismatch, StoreError
from stillroom.storage.files import GENERATIONS_MARK as MARK
from stillroom.storage.files import LocalFiles
from stillroom.storage.generations.records import Generation, GenerationIdentity
from stillroom.storage.generations.shard import read_generations, write_generations
from stillroom.storage.generations.store import GenerationStore, create_generations, open_generations
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.store import open_store
from tests.storage.generations.builders import decoding, identity, response, unit_of

PROMPTS = [[1, 5, 9], [1, 6]]


def both(prompts: list[list[int]] = PROMPTS) -> list[Generation]:
    return [response(p, s, (7, 8 + s, 2)) for p in prompts for s in range(2)]


def committed(root: Path, prompts: list[list[int]] = PROMPTS) -> tuple[GenerationStore, ShardRef]:
    store = create_generations(str(root), identity())
    unit = unit_of(prompts)
    store.save_plan([unit])
    ref = write_generations(store.files, store.identity, unit, both(prompts), {"engine": "none"})
    tokens = sum(unit.tokens)
    assert len(store.commit([Receipt(ref, len(prompts), tokens, 12, 4, 1.0)])) == 1
    return store, ref


def plain(generation: Generation) -> tuple[object, ...]:
    arrays = (generation.prompt_ids, generation.response_ids, generation.logprobs)
    return (*(a.tolist() for a in arrays), generation.sample, generation.finish, generation.text)


class TestShard:
    @given(st.data())
    @settings(deadline=None, max_examples=40)
    def test_gives_back_what_was_written(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        ids = st.lists(st.integers(0, 2**31 - 1), max_size=12)
        prompts = data.draw(st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=9), min_size=1, max_size=4,
                                     unique_by=tuple))  # fmt: skip
        logprob = st.floats(-100, 0, width=32)
        written = []
        for prompt in prompts:
            for sample in range(2):
                drawn = data.draw(ids)
                numbers = data.draw(st.lists(logprob, min_size=len(drawn), max_size=len(drawn)))
                written.append(
                    response(
                        prompt, sample, tuple(drawn), logprobs=np.array(numbers, np.float32), text=data.draw(st.text()),
                        finish=data.draw(st.sampled_from(["eos", "stop", "length"])),
                    )
                )  # fmt: skip
        files = LocalFiles(tmp_path_factory.mktemp("store"))
        ref = write_generations(files, identity(), unit_of(prompts), written, {"vllm": "0"})
        read = read_generations(files, identity(), ref)
        assert (read.unit, read.engine) == (unit_of(prompts).id, {"vllm": "0"})
        assert [plain(g) for g in read.responses] == [plain(g) for g in written]
        assert write_generations(files, identity(), unit_of(prompts), written, {"vllm": "0"}) == ref

    @pytest.mark.parametrize("broken", [slice(0, 3), slice(None, None, -1)], ids=["one less", "another order"])
    def test_refuses_what_is_not_the_unit(self, tmp_path: Path, broken: slice) -> None:
        with pytest.raises(ValueError, match="expected 4 in its own order"):
            write_generations(LocalFiles(tmp_path), identity(), unit_of(PROMPTS), both()[broken], {})

    def test_refuses_logprobs_of_other_tokens(self, tmp_path: Path) -> None:
        wrong = [replace(g, logprobs=g.logprobs[1:]) for g in both()]
        with pytest.raises(ValueError, match="2 logprobs of 3 tokens"):
            write_generations(LocalFiles(tmp_path), identity(), unit_of(PROMPTS), wrong, {})

    def test_any_flipped_bit_is_told(self, tmp_path: Path) -> None:
        store, ref = committed(tmp_path)
        path = tmp_path / ref.path
        whole = path.read_bytes()
        for at in range(0, len(whole), 97):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(CorruptShard):
                read_generations(store.files, store.identity, ref)

    def test_another_identity_is_told(self, tmp_path: Path) -> None:
        store, ref = committed(tmp_path)
        with pytest.raises(CorruptShard, match="of identity"):
            read_generations(store.files, identity(dtype="bfloat16"), ref)


class TestStore:
    def test_holds_what_is_committed(self, tmp_path: Path) -> None:
        committed(tmp_path)
        store = open_generations(str(tmp_path))
        assert [plain(g) for unit in store.units() for g in unit.responses] == [plain(g) for g in both()]
        assert list(store.units(wanted=())) == []
        assert store.planned() == [unit_of(PROMPTS)]

    def test_a_unit_counts_once(self, tmp_path: Path) -> None:
        store, ref = committed(tmp_path)
        assert store.commit([Receipt(ref, 2, 5, 12, 4, 1.0)]) == []

    def test_names_what_differs(self, tmp_path: Path) -> None:
        committed(tmp_path)
        with pytest.raises(IdentityMismatch, match=r"decoding\.temperature: store 1\.0, asked 0\.5"):
            create_generations(str(tmp_path), identity(decoding=decoding(temperature=0.5)))

    def test_a_lost_shard_is_told(self, tmp_path: Path) -> None:
        store, ref = committed(tmp_path)
        (tmp_path / ref.path).unlink()
        with pytest.raises(StoreError, match="put back a copy"):
            list(store.units())

    def test_no_store_and_a_damaged_one_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(FormatMismatch, match="stillroom generate"):
            open_generations(str(tmp_path))
        committed(tmp_path)
        text = (tmp_path / MARK).read_text()
        (tmp_path / MARK).write_text(text.replace('"max_tokens": 8', '"max_tokens": 9'))
        with pytest.raises(IdentityMismatch, match="damaged"):
            open_generations(str(tmp_path))
        (tmp_path / MARK).write_text(text[:40])
        with pytest.raises(FormatMismatch, match="damaged"):
            open_generations(str(tmp_path))

    def test_a_store_of_logits_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "_stillroom").mkdir()
        (tmp_path / "_stillroom" / "identity.json").write_text("{}")
        with pytest.raises(IdentityMismatch, match=r"generate\.path"):
            create_generations(str(tmp_path), identity())


class TestIdentity:
    def test_goes_through_json(self) -> None:
        one = identity(decoding=decoding(stop=("\n\n", "###")))
        assert GenerationIdentity.from_json(one.to_json()) == one

    @pytest.mark.parametrize(
        "over", [{"n": 3}, {"top_p": 0.9}, {"seed": 1}, {"stop": ("a",)}, {"max_tokens": 9}, {"min_tokens": 1}]
    )
    def test_decoding_is_part_of_it(self, over: dict[str, object]) -> None:
        assert identity(decoding=decoding(**over)).id != identity().id

    def test_seeds_are_of_prompt_sample_and_seed(self) -> None:
        prompt = response([1, 2]).prompt
        seeds = {
            decoding(seed=seed).sample_seed(p, s) for seed in (0, 1, -1) for p in (prompt, "0" * 32) for s in (0, 1)
        }
        assert len(seeds) == 12
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert decoding(n=2).sample_seed(prompt, 1) == decoding(n=7).sample_seed(prompt, 1)


def test_what_reads_signal_says_what_lies_there(tmp_path: Path) -> None:
    create_generations(str(tmp_path), identity())
    with pytest.raises(FormatMismatch, match="holds generations, a teacher's responses, and no signal"):
        open_store(str(tmp_path))
