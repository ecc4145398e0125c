"""Data mix: the formula by weight against losses by hand, the draws by sampling, and whole runs that resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.pipeline.student.mix import Mix, drawn, factors_of, shares_of
from stillroom.pipeline.student.mix_config import MixConfig
from stillroom.pipeline.student.session import Session, run
from stillroom.pipeline.student.signals import stopping
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import Pack, ShardRef
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.test_process import finish
from tests.student.test_ranks import close_to, start, together
from tests.student.test_session import go, log_of
from tests.student.world import WINDOW, World, cut_after

#: Documents of the two sources, of the world's sixty.
GENERATED, TEXT = 45, 15


def with_sources(world: World, path: Path, sources: list[tuple[str, int]]) -> World:
    """The world's corpus, said to be of these sources."""
    manifest = Manifest.open(world.manifest)
    stated = [{"name": name, "documents": documents} for name, documents in sources]
    with ManifestWriter(path) as writer:
        for row in manifest:
            writer.append(row)
        writer.commit(replace(manifest.meta, counts={"sources": stated}))
    return replace(world, manifest=path)


@pytest.fixture(scope="module")
def mixed(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("mixed") / "manifest.parquet"
    return with_sources(world, path, [("generations", GENERATED), ("text", TEXT)])


def config(**shares: Any) -> MixConfig:
    return MixConfig.model_validate({"shares": shares})


def ramp(start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"from": start, "to": end, **more}


def sequences_by_source(manifest: Manifest) -> tuple[set[str], set[str]]:
    rows = list(manifest)
    return (
        {row.sequence.digest for row in rows if row.document < GENERATED},
        {row.sequence.digest for row in rows if row.document >= GENERATED},
    )


class TestShares:
    def test_the_source_left_out_has_the_rest_at_every_step(self) -> None:
        shares = shares_of(config(a=ramp(0.9, 0.5)), ["b", "a"], 5)
        assert shares[:, 1] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
        assert shares.sum(1) == pytest.approx([1.0] * 5)

    def test_ramps_that_cross_may_add_up_to_one(self) -> None:
        shares = shares_of(config(a=ramp(0.9, 0.5), b=ramp(0.1, 0.5)), ["a", "b"], 9)
        assert shares[-1] == pytest.approx([0.5, 0.5])

    @pytest.mark.parametrize(
        ("shares", "said"),
        [
            ({"genrations": 0.5}, r"^mix\.shares\.genrations: no source has this name; the corpus has a, b, c$"),
            ({"a": 0.5}, r"leaves out b, c: one alone may have the rest"),
            ({"a": 0.7, "b": 0.5}, r"a 0\.7, b 0\.5\) add up to 1\.2 at step 1: expected at most 1$"),
            ({"a": ramp(0.2, 0.7), "b": 0.5}, r"a 0\.2 → 0\.7, b 0\.5\) add up to 1\.2 at step 5: expected at most 1$"),
            ({"a": 0.2, "b": 0.2, "c": 0.2}, r"add up to 0\.6 at step 1: all sources are named"),
        ],
    )
    def test_shares_that_do_not_go_with_the_corpus_are_refused(self, shares: dict[str, Any], said: str) -> None:
        with pytest.raises(StudentError, match=said):
            shares_of(config(**shares), ["a", "b", "c"], 5)

    def test_names_that_two_sources_have_are_refused(self) -> None:
        with pytest.raises(StudentError, match="several sources are called train: give each a `name`"):
            shares_of(config(train=0.5), ["train", "train"], 5)

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"mix": {"shares": {"a": ramp(0.5, 1.5)}}}, r"shares\.a: must lie in 0 … 1, got 0\.5 → 1\.5"),
            ({"mix": {"by": "sampling", "shares": {"a": 0.5}}}, r"each source has epochs of its own: set `steps`"),
            ({"mix": {"shares": {"a": 0.5}}, "phases": [{"steps": 2, "corpus": "x", "losses": {"alpha": 0}}]},
             r"mix and phases\.corpus together"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_refused_where_it_is_written(self, fields: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            StudentConfig.model_validate({"name": "s", "model": {"from": "m"}} | fields)

    def test_a_student_without_a_mix_keeps_its_numbers(self) -> None:
        plain = StudentConfig.model_validate({"name": "s", "model": {"from": "m"}})
        assert "mix" not in plain.numbers()
        by_half = StudentConfig.model_validate({"name": "s", "model": {"from": "m"}, "mix": {"shares": {"a": 0.5}}})
        assert by_half.numbers()["mix"] == {"by": "weight", "shares": {"a": 0.5}}


class TestDraws:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**63 - 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 9))
    def test_two_sources_are_never_a_pack_off_their_shares(
        self, seed: int, start: float, end: float, packs: int
    ) -> None:
        shares = shares_of(config(a=ramp(start, end, shape="cosine")), ["a", "b"], 60)
        order = drawn(shares, packs=packs, seed=seed)
        expected = np.repeat(shares[:, 0], packs).cumsum()
        assert np.abs((order == 0).cumsum() - expected).max() < 1.0

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**63 - 1), st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda s: sum(s) > 0.1))
    def test_four_sources_stay_within_three(self, seed: int, parts: list[float]) -> None:
        shares = np.tile(np.array(parts) / sum(parts), (100, 1))
        order = drawn(shares, packs=4, seed=seed)
        counts = (order[:, None] == np.arange(4)).cumsum(0)
        assert np.abs(counts - np.repeat(shares, 4, axis=0).cumsum(0)).max() < 3.0
        assert not set(order.tolist()) & set(np.flatnonzero(shares[0] == 0).tolist())

    def test_over_seeds_every_pack_has_the_probability_of_its_share(self) -> None:
        shares = shares_of(config(a=0.2, b=ramp(0.7, 0.1)), ["a", "b", "c"], 8)
        orders = np.stack([drawn(shares, packs=2, seed=seed) for seed in range(400)])
        for source in range(3):  # 400 draws: a standard error of 0.025
            assert (orders == source).mean(0) == pytest.approx(np.repeat(shares[:, source], 2), abs=0.1)

    def test_a_longer_run_begins_like_a_shorter_one(self) -> None:
        shares = shares_of(config(a=0.37), ["a", "b"], 50)
        assert (drawn(shares[:20], packs=3, seed=4) == drawn(shares, packs=3, seed=4)[:60]).all()

    def test_all_and_nothing(self) -> None:
        shares = shares_of(config(a=ramp(0.0, 1.0)), ["a", "b"], 3)
        for seed in range(50):
            order = drawn(shares, packs=4, seed=seed)
            assert (order[:4] == 1).all()
            assert (order[8:] == 0).all()


def sampled(world: World, *, start: int = 0, rank: int = 0, world_size: int = 1, **stream: Any) -> list[Pack]:
    """All packs of a run of thirty steps, three packs each. stream: other settings of the sources' streams."""
    manifest, snapshot = Manifest.open(world.manifest), Snapshot.read(world.snapshot)
    asked = MixConfig.model_validate({"by": "sampling", "shares": {"text": ramp(0.1, 0.6)}})
    settings: dict[str, Any] = {"manifest": manifest, "snapshot": snapshot, "window": WINDOW, "seed": 3} | stream
    found = Mix.of(asked, manifest, 30).stream(
        lambda chosen, numbers: Stream(chosen=chosen, numbers=numbers, **settings),
        packs=3, seed=3, start=start, rank=rank, world_size=world_size,
    )  # fmt: skip
    return list(found)


def names(packs: list[Pack]) -> list[tuple[int, int, tuple[str, ...]]]:
    return [(pack.epoch, pack.index, pack.sequences) for pack in packs]


class TestSampling:
    def test_packs_are_of_one_source_each_of_which_has_epochs_of_its_own(self, mixed: World) -> None:
        generated, text = sequences_by_source(Manifest.open(mixed.manifest))
        packs = sampled(mixed)
        assert len(packs) == 90
        manifest = Manifest.open(mixed.manifest)
        trains = [row for row in manifest if not row.heldout]
        epochs = []
        for source, count in ((generated, GENERATED), (text, TEXT)):
            own = [pack for pack in packs if pack.sequences[0] in source - (generated & text)]
            expected = sorted(
                row.sequence.digest for row in trains if (row.document < GENERATED) == (count == GENERATED)
            )
            read = [sorted(d for p in own if p.epoch == e for d in p.sequences) for e in range(own[-1].epoch)]
            assert read == [expected] * own[-1].epoch, "every epoch but the last has each sequence once"
            order = [[p.sequences for p in own if p.epoch == e] for e in (0, 1)]
            assert order[0] != order[1]
            epochs.append(own[-1].epoch)
        assert len({pack.epoch for pack in packs}) > 2
        assert epochs[1] > 1, "the small source begins anew"
        assert 30 <= sum(pack.sequences[0] in text for pack in packs) <= 33, "90 packs, 0.35 of them on average"

    @pytest.mark.parametrize("start", [1, 3, 44, 89])
    def test_from_any_step_on_it_is_the_rest_of_the_whole(self, mixed: World, start: int) -> None:
        assert names(sampled(mixed, start=start)) == names(sampled(mixed))[start:]

    def test_ranks_in_turn_give_the_packs_of_one(self, mixed: World) -> None:
        ranks = [names(sampled(mixed, start=4, rank=rank, world_size=2)) for rank in (0, 1)]
        assert [ranks[n % 2][n // 2] for n in range(86)] == names(sampled(mixed))[4:]

    def test_while_teachers_write_the_packs_are_the_same(self, mixed: World) -> None:
        """Every shard comes when it is asked for."""
        whole = Snapshot.read(mixed.snapshot)
        asked: list[str] = []

        def arrive(unit: str, gone: Any) -> ShardRef:
            asked.append(unit)
            return whole.refs[unit]

        begun = replace(whole, refs={})
        assert begun.open
        assert names(sampled(mixed, snapshot=begun, await_shard=arrive)) == names(sampled(mixed))
        assert set(asked) == {unit.id for unit in whole.units}


def by_hand(session: Session, packs: list[Pack], beta: float) -> float:
    """β · mean cross-entropy of the generations' positions + (1 − β) · that of the text's, sequence by sequence."""
    generated, _ = sequences_by_source(session.manifest)
    losses: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for pack in packs:
        for number, digest in enumerate(pack.sequences):
            ids = torch.from_numpy(pack.input_ids[pack.segment_ids == number].astype(np.int64))
            if len(ids) > 1:
                logits = session.model(input_ids=ids[None]).logits[0, :-1, : session.vocabulary].double()
                losses[digest in generated].append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    means = {name: float(torch.cat(found).mean()) for name, found in losses.items()}
    return beta * means[True] + (1 - beta) * means[False]


def session_of(job: StudentJob) -> Session:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with stopping() as stop:
        return Session(job, Manifest.open(job.manifest), None, stop, device=torch.device("cpu"))


class TestWeights:
    def test_the_loss_is_the_sum_of_share_and_mean_by_source(self, mixed: World, tmp_path: Path) -> None:
        """Steps hold some three times as many positions of generations as of text."""
        session = session_of(
            mixed.job(tmp_path, signal=False, losses={"alpha": 0}, batch_packs=4, micro_packs=2,
                      mix={"shares": {"generations": ramp(0.9, 0.2)}})
        )  # fmt: skip
        assert session.mix is not None
        packs = list(Stream(manifest=session.manifest, snapshot=None, window=WINDOW, epochs=1))[:4]
        for step, beta in ((0, 0.9), (7, 0.2)):
            weighed, record = session.mix.weigh(packs, step)
            assert record["shares"] == pytest.approx({"generations": beta, "text": 1 - beta})
            assert sum(record["trained"].values()) == sum(len(pack.positions) for pack in packs)
            assert min(record["trained"].values()) > 5
            with torch.no_grad():
                expected = by_hand(session, packs, beta)
                plain = by_hand(session, packs, record["trained"]["generations"] / sum(record["trained"].values()))
            found = session.trainer.step(weighed, step).loss
            assert found == pytest.approx(expected, rel=2e-5)
            assert abs(expected - plain) > 1e-3, "else the mix would not be seen"

    def test_a_source_that_is_not_there_leaves_its_share(self) -> None:
        shares = np.array([0.6, 0.3, 0.1])
        assert factors_of(np.array([4.0, 0.0, 8.0]), shares) == pytest.approx([12 * 6 / 7 / 4, 0, 12 / 7 / 8])
        assert not factors_of(np.array([4.0, 0.0]), np.array([0.0, 1.0])).any()

    def test_ranks_weigh_by_the_sums_of_all(self, mixed: World) -> None:
        manifest = Manifest.open(mixed.manifest)
        mix = Mix.of(config(generations=0.9), manifest, 3)
        packs = list(Stream(manifest=manifest, snapshot=None, window=WINDOW, epochs=1))[:4]
        whole, said = mix.weigh(packs, 0)
        held = sum((mix._held(pack)[1] for pack in packs), np.zeros((2, 2)))
        parts = [mix.weigh(packs[rank::2], 0, lambda _: held) for rank in (0, 1)]
        assert [record for _, record in parts] == [said, said]
        for number, pack in enumerate(whole):
            assert (parts[number % 2][0][number // 2].weights == pack.weights).all()
        assert mix.weigh([], 0, lambda _: held) == ([], said)


MIXES: dict[str, dict[str, Any]] = {
    "weight": {"by": "weight", "shares": {"generations": ramp(0.9, 0.5)}},
    "sampling": {"by": "sampling", "shares": {"generations": ramp(0.9, 0.5)}},
}


class TestRuns:
    @pytest.mark.parametrize("by", ["weight", "sampling"])
    def test_a_run_cut_off_goes_on_bit_equal(self, by: str, mixed: World, tmp_path: Path) -> None:
        settings: dict[str, Any] = {
            "mix": MIXES[by],
            "steps": 8,
            "checkpoint_every": 1,
            "keep_last": 9,
            "eval_packs": 2,
        }
        whole = tmp_path / "whole"
        result = go(mixed.job(whole, **settings))
        expected, weights = log_of(whole), load_file(whole / "export" / "model.safetensors")
        steps = [record for record in expected if record["kind"] == "step"]
        ramps = [record["mix"]["shares"]["generations"] for record in steps]
        assert ramps == pytest.approx(np.linspace(0.9, 0.5, 8).tolist())
        totals = {name: sum(r["mix"]["trained"][name] for r in steps) for name in ("generations", "text")}
        assert result["mix"]["trained"] == totals
        assert sum(totals.values()) == result["trained_positions"]
        manifest = Manifest.open(mixed.manifest)
        one = sum(row.trained for row in manifest if row.document >= GENERATED and not row.heldout)
        assert result["mix"]["epochs"]["text"] == round(totals["text"] / one, 3)
        for step in (1, 5):
            cut = cut_after(whole, step)
            again = go(mixed.job(cut, **settings))
            assert log_of(cut) == expected
            assert again["mix"] == result["mix"]
            tensors = load_file(cut / "export" / "model.safetensors")
            assert all(torch.equal(tensors[name], tensor) for name, tensor in weights.items())

    @pytest.mark.real
    @pytest.mark.slow
    @pytest.mark.parametrize("by", ["weight", "sampling"])
    def test_two_processes_mix_as_one_does(self, by: str, mixed: World, tmp_path: Path) -> None:
        """Three packs a step: the ranks take turns at two."""
        settings: dict[str, Any] = {"mix": MIXES[by], "steps": 5, "batch_packs": 3, "eval_packs": 2}
        go(mixed.job(tmp_path / "one", **settings))
        (tmp_path / "two").mkdir()
        finish(start(together(mixed, tmp_path / "two", 2, **settings), tmp_path))
        close_to(tmp_path / "two", tmp_path / "one")
        results = [json.loads((tmp_path / name / "result.json").read_text())["mix"] for name in ("one", "two")]
        assert results[0] == results[1]

    def test_a_step_without_a_source_is_told_at_the_end(self, world: World, tmp_path: Path) -> None:
        few = with_sources(world, tmp_path / "manifest.parquet", [("most", 58), ("few", 2)])
        result = go(few.job(tmp_path / "run", batch_packs=1, steps=6, eval_packs=1, mix={"shares": {"few": 0.5}}))
        lacking = result["mix"]["lacking"]["few"]
        assert 0 < lacking <= 6
        assert any(f"{lacking} of 6 steps had no position of few" in line for line in result["notices"])

    def test_other_names_of_sources_are_another_run(self, world: World, mixed: World, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"mix": MIXES["weight"], "steps": 2, "eval_packs": 1}
        go(mixed.job(tmp_path / "run", **settings))
        swapped = with_sources(world, tmp_path / "m.parquet", [("text", GENERATED), ("generations", TEXT)])
        with pytest.raises(StudentError, match=r"sources: \[\['generations', 45\], \['text', 15\]\] there"):
            go(swapped.job(tmp_path / "run", **settings))

    def test_a_manifest_that_names_no_sources_says_what_to_do(self, world: World, tmp_path: Path) -> None:
        job = world.job(tmp_path, mix=MIXES["weight"])
        with pytest.raises(
            StudentError, match="was written before sources had names: remove it and run `stillroom tea"
        ):
            run(job, Manifest.open(job.manifest), Snapshot.read(world.snapshot))

    def test_a_source_with_a_share_and_nothing_to_learn_is_refused(self, world: World, tmp_path: Path) -> None:
        bare = with_sources(world, tmp_path / "m.parquet", [("all", 60), ("none", 0)])
        with pytest.raises(StudentError, match="source none has a share, and nothing to learn in the training split"):
            go(bare.job(tmp_path / "run", mix={"shares": {"none": 0.1}}))


def test_the_log_of_a_run_without_a_mix_has_no_shares(world: World, tmp_path: Path) -> None:
    result = go(world.job(tmp_path, steps=1, eval_packs=1))
    assert "mix" not in result
    assert "mix" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
