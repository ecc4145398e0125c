"""query.py: what `inspect` says beside sizes and positions (those are in test_verify.py)."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.cli import main
from stillroom.storage.catalog.inspect import inspect_store
from stillroom.storage.catalog.stores import FIDELITY
from stillroom.storage.catalog.uses import record_taught
from stillroom.storage.errors import CorruptShard
from stillroom.storage.fidelity.truth import FOLDER as TRUTH
from stillroom.storage.records import HiddenSpec, SignalSpec, TopKSpec
from stillroom.storage.store import Store
from tests.storage.catalog.test_catalog import KEY, fidelity, taught
from tests.strategies import random_sequences, tiny_identity, tiny_store, write_unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    identity = tiny_identity(signal=SignalSpec(TopKSpec(4), hidden=HiddenSpec(8, "bfloat16")))
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(1), 12), identity=identity)


def test_every_byte_on_the_disk_is_accounted_for(store: Store) -> None:
    store.files.write(f"_stillroom/head-{'0' * 64}.safetensors", b"h" * 1000)
    store.files.write(f"{TRUTH}/{'0' * 32}-{'0' * 64}.parquet", b"t" * 5000)
    write_unit(store, random_sequences(np.random.default_rng(5), 3))
    found = inspect_store(store.uri)
    disk, whole = found["on_disk"], sum(p.stat().st_size for p in Path(store.uri).rglob("*") if p.is_file())
    assert sum(disk.values()) == whole
    assert disk["shards_bytes"] == found["bytes"]
    assert (disk["output_head_bytes"], disk["fidelity_sample_bytes"]) == (1000, 5000)
    assert min(disk["leftover_shards_bytes"], disk["log_bytes"], disk["plans_bytes"], disk["other_bytes"]) > 0
    assert found["bytes_per_token_without_sample_and_head"] == round((whole - 6000) / found["tokens"], 2)
    assert found["bytes_per_token_without_sample_and_head"] > found["bytes_per_token"]


def test_fidelity_is_shown_by_tier_and_temperature(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_store(store.uri)["fidelity"] is None
    store.files.write(FIDELITY, fidelity(("topk", 1.0, 1.5), ("topk", 8.0, 40.25)))
    found = inspect_store(store.uri)
    assert [(row["tier"], row["temperature"], row["gradient_angle_deg"]) for row in found["fidelity"]] == [
        ("topk", 1.0, 1.5),
        ("topk", 8.0, 40.25),
    ]
    assert (found["reference_student"], found["noise_positions"]) == ("stated", 4)
    assert found["noise_band"][0]["gradient_angle_deg"] == 0.01
    assert main(["inspect", store.uri]) == 0
    shown = capsys.readouterr().out
    for word in ("retained mass", "truncation loss nats", "kl added nats", "gradient angle deg", "gradient norm ratio",
                 "reference student", "40.2", "noise band", "0.01"):  # fmt: skip
        assert word in shown, word


def test_damaged_fidelity_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.files.write(FIDELITY, b"{")
    with pytest.raises(CorruptShard, match=r"fidelity\.json cannot be read"):
        inspect_store(store.uri)
    assert main(["inspect", store.uri]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_teaching_took_is_shown(store: Store) -> None:
    record_taught(store.files, KEY, taught(10**6))
    assert inspect_store(store.uri)["reuse"]["teacher_hours_spent"] == 1.5
