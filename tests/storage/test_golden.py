"""Stores that older code wrote are read bit for bit by today's. tests/golden/make.py tells how they were made."""

import json
import shutil
from pathlib import Path

import pytest

from stillroom.storage.manifest import Manifest
from stillroom.storage.store import open_store
from stillroom.storage.stream import Stream
from stillroom.storage.verify import verify_store
from tests.golden.make import HERE, STEPS, contents, golden_sequences

VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "expected.json").exists())


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy: reading must not need to write, but a failing test must not change the original."""
    return Path(shutil.copytree(HERE / request.param, tmp_path / request.param))


def test_the_first_version_is_there() -> None:
    assert "v1" in VERSIONS


@pytest.mark.parametrize("name", STEPS)
def test_a_store_is_read_bit_for_bit(golden: Path, name: str) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    assert contents(open_store(str(golden / name))) == expected[name]
    assert verify_store(str(golden / name))["problems"] == []
    assert len(expected[name]["sequences"]) == len(golden_sequences())


@pytest.mark.parametrize("name", STEPS)
def test_its_manifest_and_stream_are_read(golden: Path, name: str) -> None:
    manifest = Manifest.open(golden / "manifest.parquet")
    manifest.verify()
    assert manifest.digest == json.loads((golden / "expected.json").read_text())["manifest"]
    snapshot = open_store(str(golden / name)).snapshot()
    packs = list(Stream(manifest=manifest, snapshot=snapshot, window=16, epochs=1))
    assert sorted(d for p in packs for d in p.sequences) == sorted(
        s.digest for n, s in enumerate(golden_sequences()) if n != 3
    )
