"""Smaller records and fewer parts: what surgery makes is what teaching would have made, and the sources stay as they
are.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.calibration import find_head, head_path
from stillroom.storage.errors import StoreError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.records import NucleusSpec, SampledSpec, Sequence, SignalSpec, TopKSpec
from stillroom.storage.store import Store, open_store
from stillroom.storage.surgery.changes import Changes
from stillroom.storage.surgery.transcode import transcode
from tests.storage.surgery.transcoding import (
    TAIL_ERROR,
    columns,
    found_hidden,
    hashes,
    require_sound,
    signals,
    topk_identity,
    tops,
)
from tests.strategies import tiny_identity, tiny_store


class TestSmaller:
    @pytest.mark.parametrize("gap_step", [None, 1 / 8])
    def test_a_smaller_k_is_what_teaching_it_gives(
        self, here: Path, sequences: list[Sequence], gap_step: float | None
    ) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity(12, gap_step))
        direct = tiny_store(here / "direct", sequences, identity=topk_identity(4, gap_step))
        before = hashes(source.uri)
        report = transcode([source.uri], str(here / "result"), Changes(k=4))
        result = require_sound(here / "result")
        assert result.identity == direct.identity
        assert result.committed().keys() == direct.committed().keys()
        for digest, taught in tops(direct).items():
            found = tops(result)[digest]
            assert np.array_equal(found.ids, taught.ids)
            assert np.array_equal(found.logits, taught.logits)
            assert np.abs(found.tail_lse - taught.tail_lse).max() <= (gap_step or 0.0) / 2 + TAIL_ERROR
        assert hashes(source.uri) == before
        assert report["worst_logit_change_nats"] == 0.0
        assert report["positions_compared"] == report["rows"] == sum(s.rows for s in sequences)

    @pytest.mark.parametrize(("old", "new"), [(None, 1 / 4), (1 / 8, 1 / 4), (1 / 16, 1 / 2), (1 / 8, 0.3)])
    def test_a_coarser_step_is_within_the_stated_bound(
        self, here: Path, sequences: list[Sequence], old: float | None, new: float
    ) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity(8, old))
        exact = tiny_store(here / "exact", sequences, identity=topk_identity(8, None))
        report = transcode([source.uri], str(here / "result"), Changes(gap_step=new))
        result = require_sound(here / "result")
        assert report["logit_error_bound_nats"] == pytest.approx((old or 0.0) / 2 + new / 2)
        assert result.identity.id == topk_identity(8, new).id
        worst = 0.0
        for digest, truth in tops(exact).items():
            worst = max(worst, float(np.abs(tops(result)[digest].logits - truth.logits).max()))
        assert worst <= report["logit_error_bound_nats"] + 1e-5
        assert new / 8 < report["worst_logit_change_nats"] <= new / 2 + 1e-5

    @pytest.mark.parametrize("gap_step", [None, 1 / 8])
    def test_plain_and_packed_are_the_same_numbers(
        self, here: Path, sequences: list[Sequence], gap_step: float | None
    ) -> None:
        source = tiny_store(here / "plain", sequences, identity=topk_identity(8, gap_step))
        report = transcode([source.uri], str(here / "packed"), Changes(layout="packed"))
        assert report["worst_logit_change_nats"] <= 4e-6
        transcode([str(here / "packed")], str(here / "again"), Changes(layout="plain"))
        packed, again = require_sound(here / "packed"), require_sound(here / "again")
        assert packed.identity.id == topk_identity(8, gap_step, layout="packed").id
        assert again.identity == source.identity
        for digest, first in tops(source).items():
            for other in (tops(packed)[digest], tops(again)[digest]):
                order, ranks = np.argsort(other.ids, axis=1), np.argsort(first.ids, axis=1)
                assert np.array_equal(np.sort(other.ids, axis=1), np.sort(first.ids, axis=1))
                logits = np.take_along_axis(other.logits, order, 1), np.take_along_axis(first.logits, ranks, 1)
                np.testing.assert_allclose(*logits, rtol=0, atol=0 if gap_step else 4e-6)
                assert np.array_equal(other.tail_lse, first.tail_lse)

    @pytest.mark.parametrize("nucleus", [None, NucleusSpec(0.9)])
    def test_a_packed_store_is_cut_in_pieces(
        self, here: Path, sequences: list[Sequence], nucleus: NucleusSpec | None
    ) -> None:
        """A packed column holds a row group in one value, so no sequence can be lifted out of it."""
        spec = SignalSpec(TopKSpec(8, 1 / 8, nucleus, "packed"), SampledSpec(9))
        source = tiny_store(here / "source", sequences, identity=tiny_identity(signal=spec))
        some = frozenset(s.digest for s in sequences[1::2])
        transcode([source.uri], str(here / "recut"), unit_tokens=50)
        transcode([source.uri], str(here / "some"), sequences=some)
        transcode([source.uri], str(here / "topk"), Changes(only=("topk",)))
        for name, expected in (("recut", 13), ("some", 6), ("topk", 13)):
            found = tops(require_sound(here / name))
            assert len(found) == expected
            for digest, top in found.items():
                first = tops(source)[digest]
                width = int(first.kept.max())
                assert np.array_equal(top.kept, first.kept)
                assert np.array_equal(top.ids[:, :width], first.ids[:, :width])
                assert np.array_equal(top.logits[:, :width], first.logits[:, :width])
                assert np.array_equal(top.tail_lse, first.tail_lse)

    def test_a_nucleus_keeps_what_teaching_it_keeps(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity(12, None))
        spec = NucleusSpec(0.8, 2.0)
        direct = tiny_store(here / "direct", sequences, identity=topk_identity(6, None, nucleus=spec))
        report = transcode([source.uri], str(here / "result"), Changes(k=6, nucleus=spec))
        result = require_sound(here / "result")
        assert result.identity == direct.identity
        for digest, taught in tops(direct).items():
            found = tops(result)[digest]
            assert np.array_equal(found.kept, taught.kept)
            assert np.array_equal(found.ids, taught.ids)
            np.testing.assert_allclose(found.tail_lse, taught.tail_lse, rtol=0, atol=TAIL_ERROR)
        assert report["bytes_per_token_after"] < report["bytes_per_token_before"]
        transcode([result.uri], str(here / "smaller"), Changes(k=3, nucleus=NucleusSpec(0.5, 2.0)))
        assert max(top.kept.max() for top in tops(require_sound(here / "smaller")).values()) == 3

    def test_bytes_a_token_and_the_kept_mass_are_stated(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity(12))
        report = transcode([source.uri], str(here / "result"), Changes(k=2, gap_step=1 / 2))
        tokens = sum(len(s.input_ids) for s in sequences)
        for key, store in (("before", source), ("after", open_store(str(here / "result")))):
            held = sum(ref.size_bytes for ref in store.committed().values())
            assert report[f"bytes_per_token_{key}"] == round(held / tokens, 2)
        assert [row["temperature"] for row in report["added"]] == [1, 2, 4, 8]
        for row in report["added"]:
            assert 0 < row["retained_mass_after"] < row["retained_mass_before"] < 1
            assert 0 < row["kl_added_nats"] < row["kl_added_worst_nats"]
        json.dumps(report, allow_nan=False)


class TestParts:
    @pytest.fixture
    def source(self, here: Path, sequences: list[Sequence]) -> Store:
        hidden = found_hidden(LocalFiles(here / "source"))
        spec = SignalSpec(TopKSpec(8, 1 / 8), SampledSpec(9), hidden)
        return tiny_store(here / "source", sequences, identity=tiny_identity(signal=spec))

    def test_parts_that_stay_are_kept_code_by_code(self, here: Path, source: Store) -> None:
        """Read and written again, an int8 row would get another scale."""
        before = hashes(source.uri)
        transcode([source.uri], str(here / "result"), Changes(k=3, gap_step=1 / 4), unit_tokens=50)
        result = require_sound(here / "result")
        assert result.committed().keys().isdisjoint(source.committed())
        names = ("input_ids", "context", "sampled_ids", "sampled_draws", "sampled_count", "hidden_code", "hidden_scale")
        assert columns(result, *names) == columns(source, *names)
        assert find_head(result.files) == find_head(source.files)
        assert result.identity.signal.hidden == source.identity.signal.hidden
        assert hashes(source.uri) == before

    @pytest.mark.parametrize(
        ("changes", "left"),
        [
            (Changes(drop=("sampled",)), {"topk", "hidden"}),
            (Changes(only=("topk",)), {"topk"}),
            (Changes(only=("hidden", "sampled")), {"sampled", "hidden"}),
            (Changes(drop=("topk", "hidden")), {"sampled"}),
        ],
    )
    def test_parts_are_left_out(self, here: Path, source: Store, changes: Changes, left: set[str]) -> None:
        report = transcode([source.uri], str(here / "result"), changes)
        result = require_sound(here / "result")
        held = signals(result)
        for digest, signal in signals(source).items():
            for name in ("topk", "sampled", "hidden"):
                assert (getattr(held[digest], name) is not None) == (name in left)
            if signal.topk is not None and "topk" in left:
                found = held[digest].topk
                assert found is not None
                assert np.array_equal(found.logits, signal.topk.logits)
            if "hidden" in left:
                assert np.array_equal(held[digest].hidden, signal.hidden)  # type: ignore[arg-type]
        side = {name for name in hashes(result.uri) if "head-" in name or "calibration-" in name}
        assert bool(side) == ("hidden" in left), "side files go along with what needs them, and only then"
        assert (report["positions_compared"], report["worst_logit_change_nats"], report["added"]) == (0, None, [])

    def test_two_heads_for_one_teacher_are_refused(self, here: Path, source: Store) -> None:
        shutil.copytree(source.uri, here / "other")
        other = LocalFiles(here / "other")
        other.delete(find_head(other))
        other.write(head_path(sha256_hex(b"another")), b"another")
        with pytest.raises(StoreError, match=r"expected one and the same"):
            transcode([source.uri, other.uri], str(here / "result"), Changes(k=3))
        assert not (here / "result/_stillroom/identity.json").exists()
