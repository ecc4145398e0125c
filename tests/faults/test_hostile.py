"""Stores made to do harm: each gives a StillroomError, and neither code nor memory nor time.

Every store is read by a process of its own under a limit of address space, so that a bomb that goes off fails its own
test and nothing else.
"""

import ast
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage import shard
from stillroom.storage.calibration import Calibration, calibration_path, save_calibration
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.pages import MOST_BYTES, check_shard
from stillroom.storage.records import HiddenSpec, Receipt, SampledSpec, ShardRef, SignalSpec, TopKSpec
from stillroom.storage.schema import parquet_settings, value_bytes
from stillroom.storage.shard import shard_path, signal_codec
from stillroom.storage.store import IDENTITY, Store, open_store
from tests.storage.damage import replace as replace_ref
from tests.storage.damage import shards
from tests.strategies import next_token_teacher, random_sequences, tiny_identity, tiny_store

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("storage", "workers", "pipeline") for path in sorted((ROOT / room).rglob("*.py"))]

#: Address space of the reading process: what importing takes (1.3 GB of it mapped, 110 MB of it used), and 2 GB.
LIMIT_BYTES = 3 << 30

READ = """
import sys
from stillroom.storage.errors import StillroomError
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import open_store
from stillroom.storage.fidelity.truth import read_truth
from stillroom.storage.care.verify import verify_store

def read(uri):
    store = open_store(uri)
    store.snapshot()
    read_truth(store.files, store.planned(), store.identity)
    return sum(len(s.signal) for s in store.sequences())

told = []
for look in (read, verify_store):
    try:
        told.append("no error: " + str(look(sys.argv[1])))
    except StillroomError as error:
        told.append(f"{type(error).__name__}: {error}")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(*(line.replace(chr(10), "|") for line in told), peak, sep=chr(10))
"""


def read_in_a_box(uri: str) -> tuple[str, str, float]:
    """What reading all of it says, what `verify` says, and the peak of resident memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", READ, uri], check=False, capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES)),
    )  # fmt: skip
    assert done.returncode == 0, f"it was not stopped: {done.stderr[-2000:]}"
    read, verified, peak = done.stdout.splitlines()
    return read, verified, int(peak) / 1024


def require_refused(uri: str, match: str) -> None:
    read, verified, peak_mb = read_in_a_box(uri)
    assert not read.startswith("no error"), read
    assert match in read, read
    assert not verified.startswith("no error") or "'problems': []" not in verified, verified
    assert peak_mb < 900, f"{peak_mb:.0f} MB"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two units of top-4, draws and int8 hidden states."""
    files = open_files(str(tmp_path / "store"))
    sha256 = save_calibration(files, Calibration(np.full(8, 0.5, np.float32), np.zeros(8, np.float32)))
    signal = SignalSpec(TopKSpec(4), SampledSpec(9), HiddenSpec(8, "int8", sha256))
    sequences = random_sequences(np.random.default_rng(3), 6, shortest=10, longest=24)
    return tiny_store(
        tmp_path / "store", sequences, identity=tiny_identity(signal=signal), per_unit=3, teacher=next_token_teacher
    )


def forge(store: Store, data: bytes, *, rows: int = 3) -> ShardRef:
    """Commit these bytes under their right digest in the place of the first shard."""
    old = shards(store)[0]
    sha256 = sha256_hex(data)
    fresh = ShardRef(old.unit, shard_path(old.unit, sha256), sha256, len(data))
    store.files.write(fresh.path, data)
    replace_ref(store, old, fresh, rows)
    return fresh


def rewritten(store: Store, change: Callable[[pa.Table], pa.Table], **settings: Any) -> bytes:
    """The first shard's bytes with other content."""
    path = Path(store.uri, shards(store)[0].path)
    metadata = pq.read_metadata(path).metadata[b"stillroom"]
    table = change(pq.ParquetFile(path).read())
    sink = pa.BufferOutputStream()
    known = parquet_settings(signal_codec(store.files, store.identity)) | settings
    known["column_encoding"] = dict(known["column_encoding"] or {}) or None
    with pq.ParquetWriter(sink, table.schema, **known) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"stillroom": metadata})
    return bytes(sink.getvalue().to_pybytes())


def with_column(name: str, change: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(name), change(table.column(name).combine_chunks()))

    return apply


@pytest.mark.real
class TestBombs:
    def test_a_long_column_that_compresses_to_nothing(self, store: Store) -> None:
        """A list of 160 million zeros, 640 MB, in a file of 20 kB."""
        huge = MOST_BYTES // 4 + 2**24

        def change(column: pa.Array) -> pa.Array:
            offsets = np.array([0, huge, huge, huge], np.int32)
            return pa.ListArray.from_arrays(offsets, pa.array(np.zeros(huge, np.int32)), type=column.type)

        data = rewritten(store, with_column("topk_ids", change))
        assert len(data) < 200_000
        forge(store, data)
        require_refused(store.uri, "claims to hold")

    def test_a_dictionary_of_one_value_for_many(self, store: Store) -> None:
        """The footer says how few bytes it takes; it would be 400 MB."""
        huge = 10**8

        def change(column: pa.Array) -> pa.Array:
            offsets = np.array([0, huge, huge, huge], np.int32)
            return pa.ListArray.from_arrays(offsets, pa.array(np.zeros(huge, np.int32)), type=column.type)

        data = rewritten(
            store, with_column("topk_ids", change), use_dictionary=["topk_ids.list.element"], column_encoding=None
        )
        forge(store, data)
        require_refused(store.uri, "topk_ids")

    @pytest.mark.parametrize("field", ["uncompressed", "values"])
    def test_a_page_head_that_claims_two_billion(self, store: Store, field: str) -> None:
        forge(store, _with_page_head(store, field))
        require_refused(store.uri, "by its pages" if field == "uncompressed" else "column")

    def test_an_identity_file_of_half_a_gigabyte(self, store: Store) -> None:
        with Path(store.uri, IDENTITY).open("r+b") as file:
            file.truncate(1 << 29)
        require_refused(store.uri, "identity.json")

    def test_an_identity_nested_ten_thousand_deep(self, store: Store) -> None:
        Path(store.uri, IDENTITY).write_text("[" * 100_000 + "]" * 100_000)
        require_refused(store.uri, "identity.json")

    def test_a_footer_nested_ten_thousand_deep(self, store: Store) -> None:
        path = Path(store.uri, shards(store)[0].path)
        table = pq.ParquetFile(path).read()
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, store_schema=False, use_dictionary=False) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"stillroom": "[" * 100_000})
        forge(store, sink.getvalue().to_pybytes())
        require_refused(store.uri, "unreadable stillroom metadata")

    def test_a_plan_of_many_rows_in_few_bytes(self, store: Store) -> None:
        """Forty million rows of one digest, as runs: 1.3 GB each of two columns."""
        count = 40_000_000
        one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["ab" * 16]))
        numbers = pa.array(np.ones(count, np.int32))
        table = pa.table({"unit": one, "sequence": one, "tokens": numbers, "context": numbers})
        path = Path(store.uri, "_stillroom/plans", f"00009-{'ab' * 16}.parquet")
        pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=count)
        assert path.stat().st_size < 1_000_000
        require_refused(store.uri, "00009")


def _with_page_head(store: Store, field: str) -> bytes:
    """The first shard with another number in the head of a page; the head is as long as before."""
    path = Path(store.uri, shards(store)[0].path)
    data = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path).row_group(0)
    column = next(c for c in map(metadata.column, range(metadata.num_columns)) if "topk_ids" in c.path_in_schema)
    at = column.data_page_offset
    # 15 00 | 15 <uncompressed> 15 <compressed> 15 <crc> | 1c 15 <values> …: numbers of two bytes stay two bytes.
    if field == "uncompressed":
        assert data[at + 2] == 0x15
        place = at + 3
    else:
        place = data.index(b"\x1c\x15", at) + 2
    assert data[place] & 128, "a number of at least two bytes"
    data[place] |= 0x7E
    data[place + 1] |= 0x7F if not data[place + 1] & 128 else 0xFF
    return bytes(data)


@pytest.mark.real
class TestLies:
    """Schemas and identities that claim other lengths than there are."""

    def test_nulls_where_none_may_be(self, store: Store) -> None:
        def change(table: pa.Table) -> pa.Table:
            field = pa.field("context", pa.int32(), nullable=True)
            column = pa.array([None] * table.num_rows, pa.int32())
            return table.set_column(table.schema.get_field_index("context"), field, column)

        forge(store, rewritten(store, change))
        require_refused(store.uri, "has other columns")

    def test_another_type_inside_a_list(self, store: Store) -> None:
        def change(table: pa.Table) -> pa.Table:
            at = table.schema.get_field_index("topk_gap")
            kind = pa.list_(pa.field("element", pa.float64(), nullable=False))
            return table.set_column(at, pa.field("topk_gap", kind, nullable=False), table.column("topk_gap").cast(kind))

        forge(store, rewritten(store, change))
        require_refused(store.uri, "has other columns")

    @pytest.mark.parametrize("context", [-1, 2**31 - 1, -(2**31)])
    def test_a_context_beyond_the_sequence(self, store: Store, context: int) -> None:
        forge(store, rewritten(store, with_column("context", lambda c: pa.array([context] * len(c), pa.int32()))))
        require_refused(store.uri, "row group 0")

    @pytest.mark.parametrize(
        ("part", "value"),
        [("k", 2**31), ("k", 2**62), ("draws", 2**40), ("width", 2**40), ("vocabulary", 2**62), ("k", -5),
         ("vocabulary", -1), ("width", 0), ("k", 1e300), ("k", "many"), ("vocabulary", None)],
    )  # fmt: skip
    def test_numbers_in_the_identity_that_cannot_be(self, store: Store, part: str, value: Any) -> None:
        """Stated with the id that its parts have, as a maker of such a store would."""
        fields = json.loads(Path(store.uri, IDENTITY).read_text())
        holder = {"k": fields["signal"]["topk"], "draws": fields["signal"]["sampled"],
                  "width": fields["signal"]["hidden"]}.get(part, fields)  # fmt: skip
        holder[part] = value
        signal = SignalSpec.from_dict(fields["signal"])
        stated = {**fields, "signal": signal}
        stated.pop("id")
        stated.pop("teacher_digest")
        text = Identity(**stated).to_json()
        Path(store.uri, IDENTITY).write_text(text)
        require_refused(store.uri, "")

    def test_a_calibration_of_more_channels_than_any_model(self, store: Store) -> None:
        count = 2**20 + 1
        table = pa.table({"channel_scale": np.ones(count, np.float32), "channel_offset": np.zeros(count, np.float32)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        store.files.write(calibration_path(sha256_hex(data)), data)
        hidden = replace(store.identity.signal.hidden, calibration=sha256_hex(data))  # type: ignore[type-var]
        signal = replace(store.identity.signal, hidden=hidden)
        text = replace(store.identity, signal=signal).to_json()
        Path(store.uri, IDENTITY).write_text(text)
        require_refused(store.uri, "calibration")


def test_every_page_of_a_shard_is_looked_at(store: Store) -> None:
    """The walk over pages ends where the footer says, for every shard that our own writer makes."""
    for ref in shards(store):
        data = store.files.read(ref.path)
        schema = pq.read_schema(pa.BufferReader(data))
        check_shard(memoryview(data), value_bytes(schema))
        with pytest.raises(ValueError, match="Parquet"):
            check_shard(memoryview(data[: len(data) // 2]), value_bytes(schema))


def test_a_damaged_footer_is_an_error_whatever_is_damaged(store: Store) -> None:
    """What is let through is what pyarrow reads without ending the process."""
    data = bytearray(store.files.read(shards(store)[0].path))
    schema = pq.read_schema(pa.BufferReader(bytes(data)))
    rng = np.random.default_rng(5)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for _ in range(2000):
        at, bit = int(rng.integers(start, len(data))), 1 << int(rng.integers(8))
        data[at] ^= bit
        try:
            check_shard(memoryview(bytes(data)), value_bytes(schema))
        except ValueError:
            refused += 1
        data[at] ^= bit
    assert refused > 500, "the other bits are words of the metadata"


class Trap:
    """What a pickle of it would do when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(ROOT / "build" / "trapped"),)


def test_a_pickle_is_never_loaded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of every file of the store, and beside them."""
    trap = pickle.dumps(Trap())
    for path in sorted(p for p in Path(store.uri).rglob("*") if p.is_file()):
        before = path.read_bytes()
        path.write_bytes(trap)
        monkeypatch.setattr(shard, "_calibrations", {})  # as in a process that has read none
        with pytest.raises(StoreError):  # noqa: PT012 - whichever of the two reads this file
            list(open_store(store.uri).sequences())
            open_store(store.uri).snapshot()
        path.write_bytes(before)
    for name in ("shards/a.pkl", "_stillroom/model.pt", "_stillroom/plans/00001.pickle"):
        Path(store.uri, name).write_bytes(trap)
    assert len(list(open_store(store.uri).sequences())) == 6
    assert not (ROOT / "build" / "trapped").exists()


def test_no_code_that_loads_pickles() -> None:
    """By the syntax tree: no pickle and its kin, no numpy that allows them, no torch.load but of weights alone."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}" for path in SOURCES for node in _loaders(ast.parse(path.read_text()))
    ]
    assert found == []
    assert list(_loaders(ast.parse("import pickle\ntorch.load(f)\nnp.load(f, allow_pickle=True)")))[2:], "test is void"


def _loaders(tree: ast.AST) -> list[Any]:
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    found: list[Any] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and {alias.name.split(".")[0] for alias in node.names} & banned:
            found.append(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in banned:
            found.append(node)
        if not isinstance(node, ast.Call):
            continue
        words = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if words.get("allow_pickle") or (called == "torch.load" and words.get("weights_only") is not True):
            found.append(node)
        if called in ("eval", "exec", "read_pickle", "pd.read_pickle"):
            found.append(node)
    return found


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "shards/../../outside", "a\0b", "..\\outside", ""])
def test_no_name_leads_out(store: Store, name: str) -> None:
    """Log, snapshot and plans name files by patterns; whatever passes those meets this."""
    for look in (store.files.read, store.files.open, store.files.exists, store.files.delete):
        with pytest.raises(StoreError, match="leads out of the store"):
            look(name)


def test_a_shard_that_is_a_link_is_read_by_its_digest_or_not_at_all(store: Store, tmp_path: Path) -> None:
    """Whoever moved shards to another disk may link them; what lies there must still be what was committed."""
    path = Path(store.uri, shards(store)[0].path)
    moved = tmp_path / "elsewhere.parquet"
    path.rename(moved)
    path.symlink_to(moved)
    assert len(list(open_store(store.uri).sequences())) == 6
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(CorruptShard, match=path.name):
        list(open_store(store.uri).sequences())


def test_a_log_that_names_a_unit_of_no_plan_is_refused(store: Store) -> None:
    ref = replace(shards(store)[0], unit="ab" * 16, path=shard_path("ab" * 16, shards(store)[0].sha256))
    store.commit([Receipt(ref, 1, 1, 1, batches=1, seconds=0.0)])
    with pytest.raises(StoreError, match="no plan"):
        store.snapshot()
