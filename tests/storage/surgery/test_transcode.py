"""transcode.py and its parts: what surgery makes is what teaching would have made, and the sources stay as they are."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.pipeline.arguments import UsageMistake, parse
from stillroom.pipeline.cli import main
from stillroom.storage.calibration import Calibration, find_head, head_path, save_calibration
from stillroom.storage.care.verify import verify_store
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.errors import CorruptShard, IdentityMismatch, StillroomError, StoreError, UsageError
from stillroom.storage.fidelity.sample import SEQUENCES
from stillroom.storage.fidelity.truth import Truth, read_truth, write_truth
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.identity import FORMAT_VERSION, Identity
from stillroom.storage.records import (
    HiddenSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    ShardRef,
    Signal,
    SignalSpec,
    TopK,
    TopKSpec,
)
from stillroom.storage.shard import shard_path
from stillroom.storage.store import Store, create_store, open_store
from stillroom.storage.surgery.added_error import COMPARED_POSITIONS, TEMPERATURES, AddedError
from stillroom.storage.surgery.changes import Changes, changed_signal
from stillroom.storage.surgery.plan import read_sequences
from stillroom.storage.surgery.transcode import REPORTS, transcode
from tests.golden.make import HERE as GOLDEN
from tests.s3_server import BUCKET, S3Server
from tests.strategies import (
    nucleus_of,
    random_sequences,
    random_topk,
    tiny_identity,
    tiny_manifest,
    tiny_store,
    topk_of,
    unit_of,
    write_unit,
)

V = 40

#: Half a code of the tail, twice, and float32's rounding (codecs/tail.py).
TAIL_ERROR = 1e-3


@pytest.fixture
def sequences() -> list[Sequence]:
    """Three units of five or fewer, as teaching packs them: by rising digest."""
    found = random_sequences(np.random.default_rng(5), 13, shortest=4, longest=24)
    return sorted(found, key=lambda s: s.digest)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


def topk_identity(k: int = 12, gap_step: float | None = 1 / 8, **fields: Any) -> Identity:
    return tiny_identity(signal=SignalSpec(TopKSpec(k, gap_step, **fields)))


def found_hidden(files: LocalFiles, dtype: str = "int8") -> HiddenSpec:
    """The hidden part of a store at `files`, with the side files that it needs."""
    head = b"the output head, whatever is in it"
    files.write(head_path(sha256_hex(head)), head)
    if dtype == "bfloat16":
        return HiddenSpec(6, "bfloat16")
    rng = np.random.default_rng(0)
    calibration = Calibration(rng.uniform(0.5, 2.0, 6).astype(np.float32), rng.normal(0.0, 1.0, 6).astype(np.float32))
    return HiddenSpec(6, "int8", save_calibration(files, calibration))


def hashes(uri: str | Path) -> dict[str, str]:
    root = Path(uri)
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def signals(store: Store) -> dict[str, Signal]:
    found = {s.sequence.digest: s.signal for s in store.sequences()}
    assert None not in found.values()
    return found  # type: ignore[return-value]


def tops(store: Store) -> dict[str, TopK]:
    return {digest: signal.topk for digest, signal in signals(store).items() if signal.topk is not None}


def columns(store: Store, *names: str) -> dict[str, list[pa.Array]]:
    """The raw columns of every sequence, by digest."""
    found: dict[str, list[pa.Array]] = {}
    for ref in store.committed().values():
        table = pq.read_table(Path(store.uri) / ref.path)
        for row, digest in enumerate(table["sequence"].to_pylist()):
            found[digest] = [table[name][row].as_py() for name in names]
    return found


def require_sound(uri: str | Path) -> Store:
    assert verify_store(str(uri))["problems"] == []
    return open_store(str(uri))


def digests(some: list[Sequence]) -> list[str]:
    return sorted(s.digest for s in some)


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


class TestMerged:
    def test_a_sequence_of_two_stores_counts_once(self, here: Path, sequences: list[Sequence]) -> None:
        one = tiny_store(here / "one", sequences[:8], per_unit=4)
        two = tiny_store(here / "two", sequences[6:], per_unit=4)
        before = hashes(one.uri), hashes(two.uri)
        report = transcode([one.uri, two.uri], str(here / "result"))
        result = require_sound(here / "result")
        held = [s.sequence.digest for s in result.sequences()]
        assert sorted(held) == digests(sequences)
        assert [source["sequences_duplicate"] for source in report["sources"]] == [0, 2]
        assert [source["sequences"] for source in report["sources"]] == [8, 7]
        assert report["sequences"] == 13
        assert (hashes(one.uri), hashes(two.uri)) == before

    def test_whole_units_are_copied_byte_for_byte(self, here: Path, sequences: list[Sequence]) -> None:
        one = tiny_store(here / "one", sequences[:8], per_unit=4)
        two = tiny_store(here / "two", sequences[6:], per_unit=4)
        report = transcode([one.uri, two.uri], str(here / "result"))
        copied = {**one.committed(), unit_of(sequences[10:]).id: two.committed()[unit_of(sequences[10:]).id]}
        result = open_store(str(here / "result")).committed()
        assert {unit: ref for unit, ref in result.items() if unit in copied} == copied
        assert len(result) == 4
        assert (report["units_copied"], report["units_encoded"]) == (3, 1)

    def test_the_first_source_wins(self, here: Path, sequences: list[Sequence]) -> None:
        """Noise makes two machines' rows differ."""
        one = tiny_store(here / "one", sequences[:2])
        two = tiny_store(
            here / "two", sequences[:1], teacher=lambda s, v: np.tile(np.arange(v, 0.0, -1.0), (s.rows, 1))
        )
        for order in ((one, two), (two, one)):
            name = str(here / f"result-{Path(order[0].uri).name}")
            transcode([store.uri for store in order], name)
            digest = sequences[0].digest
            assert np.array_equal(tops(require_sound(name))[digest].ids, tops(order[0])[digest].ids)

    @pytest.mark.parametrize(
        ("other", "named"),
        [
            (tiny_identity(weights="ef" * 16), "weights: " + "ab" * 16 + " against " + "ef" * 16),
            (tiny_identity(k=5), r"signal: top-4 \(1/8 nat\) against top-5"),
            (replace(tiny_identity(), quantisation="int4"), "quantisation: None against int4"),
            (topk_identity(4, nucleus=NucleusSpec(0.9, 2.0)), "signal: top-4"),
        ],
    )
    def test_other_identities_are_refused(
        self, here: Path, sequences: list[Sequence], other: Identity, named: str
    ) -> None:
        one = tiny_store(here / "one", sequences[:2])
        two = tiny_store(here / "two", sequences[2:4], identity=other)
        with pytest.raises(IdentityMismatch, match=named):
            transcode([one.uri, two.uri], str(here / "result"))
        assert not (here / "result").exists()

    def test_nuclei_at_two_temperatures_are_two_identities(self, here: Path, sequences: list[Sequence]) -> None:
        one, two = (
            tiny_store(here / f"{t}", sequences[:2], identity=topk_identity(4, nucleus=NucleusSpec(0.9, t)))
            for t in (1.0, 2.0)
        )
        with pytest.raises(IdentityMismatch, match=r"nucleus 0\.9\) against .*nucleus 0\.9 at T = 2"):
            transcode([one.uri, two.uri], str(here / "result"))


class TestSubset:
    @pytest.fixture
    def source(self, here: Path, sequences: list[Sequence]) -> Store:
        return tiny_store(here / "source", sequences, identity=topk_identity())

    def test_named_in_a_file(self, here: Path, source: Store, sequences: list[Sequence]) -> None:
        wanted = sequences[1::3]
        (here / "names.txt").write_text("\n".join([*(s.digest for s in wanted), "", "0" * 32]) + "\n")
        named = read_sequences(here / "names.txt")
        report = transcode([source.uri], str(here / "result"), sequences=named)
        result = require_sound(here / "result")
        assert sorted(signals(result)) == digests(wanted)
        assert report["sequences_missing"] == 1
        assert len(result.committed()) == 1, "what is left of many units is packed into one"
        for digest, top in tops(result).items():
            assert np.array_equal(top.logits, tops(source)[digest].logits)

    def test_named_by_a_corpus_manifest(self, here: Path, source: Store, sequences: list[Sequence]) -> None:
        tiny_manifest(here / "corpus.parquet", [*sequences[:5], sequences[7], sequences[7]])
        named = read_sequences(here / "corpus.parquet")
        report = transcode([source.uri], str(here / "result"), sequences=named)
        assert sorted(signals(require_sound(here / "result"))) == digests([*sequences[:5], sequences[7]])
        assert (report["units_copied"], report["units_encoded"]) == (1, 1)

    def test_a_limit_of_tokens_takes_the_same_ones_whatever_the_order(
        self, here: Path, sequences: list[Sequence]
    ) -> None:
        one = tiny_store(here / "one", sequences[::2])
        two = tiny_store(here / "two", sequences[1::2])
        limit = sum(len(s.input_ids) for s in sequences[:6]) + 1
        for name, order in (("a", (one, two)), ("b", (two, one))):
            report = transcode([store.uri for store in order], str(here / name), limit_tokens=limit)
            assert sorted(signals(require_sound(here / name))) == digests(sequences[:6])
            assert report["tokens"] == limit - 1

    def test_units_are_cut_anew(self, here: Path, source: Store, sequences: list[Sequence]) -> None:
        most = sum(len(s.input_ids) for s in sequences[:3])
        transcode([source.uri], str(here / "result"), Changes(k=4), unit_tokens=most)
        result = require_sound(here / "result")
        units = [u for u in result.planned() if u.id in result.committed()]
        assert [s for u in units for s in u.sequences] == [s.digest for s in sequences]
        assert len(units[0].sequences) == 3
        assert all(sum(u.tokens) <= most for u in units)
        assert all(sum(a.tokens) + b.tokens[0] > most for a, b in pairwise(units))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sequences": frozenset({"0" * 32})}, "none of the sequences named is there"),
            ({"limit_tokens": 3}, "limit-tokens 3 is below the first sequence's"),
            ({"limit_tokens": 0}, "limit-tokens is 0, expected at least 1"),
            ({"unit_tokens": 0}, "unit-tokens is 0, expected at least 1"),
        ],
    )
    def test_nothing_is_refused(self, here: Path, source: Store, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            transcode([source.uri], str(here / "result"), **options)
        assert not (here / "result").exists()

    def test_a_line_that_is_no_digest_is_named(self, here: Path) -> None:
        (here / "names.txt").write_text("0" * 32 + "\nnot one\n")
        with pytest.raises(UsageError, match=r"names\.txt:2: 'not one' is no sequence digest"):
            read_sequences(here / "names.txt")
        with pytest.raises(UsageError, match="cannot be read from"):
            read_sequences(here / "none.txt")


class Stopped(Exception):
    """What a test stops a run with."""


def stop_after(units: int) -> Callable[[int, int], None]:
    calls = iter(range(units))

    def progress(done: int, total: int) -> None:
        assert 0 < done <= total
        if next(calls, None) == units - 1:
            raise Stopped

    return progress


class TestAgain:
    def test_a_stopped_run_goes_on(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity(), per_unit=3)
        transcode([source.uri], str(here / "undisturbed"), Changes(k=4))
        with pytest.raises(Stopped):
            transcode([source.uri], str(here / "result"), Changes(k=4), progress=stop_after(2))
        assert len(open_store(str(here / "result")).committed()) == 2, "what was written is committed on the way out"
        report = transcode([source.uri], str(here / "result"), Changes(k=4))
        assert report["sequences_held_before"] == 6
        assert report["units_encoded"] == 3
        result = require_sound(here / "result")
        assert result.committed() == open_store(str(here / "undisturbed")).committed()
        reports = json.loads((here / "result" / REPORTS).read_text())
        assert [line["units_encoded"] for line in reports] == [2, 3]

    def test_a_run_killed_before_its_commit_follows_its_plan(
        self, here: Path, sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another unit size, too: units that a plan holds are not planned anew."""
        source = tiny_store(here / "source", sequences, identity=topk_identity(), per_unit=3)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", lambda *_: (_ for _ in ()).throw(Stopped))
            with pytest.raises(Stopped):
                transcode([source.uri], str(here / "result"), Changes(k=4), unit_tokens=40)
        killed = open_store(str(here / "result"))
        assert killed.committed() == {}
        planned = {u.id for u in killed.planned()}
        report = transcode([source.uri], str(here / "result"), Changes(k=4))
        assert require_sound(here / "result").committed().keys() == planned
        assert report["units_encoded"] == len(planned)

    def test_what_is_there_is_not_made_again(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        transcode([source.uri], str(here / "result"), Changes(k=4))
        before = hashes(here / "result")
        report = transcode([source.uri], str(here / "result"), Changes(k=4))
        assert (report["sequences_held_before"], report["tokens"], report["bytes_per_token_after"]) == (13, 0, None)
        assert hashes(here / "result") == before

    def test_it_grows_with_its_source_and_by_teaching(self, here: Path, sequences: list[Sequence]) -> None:
        tiny_store(here / "source", sequences[:5], identity=topk_identity())
        transcode([str(here / "source")], str(here / "result"), Changes(k=4))
        source = tiny_store(here / "source", sequences[5:8], identity=topk_identity())
        report = transcode([source.uri], str(here / "result"), Changes(k=4))
        assert (report["sequences"], report["sequences_held_before"]) == (8, 5)
        tiny_store(here / "result", sequences[8:], identity=tiny_identity(k=4))
        assert sorted(signals(require_sound(here / "result"))) == digests(sequences)

    def test_a_destination_of_another_identity_is_refused(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        other = tiny_store(here / "other", sequences[:2], identity=topk_identity(5))
        before = hashes(other.uri)
        with pytest.raises(IdentityMismatch, match=r"holds other numbers .*top-5 \(1/8 nat\) against top-4"):
            transcode([source.uri], other.uri, Changes(k=4))
        assert hashes(other.uri) == before

    def test_a_damaged_source_stops_it_and_the_rest_stays(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        last = Path(source.uri) / source.committed()[unit_of(sequences[10:]).id].path
        data = bytearray(last.read_bytes())
        data[200] ^= 1
        last.write_bytes(data)
        for changes in (Changes(k=4), Changes()):
            name = here / f"result-{changes.k}"
            with pytest.raises(CorruptShard, match=last.name):
                transcode([source.uri], str(name), changes)
            assert len(require_sound(name).committed()) == 2

    def test_rows_in_another_order_than_planned_are_not_taken(self, here: Path, sequences: list[Sequence]) -> None:
        """By digest the file is sound: some other program wrote it."""
        source = create_store(str(here / "source"), topk_identity())
        receipt = write_unit(source, sequences[:5])
        source.save_plan([unit_of(sequences[:5])])
        table = pq.read_table(Path(source.uri) / receipt.shard.path)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, store_schema=False, use_dictionary=False) as writer:
            writer.write_table(table.take([1, 0, 2, 3, 4]))
            writer.add_key_value_metadata({"stillroom": table.schema.metadata[b"stillroom"]})
        data = sink.getvalue().to_pybytes()
        sha256 = sha256_hex(data)
        path = shard_path(receipt.shard.unit, sha256)
        source.files.write(path, data)
        source.commit([replace(receipt, shard=ShardRef(receipt.shard.unit, path, sha256, len(data)))])
        with pytest.raises(CorruptShard, match=f"row group 0 holds sequences .*{sequences[1].digest}"):
            transcode([source.uri], str(here / "result"), Changes(k=4))

    def test_damaged_reports_are_not_overwritten(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences[:5], identity=topk_identity())
        transcode([source.uri], str(here / "result"), Changes(k=4))
        (here / "result" / REPORTS).write_text("{}")
        tiny_store(here / "source", sequences[5:], identity=topk_identity())
        with pytest.raises(StoreError, match=r"transcode.json is damaged \(it is no list\)"):
            transcode([source.uri], str(here / "result"), Changes(k=4))


class TestOrigin:
    def test_shards_say_what_they_come_from(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        transcode([source.uri], str(here / "one"), Changes(k=6))
        transcode([str(here / "one")], str(here / "two"), Changes(k=4))
        store = open_store(str(here / "two"))
        unit, ref = next(iter(store.committed().items()))
        one = topk_identity(6)
        assert store.reader(ref).footer["provenance"] == {
            "transcoded": {"from": [one.id], "signal": "top-6 (1/8 nat)", "units": [unit]},
            "source": {
                "transcoded": {"from": [source.identity.id], "signal": "top-12 (1/8 nat)", "units": [unit]},
                "source": {"machine": "any"},
            },
        }

    def test_equal_work_gives_equal_bytes(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        for name in ("a", "b"):
            transcode([source.uri], str(here / name), Changes(k=4), limit_tokens=100, unit_tokens=40)
        assert open_store(str(here / "a")).committed() == open_store(str(here / "b")).committed()

    @pytest.mark.parametrize("name", ["int16", "float32"])
    def test_a_store_of_format_1_becomes_one_of_today(self, here: Path, name: str) -> None:
        source = open_store(str(shutil.copytree(GOLDEN / "v1" / name, here / "source")))
        report = transcode([source.uri], str(here / "result"))
        result = require_sound(here / "result")
        assert (source.identity.format, result.identity.format) == (1, FORMAT_VERSION)
        assert result.identity.id == replace(source.identity, format=FORMAT_VERSION).id
        assert (report["units_copied"], report["positions_compared"]) == (0, 0)
        for digest, top in tops(source).items():
            found = tops(result)[digest]
            assert np.array_equal(found.logits, top.logits)
            assert np.array_equal(found.tail_lse, top.tail_lse)


class TestTruth:
    def truth_of(self, some: list[Sequence], seed: int = 0) -> Truth:
        """Two positions of each, the first of them scored twice."""
        rng = np.random.default_rng(seed)
        keys = [(s.digest, s.first_position + row) for s in some for row in range(2)]
        logits = rng.normal(size=(len(keys), V)).astype(np.float32)
        rows = np.arange(0, len(keys), 2)
        positions = np.array([t for _, t in keys], np.int32)
        return Truth(tuple(d for d, _ in keys), positions, logits, logits[rows] + np.float32(0.1), rows)

    def by_key(self, store: Store) -> dict[tuple[str, int], tuple[bytes, bytes]]:
        units = [u for u in store.planned() if u.id in store.committed()]
        truth = read_truth(store.files, units, store.identity)
        if truth is None:
            return {}
        second = {int(row): truth.alone[i].tobytes() for i, row in enumerate(truth.alone_rows)}
        return {key: (truth.logits[i].tobytes(), second.get(i, b"")) for i, key in enumerate(truth.keys)}

    def test_it_goes_along_whatever_becomes_of_the_units(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        for start in (0, 5, 10):
            part = sequences[start : start + 5]
            write_truth(source.files, unit_of(part), self.truth_of(part, start), source.identity)
        known = self.by_key(source)
        assert len(known) == 26
        for name, changes, options in (
            ("copied", Changes(), {}),
            ("cut", Changes(k=4), {}),
            ("recut", Changes(k=4), {"unit_tokens": 30}),
        ):
            report = transcode([source.uri], str(here / name), changes, **options)  # type: ignore[arg-type]
            assert self.by_key(require_sound(here / name)) == known
            assert report["truth_positions"] == 26
        some = frozenset(s.digest for s in sequences[::4])
        transcode([source.uri], str(here / "some"), sequences=some)
        assert self.by_key(require_sound(here / "some")) == {k: v for k, v in known.items() if k[0] in some}

    def test_merged_stores_keep_no_more_than_one_may(self, here: Path) -> None:
        many = random_sequences(np.random.default_rng(7), 2 * SEQUENCES, shortest=4, longest=9)
        stores = []
        for name, part in (("one", many[:SEQUENCES]), ("two", many[SEQUENCES:])):
            store = tiny_store(here / name, part, per_unit=SEQUENCES)
            write_truth(store.files, unit_of(part), self.truth_of(part), store.identity)
            stores.append(store)
        for name, order in (("a", stores), ("b", stores[::-1])):
            with pytest.raises(Stopped):
                transcode([s.uri for s in order], str(here / name), progress=stop_after(1))
            transcode([s.uri for s in order], str(here / name))
        found = [set(self.by_key(require_sound(here / name))) for name in "ab"]
        assert len(found[0]) == 2 * SEQUENCES
        assert found[0] == found[1], "the smallest by hash of both, whatever the order"
        assert any(key in self.by_key(stores[0]) for key in found[0])
        assert any(key in self.by_key(stores[1]) for key in found[0])


ALL = SignalSpec(TopKSpec(8, 1 / 8), SampledSpec(9), HiddenSpec(6, "bfloat16"))
NUCLEUS = SignalSpec(TopKSpec(8, 1 / 8, NucleusSpec(0.9)))
TOPK = SignalSpec(TopKSpec(8, 1 / 8))

REFUSED = [
    (TOPK, Changes(k=9), "k cannot grow from 8 to 9: .* signal.topk.k 9"),
    (TOPK, Changes(k=0), "k is 0, expected 1 to 8"),
    (TOPK, Changes(gap_step=1 / 16), "gap step 1/16 is finer than the store's 1/8: .* signal.topk.gap_step 1/16"),
    (TOPK, Changes(gap_step=None), "gap step none is finer .* signal.topk.gap_step null"),
    (TOPK, Changes(gap_step=5.0), "gap step is 5 nats, expected above 0 and at most 4"),
    (TOPK, Changes(gap_step=0.0), "gap step is 0 nats"),
    (TOPK, Changes(gap_step=float("nan")), "gap step is nan nats"),
    (TOPK, Changes(only=("sampled",)), "part sampled is not in the store, .* draws need .* signal.sampled"),
    (TOPK, Changes(only=("topk", "hidden")), "part hidden is not in the store, .* signal.hidden"),
    (TOPK, Changes(only=("logits",)), "no part 'logits', expected topk, sampled, hidden"),
    (TOPK, Changes(drop=("hidden",)), "part hidden cannot be dropped"),
    (TOPK, Changes(drop=("topk",)), r"no part of top-8 \(1/8 nat\) would be left; keep topk"),
    (TOPK, Changes(nucleus=NucleusSpec(1.0)), "nucleus 1@1: expected a mass between 0 and 1"),
    (TOPK, Changes(nucleus=NucleusSpec(0.9, 11.0)), "nucleus 0.9@11: .* a temperature of 1 to 10"),
    (NUCLEUS, Changes(nucleus=NucleusSpec(0.95)), "nucleus 0.95@1 may need ids that .* 0.9@1 did not keep"),
    (NUCLEUS, Changes(nucleus=NucleusSpec(0.8, 2.0)), "nucleus 0.8@2 may need ids"),
    (SignalSpec(sampled=SampledSpec(9)), Changes(k=4), "of the topk part, which is not in the store"),
    (SignalSpec(sampled=SampledSpec(9)), Changes(layout="packed"), "of the topk part, which is not in the store"),
    (ALL, Changes(k=4, drop=("topk",)), "of the topk part, which is to be left out"),
    (ALL, Changes(gap_step=None, only=("hidden",)), "of the topk part, which is to be left out"),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("spec", "changes", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
    def test_what_the_data_do_not_allow(self, spec: SignalSpec, changes: Changes, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            changed_signal(spec, changes)
        assert "\n" not in str(caught.value)

    def test_before_anything_is_written(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences)
        with pytest.raises(UsageError):
            transcode([source.uri], str(here / "result"), Changes(k=9))
        assert not (here / "result").exists()

    @pytest.mark.parametrize("name", ["source", "source/", "source/inside", ".", "link", "other/../source"])
    def test_a_source_is_no_destination(self, here: Path, sequences: list[Sequence], name: str) -> None:
        source = tiny_store(here / "source", sequences)
        (here / "link").symlink_to(source.uri)
        before = hashes(source.uri)
        with pytest.raises(UsageError, match="a source is never changed"):
            transcode([source.uri], f"{here}/{name}", Changes(k=2))
        assert hashes(source.uri) == before

    def test_an_empty_source(self, here: Path) -> None:
        create_store(str(here / "source"), tiny_identity())
        with pytest.raises(StoreError, match="has nothing committed"):
            transcode([str(here / "source")], str(here / "result"))

    def test_a_gap_that_no_code_holds_names_its_unit(self, here: Path, sequences: list[Sequence]) -> None:
        """float32 holds any gap, int16 codes of a small step do not."""

        def steep(sequence: Sequence, vocabulary: int) -> Any:
            return np.tile(-1000.0 * np.arange(vocabulary), (sequence.rows, 1))

        identity = topk_identity(4, None)
        source = tiny_store(here / "source", sequences[:2], identity=identity, teacher=steep)
        with pytest.raises(StoreError, match=f"unit {unit_of(sequences[:2]).id} cannot be written as top-4"):
            transcode([source.uri], str(here / "result"), Changes(gap_step=1 / 64))


def reference_kl(before: TopK, after: TopK, temperature: float) -> float:
    """Row by row and id by id, over the buckets that `after` names."""
    beta, total = 1 / temperature, 0.0
    tails = [tail_lse_at(b.tail_lse, beta, V - b.kept).astype(np.float64) for b in (before, after)]
    for row in range(len(before)):
        p = {int(i): float(z) * beta for i, z in zip(before.ids[row], before.logits[row], strict=True) if i >= 0}
        q = {int(i): float(z) * beta for i, z in zip(after.ids[row], after.logits[row], strict=True) if i >= 0}
        log_p = np.array([*(p[i] for i in q), np.logaddexp.reduce([tails[0][row], *(p[i] for i in p if i not in q)])])
        log_q = np.array([*q.values(), tails[1][row]])
        log_p -= np.logaddexp.reduce(log_p)
        log_q -= np.logaddexp.reduce(log_q)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(before)


class TestAddedError:
    def compared(self, before: TopK, after: TopK, **fields: int) -> dict[str, Any]:
        error = AddedError(V, fields.get("rows", len(before)))
        error.add(before, after, "result/shards/x.parquet")
        return error.as_dict()

    @pytest.mark.parametrize("kind", ["rounded", "cut", "nucleus", "shuffled"])
    def test_it_is_the_divergence_over_the_buckets_that_are_left(self, kind: str) -> None:
        rng = np.random.default_rng(3)
        logits = rng.normal(0, 3, (50, V)).astype(np.float32)
        before = topk_of(logits, 10)
        noise = rng.uniform(-0.1, 0.1, before.logits.shape).astype(np.float32)
        tail = before.tail_lse + rng.uniform(-0.1, 0.1, before.tail_lse.shape).astype(np.float32)
        noise[:, 0] = 0
        after = TopK(before.ids, before.logits + noise, tail)
        if kind == "cut":
            after = topk_of(logits, 4)
        if kind == "nucleus":
            before, after = nucleus_of(logits, 10, 0.9), nucleus_of(logits, 10, 0.6)
        if kind == "shuffled":
            order = np.argsort(after.ids, axis=1)
            ids, logits_RK = (np.take_along_axis(part, order, axis=1) for part in (after.ids, after.logits))
            after = TopK(ids.astype(np.int32), logits_RK.astype(np.float32), tail)
        found = self.compared(before, after)
        for row in found["added"]:
            assert row["kl_added_nats"] == pytest.approx(reference_kl(before, after, row["temperature"]), abs=2e-7)
            assert row["kl_added_worst_nats"] >= row["kl_added_nats"]
        if kind in ("rounded", "shuffled"):
            assert found["worst_logit_change_nats"] == pytest.approx(float(np.abs(noise).max()), abs=1e-5)
            assert found["added"][0]["kl_added_nats"] > 1e-4
        else:
            assert found["added"][0]["retained_mass_after"] < found["added"][0]["retained_mass_before"]

    def test_nothing_changed_is_nothing_added(self) -> None:
        block = random_topk(np.random.default_rng(0), 30, 8, V)
        found = self.compared(block, block)
        assert found["positions_compared"] == 30
        assert found["worst_logit_change_nats"] == 0.0
        assert all(row["kl_added_worst_nats"] < 1e-12 for row in found["added"])
        assert len(found["added"]) == len(TEMPERATURES)

    def test_other_ids_are_an_error(self) -> None:
        block = random_topk(np.random.default_rng(0), 3, 4, V)
        ids = block.ids.copy()
        ids[1, 2] = next(i for i in range(V) if i not in ids[1])
        with pytest.raises(StoreError, match=r"x\.parquet names ids that its source does not"):
            self.compared(block, TopK(ids, block.logits, block.tail_lse))

    def test_beyond_some_positions_a_sample_is_compared(self) -> None:
        """In no step with the sequences' length."""
        block = random_topk(np.random.default_rng(0), 4096, 2, V)
        error = AddedError(V, rows=4 * COMPARED_POSITIONS)
        for _ in range(4 * COMPARED_POSITIONS // 4096):
            error.add(block, block, "x")
        assert COMPARED_POSITIONS <= error.as_dict()["positions_compared"] < 1.1 * COMPARED_POSITIONS
        sparse, one = AddedError(V, rows=64 * COMPARED_POSITIONS), block[:64]
        compared = []
        for _ in range(100):
            sparse.add(one, one, "x")
            compared.append(sparse.as_dict()["positions_compared"])
        assert len(set(np.diff(compared))) > 3, "a sample at a fixed stride would take one of each 64 rows"


@pytest.mark.real
def test_from_a_folder_and_a_bucket_into_a_bucket(
    here: Path, sequences: list[Sequence], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    root = f"s3://{BUCKET}/{here.name}"
    one = tiny_store(here / "one", sequences[:8], identity=topk_identity())
    transcode([one.uri], f"{root}/copy")
    two = tiny_store(here / "two", sequences[8:], identity=topk_identity())
    report = transcode([f"{root}/copy", two.uri], f"{root}/result", Changes(k=4))
    assert sorted(signals(require_sound(f"{root}/result"))) == digests(sequences)
    assert report["units_encoded"] == 3
    with pytest.raises(UsageError, match="a source is never changed"):
        transcode([f"{root}/copy"], f"{root}/copy/", Changes(k=4))


class TestCommand:
    def test_options_stand_anywhere(self) -> None:
        for words in ("a b c --k 3", "a b --k 3 c", "--k 3 a b c", "a --k 3 b c"):
            arguments = parse(["transcode", *words.split()])
            assert (arguments.sources, arguments.destination, arguments.k) == (["a", "b"], "c", 3)
        assert parse(["transcode", "a", "b"]).gap_step == "same"
        assert parse(["transcode", "a", "b", "--gap-step", "1/4"]).gap_step == 0.25
        assert parse(["transcode", "a", "b", "--gap-step", "none"]).gap_step is None
        assert parse(["transcode", "a", "b", "--nucleus", "0.9@2"]).nucleus == (0.9, 2.0)
        assert parse(["transcode", "a", "b", "--only", "topk,hidden"]).only == ("topk", "hidden")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("a", "the following arguments are required: DST"),
            ("a b --gap-step x", "'x' is no number of nats"),
            ("a b --gap-step 1/0", "'1/0' is no number of nats"),
            ("a b --nucleus x", "'x' is not MASS or MASS@T"),
            ("a b --only topk --drop hidden", "not allowed with"),
            ("a b --sequences f --limit-tokens 3", "not allowed with"),
            ("a b --layout dense", "invalid choice"),
        ],
    )
    def test_mistakes(self, words: str, message: str) -> None:
        with pytest.raises(UsageMistake, match=message):
            parse(["transcode", *words.split()])

    def test_it_reports(self, here: Path, sequences: list[Sequence], capsys: pytest.CaptureFixture[str]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        (here / "names").write_text("\n".join([sequences[0].digest, "0" * 32]))
        words = ["transcode", source.uri, str(here / "result"), "--k", "4", "--gap-step", "1/4"]
        assert main([*words, "--sequences", str(here / "names"), "--json"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert report["signal"] == "top-4 (1/4 nat)"
        assert report.pop("fidelity") == [], "the source keeps no sample"
        assert report == json.loads((here / "result" / REPORTS).read_text())[-1] | {
            key: report[key] for key in ("wall_s", "tokens_per_s")
        }
        assert "notice: 1 of the sequences named are in no source" in err
        assert main([*words, "--quiet"]) == 0
        assert "kl added nats" in capsys.readouterr().out
        require_sound(here / "result")

    def test_a_refusal_is_one_line_and_exit_code_2(
        self, here: Path, sequences: list[Sequence], capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tiny_store(here / "source", sequences)
        assert main(["transcode", source.uri, str(here / "result"), "--k", "9", "--quiet"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("stillroom: error: k cannot grow from 4 to 9")
        assert err.count("\n") == 1
        assert issubclass(UsageError, StillroomError)
