"""The probe of a real run: the band that it measured lies in a store that has no other, and the run shows life before
its first unit."""

import json
from pathlib import Path

import pytest

from stillroom.pipeline.run_status import status_command
from stillroom.storage.catalog.inspect import inspect_store
from tests.e2e.runs import Setup, sentences

pytestmark = pytest.mark.real


def test_a_store_without_a_sample_has_the_probes_band(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, sentences(5, 12), ray={"actors": 1}, fidelity={"positions": 0})
    printed = setup.run("teach")
    assert {part["part"]: part["state"] for part in status_command(str(setup.folder / "run"))["parts"]} == {
        "corpus": "done", "teach": "done", "train cut": "not begun", "evaluate": "not begun"
    }  # fmt: skip
    assert "rows scored alone and in a batch differ by KL" in printed
    found = inspect_store(str(tmp_path / "store"))
    assert found["fidelity"] == []
    assert found["noise_positions"] >= 8
    assert [row["temperature"] for row in found["noise_band"]] == [1, 2, 4, 8]
    assert all(0 <= row["kl_nats"] < 1e-6 for row in found["noise_band"])
    progress = json.loads((tmp_path / "store" / "_stillroom" / "progress.json").read_text())
    assert progress["state"] == "done"
    assert progress["units"]["pending"] == 0
