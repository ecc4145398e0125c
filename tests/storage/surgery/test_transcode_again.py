"""Stopped, killed, repeated: the same result, with where it comes from, and the sample of full logits beside it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.errors import CorruptShard, IdentityMismatch, StoreError
from stillroom.storage.fidelity.sample import SEQUENCES
from stillroom.storage.fidelity.truth import Truth, read_truth, write_truth
from stillroom.storage.files import sha256_hex
from stillroom.storage.identity import FORMAT_VERSION
from stillroom.storage.records import Sequence, ShardRef
from stillroom.storage.shard import shard_path
from stillroom.storage.store import Store, create_store, open_store
from stillroom.storage.surgery.changes import Changes
from stillroom.storage.surgery.transcode import REPORTS, transcode
from tests.golden.make import HERE as GOLDEN
from tests.storage.surgery.transcoding import (
    Stopped,
    V,
    digests,
    hashes,
    require_sound,
    signals,
    stop_after,
    topk_identity,
    tops,
)
from tests.strategies import random_sequences, tiny_identity, tiny_store, unit_of, write_unit


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
