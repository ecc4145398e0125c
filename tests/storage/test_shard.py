"""shard.py: written whole, read by row group, and never read wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillroom.storage.codecs.signal import VALUES_PER_GROUP, SignalCodec
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import Sequence, ShardRef, Signal, SignalSpec, TopK, TopKSpec
from stillroom.storage.shard import ShardReader, parse_shard_path, row_groups, shard_path, write_shard
from tests.strategies import (
    digest_teacher,
    random_sequences,
    random_topk,
    round_trip,
    tiny_identity,
    topk_of,
    unit_of,
)

IDENTITY = tiny_identity()


def blocks_of(sequences: list[Sequence], identity: Identity = IDENTITY) -> list[Signal]:
    assert identity.signal.topk is not None
    k = identity.signal.topk.k
    return [Signal(topk_of(digest_teacher(s, identity.vocabulary), k)) for s in sequences]


def _topk(signal: Signal) -> TopK:
    assert signal.topk is not None
    return signal.topk


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path)


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(4), 12)


@pytest.fixture
def ref(files: LocalFiles, sequences: list[Sequence]) -> ShardRef:
    return write_shard(files, IDENTITY, unit_of(sequences), sequences, blocks_of(sequences), {"made": "up"})


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=60), st.sampled_from([1, 8, 64, 512, VALUES_PER_GROUP * 2]))
@example([2048, 2048, 1], 64)
def test_row_groups_partition_the_rows(rows: list[int], k: int) -> None:
    groups = row_groups(rows, SignalSpec(TopKSpec(k)))
    assert [i for group in groups for i in group] == list(range(len(rows)))
    held = [sum(rows[i] for i in group) * k for group in groups]
    for group, kept in zip(groups, held, strict=True):
        assert kept <= VALUES_PER_GROUP or len(group) == 1, "only a row too long by itself may exceed the limit"
    for group, kept, after in zip(groups, held, groups[1:], strict=False):
        assert kept + rows[after.start] * k > VALUES_PER_GROUP, f"{group} had room for the next row"


@pytest.mark.parametrize("gap_step", [None, 1 / 8])
def test_what_is_written_is_read(files: LocalFiles, sequences: list[Sequence], gap_step: float | None) -> None:
    identity = tiny_identity(gap_step=gap_step)
    blocks = blocks_of(sequences)
    ref = write_shard(files, identity, unit_of(sequences), sequences, blocks, {"torch": "2"})
    reader = ShardReader(files, ref, identity)
    codec = SignalCodec(identity.signal, identity.vocabulary)
    stored = list(reader)
    assert [s.sequence.digest for s in stored] == [s.digest for s in sequences]
    assert [s.sequence.context for s in stored] == [s.context for s in sequences]
    for s, sequence, block in zip(stored, sequences, blocks, strict=True):
        assert s.signal is not None
        assert len(s.signal) == sequence.rows
        topk = _topk(s.signal)
        expected = _topk(round_trip(codec, block))
        assert np.array_equal(s.sequence.input_ids, sequence.input_ids)
        assert np.array_equal(topk.ids, expected.ids)
        assert np.array_equal(topk.logits, expected.logits)
        assert np.array_equal(topk.tail_lse, expected.tail_lse)
    assert reader.digests() == [s.digest for s in sequences]
    assert reader.footer["provenance"] == {"torch": "2"}
    assert ref.size_bytes == (files.root / ref.path).stat().st_size


def test_row_groups_of_a_file_are_those_of_the_plan(files: LocalFiles) -> None:
    """Several groups: 30 sequences of up to 1,000 tokens at k = 32 hold twice 2^18 kept logits."""
    rng = np.random.default_rng(0)
    identity = tiny_identity(k=32, vocabulary=64)
    sequences = random_sequences(rng, 30, shortest=500, longest=1000)
    unit = unit_of(sequences)
    blocks = [Signal(random_topk(rng, s.rows, 32, 64)) for s in sequences]
    reader = ShardReader(files, write_shard(files, identity, unit, sequences, blocks, {}), identity)
    groups = row_groups(unit.rows, identity.signal)
    assert reader.groups == len(groups) > 1
    # Last group first: any group can be read by itself.
    for number in reversed(range(reader.groups)):
        read = reader.read_group(number)
        assert [s.sequence.digest for s in read] == [sequences[i].digest for i in groups[number]]
        assert all(
            s.signal is not None and np.array_equal(_topk(s.signal).ids, _topk(blocks[i]).ids)
            for s, i in zip(read, groups[number], strict=True)
        )


def test_equal_work_gives_equal_bytes(tmp_path: Path, sequences: list[Sequence]) -> None:
    paths = [
        write_shard(
            LocalFiles(tmp_path / name), IDENTITY, unit_of(sequences), sequences, blocks_of(sequences), {"b": 1, "a": 2}
        )
        for name in ("one", "two")
    ]
    assert paths[0] == paths[1]
    bytes_of = [(tmp_path / name / paths[0].path).read_bytes() for name in ("one", "two")]
    assert bytes_of[0] == bytes_of[1]
    assert sha256_hex(bytes_of[0]) == paths[0].sha256


def _damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One bit flipped, cut short, a stretch zeroed, or lengthened."""
    at = int(rng.integers(len(data)))
    kind = int(rng.integers(6))
    if kind <= 2:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        zeroed = data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]
        return zeroed if zeroed != data else data[:-1]
    return data + bytes(at % 7 + 1)


def test_every_damage_is_told_by_the_files_name(files: LocalFiles, ref: ShardRef) -> None:
    path = files.root / ref.path
    whole = path.read_bytes()
    rng = np.random.default_rng(11)
    for damaged in [b"", whole[:4], *(_damaged(whole, rng) for _ in range(300))]:
        path.write_bytes(damaged)
        with pytest.raises(StoreError) as caught:
            list(ShardReader(files, ref, IDENTITY))
        assert ref.path in str(caught.value)
    path.write_bytes(whole)
    assert len(list(ShardReader(files, ref, IDENTITY))) == 12


def test_damage_after_opening_is_found_by_page_checksums(files: LocalFiles, ref: ShardRef) -> None:
    """A page's bytes may rot between the hash at opening and the read of the last group, hours later."""
    path = files.root / ref.path
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(3)
    assert column.path_in_schema == "topk_ids.list.element"
    at = column.data_page_offset + column.total_compressed_size - 5
    reader = ShardReader(files, ref, IDENTITY)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([whole[at] ^ 16]))
    with pytest.raises(CorruptShard, match=r"row group 0: .*CRC checksum") as caught:
        reader.read_group(0)
    assert ref.path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_by_name(files: LocalFiles, ref: ShardRef) -> None:
    (files.root / ref.path).unlink()
    with pytest.raises(StoreError, match=rf"{ref.sha256}.*verify {re.escape(files.uri)} --repair"):
        ShardReader(files, ref, IDENTITY)


def test_a_folder_in_a_shards_place_is_told_by_name(files: LocalFiles, ref: ShardRef) -> None:
    (files.root / ref.path).unlink()
    (files.root / ref.path).mkdir()
    with pytest.raises(StoreError, match=ref.sha256):
        ShardReader(files, ref, IDENTITY)


def test_a_shard_of_another_identity_is_refused(files: LocalFiles, ref: ShardRef) -> None:
    other = tiny_identity(weights="ef" * 16)
    with pytest.raises(CorruptShard, match=rf"of identity {IDENTITY.id}, expected unit \w+ of identity {other.id}"):
        ShardReader(files, ref, other)


def test_a_shard_renamed_to_another_unit_is_refused(files: LocalFiles, ref: ShardRef) -> None:
    """Whole and undamaged, its digest right, but not what its name says."""
    other = unit_of(random_sequences(np.random.default_rng(5), 3)).id
    lie = shard_path(other, ref.sha256)
    shutil.copy(files.root / ref.path, files.root / lie)
    with pytest.raises(CorruptShard, match=f"is unit {ref.unit} .*expected unit {other}"):
        ShardReader(files, ShardRef(other, lie, ref.sha256, ref.size_bytes), IDENTITY)


def _forged(files: LocalFiles, table: pa.Table, ref: ShardRef) -> ShardRef:
    """A file of someone else's making under its right digest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    path = shard_path(ref.unit, sha256_hex(data))
    files.write(path, data)
    return ShardRef(ref.unit, path, sha256_hex(data), len(data))


def test_files_that_are_no_shards_are_refused(files: LocalFiles, ref: ShardRef) -> None:
    plain = pa.table({"a": [1, 2]})
    with pytest.raises(FormatMismatch, match="has no stillroom metadata"):
        ShardReader(files, _forged(files, plain, ref), IDENTITY)
    for text, message in (
        ("{", "unreadable"),
        ("[]", "unreadable"),
        ("{}", "unreadable"),
        ('{"format": 9}', "of format 9"),
    ):
        with pytest.raises(FormatMismatch, match=message):
            ShardReader(files, _forged(files, plain.replace_schema_metadata({"stillroom": text}), ref), IDENTITY)
    with pytest.raises(CorruptShard, match="is unit None"):
        ShardReader(files, _forged(files, plain.replace_schema_metadata({"stillroom": '{"format": 1}'}), ref), IDENTITY)
    text = json.dumps({"format": 2, "unit": ref.unit, "identity": IDENTITY.id})
    with pytest.raises(FormatMismatch, match=r"other columns than a shard of format 2 .*: a int64"):
        ShardReader(files, _forged(files, plain.replace_schema_metadata({"stillroom": text}), ref), IDENTITY)
    digest = sha256_hex(b"not Parquet at all")
    files.write(shard_path(ref.unit, digest), b"not Parquet at all")
    with pytest.raises(CorruptShard, match="no Parquet file"):
        ShardReader(files, ShardRef(ref.unit, shard_path(ref.unit, digest), digest, 18), IDENTITY)


def test_columns_of_the_wrong_lengths_are_refused(files: LocalFiles, ref: ShardRef) -> None:
    """A shard with kept ids missing has a true digest, but not T·K values for T positions."""
    table = pq.read_table(files.root / ref.path)
    field = table.schema.field("topk_ids")
    short = pa.array([row[:-1] for row in table["topk_ids"].to_pylist()], field.type)
    forged = table.set_column(table.column_names.index("topk_ids"), field, short)
    reader = ShardReader(files, _forged(files, forged, ref), IDENTITY)
    with pytest.raises(CorruptShard, match="column topk_ids has"):
        reader.read_group(0)


def test_a_block_that_does_not_fit_its_sequence_is_not_written(files: LocalFiles, sequences: list[Sequence]) -> None:
    blocks = blocks_of(sequences)
    blocks[3] = blocks[3][: len(blocks[3]) - 1]
    with pytest.raises(ValueError, match=f"sequence {sequences[3].digest} has .* expected {sequences[3].rows}"):
        write_shard(files, IDENTITY, unit_of(sequences), sequences, blocks, {})
    assert files.list("shards") == []


@pytest.mark.parametrize(
    "path",
    [
        "shards/../../etc/passwd",
        "other/" + "a" * 32 + "-" + "b" * 64 + ".parquet",
        "shards/" + "a" * 31 + "-" + "b" * 64 + ".parquet",
        "shards/" + "a" * 32 + "-" + "b" * 63 + ".parquet",
        "shards/" + "../../aaaaaaaaaaaaaaaaaaaaaaaaaa" + "-" + "b" * 64 + ".parquet",
        "shards/" + "A" * 32 + "-" + "b" * 64 + ".parquet",
        "",
    ],
)
def test_only_a_shards_path_parses(path: str) -> None:
    with pytest.raises(StoreError, match="in the log is not shards"):
        parse_shard_path(path)
    assert parse_shard_path(shard_path("a" * 32, "b" * 64)) == ("a" * 32, "b" * 64)
