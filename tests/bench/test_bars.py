"""The sizes and the fidelity that the README states, on the real teacher. Speeds are for `make bench`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_every_tier_keeps_its_size_and_its_fidelity(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.store", "--bars", "--output", str(output)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bytes/token" in done.stdout
    found = json.loads(output.read_text())
    assert found["tokens"] == 40_960
    assert 0 < found["token_table_bytes"] <= 215_000  # apart from bytes/token, as it does not grow with the store
    assert found["bytes_per_token_topk64"] <= 150
    assert found["kl_added_topk64"] <= 1e-3
    assert found["bytes_per_token_packed64"] <= 125
    assert found["bytes_per_token_sampled50_signal"] <= 36
    assert found["bytes_per_token_sampled50"] <= 40
    assert found["bytes_per_token_hidden_part"] <= 1.05 * found["hidden_width"]
    assert found["bytes_per_token_hidden"] <= 1.05 * found["hidden_width"] + found["bytes_per_token_topk64"]
    assert sorted(found["gradient_angle_deg_hidden"]) == ["1", "2", "4", "8"]
    assert max(found["gradient_angle_deg_hidden"].values()) <= 1.5
    assert found["decode_tokens_per_s_core"] > 0
    assert found["encode_tokens_per_s_core"] > 0
    assert found["naive_bytes_per_token"] == 768
