"""catalog.py: what `ls` says of many stores, whole and damaged ones, in a folder and in a bucket."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.cli import main
from stillroom.storage.catalog.stores import (
    FIDELITY,
    kept_fidelity,
    list_stores,
    problem_rows,
    reuse_rows,
    summary,
    table_rows,
)
from stillroom.storage.catalog.uses import TAUGHT, USES, TaughtRun, Use, record_taught, record_use, seal
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, SignalSpec, TopKSpec, digest128
from stillroom.storage.store import Store, create_store
from tests.s3_server import BUCKET, S3Server
from tests.storage.catalog.widths import width
from tests.strategies import random_sequences, tiny_identity, tiny_store, unit_of, write_unit

KEY = "0" * 32


def use(student: str = "small", tokens: int = 1000, finished_at: str = "2026-11-24T08:00:00Z") -> Use:
    return Use(student, "demo", finished_at, "topk", 2.0, 10, tokens, tokens // 2, 5, 1.0)


def taught(tokens: int, *, seconds: float = 3600.0) -> TaughtRun:
    """By two actors, which were held for half as long again as they worked."""
    return TaughtRun("demo", "2026-11-24T07:00:00Z", 2, 10, tokens, seconds, 0.75 * seconds, 2, "cuda")


def fidelity(*rows: tuple[str, float, float]) -> bytes:
    """(tier, temperature, angle)"""
    stated = [
        {"tier": tier, "temperature": t, "positions": 8, "retained_mass": 0.9, "truncation_loss_nats": 0.1,
         "kl_added_nats": None, "kl_added_worst_nats": None, "gradient_angle_deg": angle, "gradient_norm_ratio": 0.9}
        for tier, t, angle in rows
    ]  # fmt: skip
    band = {"temperature": 1.0, "kl_nats": 0.0, "kl_worst_nats": 0.0, "gradient_angle_deg": 0.01}
    noise = {"positions": 4, "max_logit_difference": 1e-5, "rows": [band]}
    return seal({"sample": "ab", "reference_student": "stated", "rows": stated, "noise": noise})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "root" / "a" / "one", random_sequences(np.random.default_rng(1), 12), per_unit=5)


@pytest.fixture
def root(store: Store) -> str:
    return str(Path(store.uri).parent.parent)


def only(root: str) -> dict[str, Any]:
    (found,) = list_stores(root)
    return found


def test_a_summary_counts_what_is_committed_and_nothing_else(store: Store) -> None:
    planned_only = random_sequences(np.random.default_rng(7), 4)
    store.save_plan([unit_of(planned_only)])
    store.save_plan([u for u in store.planned() if u.id in store.committed()])  # said twice, there once
    write_unit(store, planned_only[:2])
    found, refs = summary(store), store.committed()
    sequences = [stored.sequence for stored in store.sequences()]
    assert found["sequences"] == len(sequences) == 12
    assert found["tokens"] == sum(len(s.input_ids) for s in sequences)
    assert found["rows"] == sum(s.rows for s in sequences) < found["tokens"]
    assert found["bytes"] == sum((Path(store.uri) / ref.path).stat().st_size for ref in refs.values())
    assert found["bytes_per_token"] == round(found["bytes"] / found["tokens"], 2)
    assert (found["shards"], found["units_planned_not_committed"]) == (3, 1)
    assert found["identity_in_words"] == "made up, float32: top-4 (1/8 nat)"


def test_an_empty_store_has_no_bytes_per_token(tmp_path: Path) -> None:
    store = create_store(str(tmp_path / "s"), tiny_identity())
    found = only(str(tmp_path))
    assert (found["tokens"], found["shards"], found["bytes_per_token"]) == (0, 0, None)
    assert found["reuse"]["passes"] is found["reuse"]["teacher_hours_live"] is None
    assert table_rows([found], store.uri)[0]["store"] == "."


def test_words_for_every_signal(tmp_path: Path) -> None:
    signal = SignalSpec(TopKSpec(4, None, NucleusSpec(0.9)), SampledSpec(9), HiddenSpec(8, "bfloat16"))
    tiny_store(tmp_path / "s", random_sequences(np.random.default_rng(1), 3), identity=tiny_identity(signal=signal))
    found = only(str(tmp_path))
    assert found["tiers"] == ["topk", "sampled", "hidden"]
    assert found["signal"] == "top-4 (float32, nucleus 0.9) + 9 draws + hidden bfloat16 (8)"
    lines = table_rows([found], str(tmp_path))[0]["signal"].split("\n")  # whole, over several lines
    assert len(lines) > 1
    assert " ".join(lines) == found["signal"]


def test_the_account_of_a_store_that_has_paid(store: Store, root: str) -> None:
    tokens = summary(store)["tokens"]
    record_taught(store.files, KEY, taught(tokens))
    record_use(store.files, "1" * 32, use("small", 3 * tokens))
    record_use(store.files, "2" * 32, use("tiny", 2 * tokens, "2026-11-25T08:00:00Z"))
    found = only(root)
    assert found["reuse"] == {
        "teaching_runs": 1,
        "uses": 2,
        "students": ["small", "tiny"],
        "last_use": "2026-11-25T08:00:00Z",
        "tokens_read": 5 * tokens,
        "passes": 5.0,
        "teacher_hours_spent": 1.5,
        "teacher_hours_live": pytest.approx(5.0),
        "teacher_hours_saved": pytest.approx(3.5),
        "break_even_passes": pytest.approx(1.5),
    }
    assert reuse_rows([found], root) == [
        {"store": "a/one", "students": "small, tiny", "uses": "2", "last use": "2026-11-25", "passes": "5",
         "break-even": "1.5", "spent h": "1.5", "live h": "5", "saved h": "3.5"}
    ]  # fmt: skip


def test_what_is_not_known_is_null(store: Store, root: str) -> None:
    """No ledger at all; and one that accounts for a part of the shards only."""
    found = only(root)
    assert found["reuse"]["uses"] == 0
    assert reuse_rows([found], root) == []
    assert [found["reuse"][k] for k in ("last_use", "teacher_hours_spent", "teacher_hours_live")] == [None] * 3
    record_use(store.files, KEY, use())
    assert only(root)["reuse"]["teacher_hours_live"] is None
    record_taught(store.files, KEY, taught(summary(store)["tokens"] - 1))
    found = only(root)["reuse"]
    assert found["teacher_hours_spent"] is found["teacher_hours_saved"] is found["break_even_passes"] is None
    assert found["teacher_hours_live"] > 0
    assert {row["saved h"] for row in reuse_rows([only(root)], root)} == {"–"}


def test_the_angle_is_that_of_the_part_that_teaches(store: Store, root: str) -> None:
    assert only(root)["gradient_angle_deg"] is None
    store.files.write(FIDELITY, fidelity(("topk", 1.0, 1.5), ("topk", 8.0, 40.0)))
    assert only(root)["gradient_angle_deg"] == 1.5
    store.files.write(FIDELITY, fidelity(("hidden", 1.0, 0.5), ("hidden", 2.0, 0.6), ("topk", 1.0, 1.5)))
    found = only(root)
    assert found["gradient_angle_deg"] == 0.5
    assert found["fidelity"]["noise"]["positions"] == 4
    assert table_rows([found], root)[0]["angle"] == "0.5°"


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"rows": [], "noise": null}', fidelity(("topk", 1.0, float("nan"))),
     fidelity(("topk", 1.0, 1.0)).replace(b"tier", b"tear"), fidelity(("topk", 1.0, 4.0)).replace(b"4.0", b"5.0")],
)  # fmt: skip
def test_damaged_fidelity_is_named_and_hides_nothing_else(store: Store, root: str, text: bytes) -> None:
    store.files.write(FIDELITY, text)
    with pytest.raises(
        CorruptShard, match=r"fidelity\.json cannot be read .*remove it, and `stillroom teach`"
    ) as caught:
        kept_fidelity(store.files)
    assert "\n" not in str(caught.value)
    found = only(root)
    assert found["tokens"] > 0
    assert found["fidelity"] is None
    assert found["problems"] == [str(caught.value)]
    assert problem_rows([found], root) == [{"store": "a/one", "problem": str(caught.value)}]


@pytest.mark.parametrize("folder", [USES, TAUGHT])
@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_ledger_is_named_and_hides_nothing_else(store: Store, root: str, folder: str, text: bytes) -> None:
    store.files.write(f"{folder}/{KEY}.json", text)
    found = only(root)
    assert found["reuse"] is None
    assert found["tokens"] > 0
    assert f"{folder}/{KEY}.json cannot be read" in found["problems"][0]


def damages() -> dict[str, Callable[[Path], None]]:
    def rot(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)

    def rewrite(path: Path) -> None:
        path.write_text("{rot")

    def plan(root: Path) -> Path:
        return next((root / "_stillroom" / "plans").iterdir())

    def rename_plan(root: Path) -> None:
        plan(root).rename(plan(root).with_name(f"00001-{'0' * 32}.parquet"))

    return {
        "identity": lambda root: rewrite(root / "_stillroom" / "identity.json"),
        "log": lambda root: shutil.rmtree(root / "_delta_log"),
        "entry": lambda root: rewrite(root / "_delta_log" / f"{1:020d}.json"),
        "plan": lambda root: rot(plan(root)),
        "renamed plan": rename_plan,
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_store_is_listed_with_its_error(store: Store, root: str, damage: str) -> None:
    whole = tiny_store(Path(root) / "z", random_sequences(np.random.default_rng(2), 3))
    damages()[damage](Path(store.uri))
    bad, good = list_stores(root)
    assert bad.keys() == {"store", "error"}
    assert "\n" not in bad["error"]
    assert good["store"] == whole.uri
    assert [row["store"] for row in table_rows([bad, good], root)] == ["z"]
    assert problem_rows([bad, good], root) == [{"store": "a/one", "problem": bad["error"]}]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no folder"):
        list_stores(str(tmp_path / "nowhere"))
    assert list_stores(str(tmp_path)) == []
    assert table_rows([], str(tmp_path)) == []


def test_the_table_fits_120_columns(store: Store, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    signal = SignalSpec(TopKSpec(4), SampledSpec(9), HiddenSpec(8, "bfloat16"))
    identity = tiny_identity(signal=signal)
    for name in ("x" * 70, "y" * 70):
        tiny_store(Path(root) / name, random_sequences(np.random.default_rng(1), 3), identity=identity)
    store.files.write(FIDELITY, fidelity(("topk", 1.0, 1.5)))
    record_taught(store.files, KEY, taught(10**15))
    record_use(store.files, KEY, use("z" * 90, tokens=10**20))
    assert main(["ls", root]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "100,000" in "".join(lines)  # hours
    # No terminal: paths are whole, and nothing else takes more than its room.
    assert [line.split()[0] for line in lines if "made" in line] == ["a/one", "x" * 70, "y" * 70]
    assert max(map(len, lines)) <= 120 + 70 - 40
    assert main(["ls", root, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["stores"]
    assert listed[0]["reuse"]["students"] == ["z" * 90]
    assert listed[1]["store"].endswith("x" * 70)
    # A terminal: over several lines, from which they can be put together.
    rows = table_rows(listed, root, fold=True)
    assert [row["store"].replace("\n", "") for row in rows] == ["a/one", "x" * 70, "y" * 70]
    assert max(width(table) for table in (rows, reuse_rows(listed, root, fold=True))) <= 120


def test_a_path_is_broken_behind_a_slash(store: Store, root: str) -> None:
    below = f"{'deep' * 8}/{'deeper' * 7}/store"
    (found,) = table_rows([only(root) | {"store": f"{root}/{below}"}], root, fold=True)
    assert found["store"] == f"{'deep' * 8}/\n{'deeper' * 7}/\nstore"


@pytest.mark.real
def test_stores_of_a_bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, the ledgers included, as of a folder."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    sequences = random_sequences(np.random.default_rng(1), 12)
    prefix = f"s3://{BUCKET}/{digest128(str(tmp_path).encode())}"
    local = tiny_store(tmp_path / "one", sequences)
    remote = create_store(f"{prefix}/deep/one", local.identity)
    remote.save_plan(local.planned())
    remote.commit([write_unit(remote, sequences[at : at + 5]) for at in range(0, len(sequences), 5)])
    for each in (local, remote):
        record_taught(each.files, KEY, taught(1))
        record_taught(each.files, KEY, taught(10**6))
        assert record_use(each.files, KEY, use())
        assert not record_use(each.files, KEY, use("another"))
        each.files.write(FIDELITY, fidelity(("topk", 1.0, 1.5)))
    here, there = only(str(tmp_path)), only(prefix)
    assert there.pop("store") == f"{prefix}/deep/one"
    here.pop("store")
    assert there == here
    assert table_rows([there | {"store": remote.uri}], prefix)[0]["store"] == "deep/one"
