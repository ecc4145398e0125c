"""The manifest file: what is written comes back, damage is named, the digest is of rows and not of bytes."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.identity import canonical_json
from stillroom.storage.manifest import (
    META_DIGEST_KEY,
    META_KEY,
    SCHEMA,
    Manifest,
    ManifestMeta,
    ManifestRow,
    mask_from_runs,
    runs_from_mask,
)
from stillroom.storage.manifest_writer import ManifestWriter, count_duplicates
from stillroom.storage.records import Sequence, digest128

META = ManifestMeta(
    window=64, overlap=8, tokenizer="t" * 32, chat_template=None, vocabulary=200_000,
    counts={"documents": 3}, config={"window": 64}, inputs="i" * 32,
)  # fmt: skip


def row(number: int, *, length: int = 5, heldout: bool = False, weight: float = 1.0, context: int = 0) -> ManifestRow:
    rng = np.random.default_rng(number)
    mask = rng.random(length) < 0.5
    mask[:context] = False
    return ManifestRow(
        sequence=Sequence(rng.integers(0, 200_000, length).astype(np.int32), context),
        mask=mask, weight=weight, document=number // 2, source=f"part-{number % 3}.jsonl", line=number + 1,
        heldout=heldout, window=number % 2,
    )  # fmt: skip


def write(path: Path, rows: list[ManifestRow]) -> Manifest:
    with ManifestWriter(path) as writer:
        for one in rows:
            writer.append(one)
        writer.commit(META)
    return Manifest.open(path)


def read_or_refusal(path: Path) -> str:
    try:
        manifest = Manifest.open(path)
        manifest.verify()
    except StoreError as error:
        return "refused" if str(path) in str(error) else f"an error without the file's name: {error}"
    return manifest.digest


def same(a: ManifestRow, b: ManifestRow) -> bool:
    return (
        a.sequence.digest == b.sequence.digest
        and np.array_equal(a.mask, b.mask)
        and (a.weight, a.document, a.source, a.line, a.heldout, a.window)
        == (b.weight, b.document, b.source, b.line, b.heldout, b.window)
    )


@given(st.lists(st.booleans(), max_size=200))
def test_runs_round_trip(bits: list[bool]) -> None:
    mask = np.array(bits, dtype=np.bool_)
    runs = runs_from_mask(mask)
    assert np.array_equal(mask_from_runs(runs, len(mask)), mask)
    assert (runs[1:] > 0).all(), "only the first run may be empty"


def test_runs_begin_with_what_is_not_learned() -> None:
    assert runs_from_mask(np.array([True, True, False])).tolist() == [0, 2, 1]
    assert runs_from_mask(np.array([False, True])).tolist() == [1, 1]


@pytest.mark.parametrize(("runs", "length"), [([1, 2], 4), ([-1, 3], 2), ([], 1)])
def test_runs_that_do_not_add_up_are_corrupt(runs: list[int], length: int) -> None:
    with pytest.raises(CorruptShard):
        mask_from_runs(np.array(runs, dtype=np.int32), length)


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    rows = [row(i, length=1 + i % 40, heldout=i % 7 == 0, weight=0.5 + i, context=i % 40 // 2) for i in range(300)]
    manifest = write(tmp_path / "m.parquet", rows)
    assert len(manifest) == 300
    assert all(same(a, b) for a, b in zip(manifest, rows, strict=True))
    wanted = [299, 0, 17, 17, 150]
    assert all(same(a, rows[n]) for a, n in zip(manifest.rows(wanted), wanted, strict=True))
    assert manifest.rows([]) == []


def test_many_row_groups_and_a_small_cache(tmp_path: Path) -> None:
    rows = [row(i, length=30_000) for i in range(9)]
    write(tmp_path / "m.parquet", rows)
    manifest = Manifest.open(tmp_path / "m.parquet", cached_groups=1)
    assert [len(group) for group in manifest.groups()] == [3, 3, 3]
    assert all(same(a, rows[n]) for a, n in zip(manifest.rows([8, 0, 4, 1]), [8, 0, 4, 1], strict=True))


def test_index_and_masks_agree_with_the_rows(tmp_path: Path) -> None:
    rows = [row(i, length=1 + i % 9, heldout=i % 5 == 0, weight=1 + i / 8, context=i % 2) for i in range(100)]
    manifest = write(tmp_path / "m.parquet", rows)
    index, masks = manifest.index(), manifest.masks()
    assert index.sequences.dtype == np.dtype("S32")
    assert [s.decode() for s in index.sequences] == [r.sequence.digest for r in rows]
    assert index.tokens.tolist() == [len(r.mask) for r in rows]
    assert index.contexts.tolist() == [r.sequence.context for r in rows]
    assert index.trained.tolist() == [r.trained for r in rows]
    assert index.heldout.tolist() == [r.heldout for r in rows]
    assert index.weights.tolist() == [r.weight for r in rows]
    assert index.documents.tolist() == [r.document for r in rows]
    assert [a.dtype.name for a in (index.tokens, index.weights, index.heldout)] == ["int32", "float32", "bool"]
    assert all(np.array_equal(masks.mask(i, len(r.mask)), r.mask) for i, r in enumerate(rows))


def test_an_empty_manifest_has_an_empty_index(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.parquet", [])
    assert len(manifest.index()) == 0
    assert manifest.index().tokens.dtype == np.int32
    assert list(manifest) == []
    assert manifest.masks().runs_at.tolist() == [0]


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = write(tmp_path / "m.parquet", [row(0)]).meta
    assert (meta.window, meta.overlap, meta.vocabulary, meta.counts) == (64, 8, 200_000, {"documents": 3})
    assert meta.rows == 1


def test_trained_counts_tokens_with_a_kept_predecessor() -> None:
    ids = np.arange(4, dtype=np.int32)
    whole = ManifestRow(Sequence(ids), np.ones(4, np.bool_), 1.0, 0, "", 1, False)
    later = ManifestRow(Sequence(ids, 2), np.array([False, False, True, True]), 1.0, 0, "", 1, False)
    assert (whole.trained, later.trained) == (3, 2)


def test_digest_is_of_rows_not_of_bytes(tmp_path: Path) -> None:
    rows = [row(i) for i in range(4)]
    base = write(tmp_path / "a.parquet", rows)
    other_line = [ManifestRow(**{**vars(r), "line": r.line + 100, "source": "elsewhere"}) for r in rows]
    assert write(tmp_path / "b.parquet", other_line).digest == base.digest
    for change in ({"weight": 2.0}, {"heldout": True}, {"mask": ~rows[1].mask}):
        changed = [rows[0], ManifestRow(**{**vars(rows[1]), **change}), *rows[2:]]
        assert write(tmp_path / "c.parquet", changed).digest != base.digest
    assert write(tmp_path / "c.parquet", rows[::-1]).digest != base.digest
    base.verify()


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [row(i) for i in range(20)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path / "m.parquet") as writer:
        writer.append(row(0))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_leaves_the_old_one(tmp_path: Path) -> None:
    old = write(tmp_path / "m.parquet", [row(0)]).digest
    with pytest.raises(AssertionError):
        write(tmp_path / "m.parquet", [row(1), replace(row(2), mask=np.zeros(0, np.bool_))])
    assert Manifest.open(tmp_path / "m.parquet").digest == old
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]


def test_duplicates_are_counted_exactly(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path / "m.parquet") as writer:
        for number in [0, 1, 2, 1, 1, 0]:
            writer.append(row(number))
        assert writer.count_duplicates() == 3
        writer.append(row(2))
        assert writer.count_duplicates() == 4
        writer.commit(META)


def test_duplicates_are_counted_in_slices() -> None:
    numbers = np.random.default_rng(0).integers(0, 150, 400)
    digests = b"".join(Sequence(np.array([n], np.int32)).digest.encode()[:16] for n in numbers)
    assert count_duplicates(io.BytesIO(digests), 400, at_once=16) == 400 - len(np.unique(numbers))


def test_missing_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no corpus manifest at .*gone\.parquet"):
        Manifest.open(tmp_path / "gone.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(FormatMismatch, match=r"foreign\.parquet is no corpus manifest"):
        Manifest.open(tmp_path / "foreign.parquet")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(CorruptShard, match=r"text\.parquet is damaged"):
        Manifest.open(tmp_path / "text.parquet")


def test_another_version_is_refused(tmp_path: Path) -> None:
    meta = canonical_json({"version": 99})
    keys = {META_KEY: meta, META_DIGEST_KEY: digest128(meta)}
    pq.write_table(pa.Table.from_pylist([], SCHEMA.with_metadata(keys)), tmp_path / "m.parquet")
    with pytest.raises(FormatMismatch, match="version 99"):
        Manifest.open(tmp_path / "m.parquet")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_never_reads_back_as_other_rows(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    rows = [row(i, length=1 + i % 9, heldout=i % 4 == 0) for i in range(24)]
    digest = write(folder / "m.parquet", rows).digest
    content = bytearray((folder / "m.parquet").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "m.parquet").write_bytes(content)
    assert read_or_refusal(folder / "m.parquet") in (digest, "refused")


def test_threads_read_the_same_rows(tmp_path: Path) -> None:
    rows = [row(i, length=20_000) for i in range(16)]
    write(tmp_path / "m.parquet", rows)
    manifest = Manifest.open(tmp_path / "m.parquet", cached_groups=1)
    wrong: list[int] = []

    def check(start: int) -> None:
        for n in [*range(start, 16), *range(start)]:
            if not same(manifest.rows([n])[0], rows[n]):
                wrong.append(n)

    threads = [threading.Thread(target=check, args=(start,)) for start in range(0, 16, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_plain_pyarrow_reads_it(tmp_path: Path) -> None:
    rows = [row(i) for i in range(3)]
    write(tmp_path / "m.parquet", rows)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["input_ids"].to_pylist() == [r.sequence.input_ids.tolist() for r in rows]
    assert table["split"].to_pylist() == ["train"] * 3
