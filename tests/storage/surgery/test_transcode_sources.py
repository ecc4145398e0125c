"""Several sources become one store, a part of one becomes another; from folders and from a bucket."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage.errors import IdentityMismatch, UsageError
from stillroom.storage.identity import Identity
from stillroom.storage.records import NucleusSpec, Sequence
from stillroom.storage.store import Store, open_store
from stillroom.storage.surgery.changes import Changes
from stillroom.storage.surgery.plan import read_sequences
from stillroom.storage.surgery.transcode import transcode
from tests.s3_server import BUCKET, S3Server
from tests.storage.surgery.transcoding import digests, hashes, require_sound, signals, topk_identity, tops
from tests.strategies import tiny_identity, tiny_manifest, tiny_store, unit_of


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
