"""Checkpoints: what comes back, what is refused, what is passed over with a notice."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.pipeline.student import checkpoint, rng
from stillroom.pipeline.student.checkpoint import checkpoints, load_latest, save
from stillroom.pipeline.student.progress import Progress
from stillroom.storage.errors import StudentError
from tests.tiny import tiny_model

BINDINGS = {"config": {"lr": 1.0, "losses": {"alpha": 0.7}}, "manifest": "m", "snapshot": "s"}


def parts(folder: Path, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_model(folder, vocabulary=64, seed=seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 8))
        loss = model(input_ids=ids, labels=ids).loss * (1 + random.random() + np.random.rand())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def write(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, *, keep_last: int = 5) -> Path:
    progress = Progress(step=step, packs=2 * step, before={"kl": 1.5})
    return save(folder, progress=progress, bindings=BINDINGS, model=model, optimizer=optimizer, keep_last=keep_last)


def test_training_goes_on_bit_equal_from_a_checkpoint(tmp_path: Path) -> None:
    rng.seed_all(7)
    model, optimizer = parts(tmp_path, 0)
    train(model, optimizer, 2)
    path = write(tmp_path / "c", model, optimizer, 2)
    expected = train(model, optimizer, 3)
    other, other_optimizer = parts(tmp_path, 1)
    rng.seed_all(99)
    progress, notices = load_latest(tmp_path / "c", bindings=BINDINGS, model=other, optimizer=other_optimizer)
    assert train(other, other_optimizer, 3) == expected
    assert progress == Progress(step=2, packs=4, before={"kl": 1.5})
    assert notices == []
    assert not [p for p in path.iterdir() if p.suffix in {".pt", ".bin", ".pkl"}]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    path = write(tmp_path / "c", model, optimizer, 1)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < (path / "model.safetensors").stat().st_size < 1.2 * size


def test_a_fresh_folder_starts_at_zero(tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    assert load_latest(tmp_path / "c", bindings=BINDINGS, model=model, optimizer=optimizer) == (Progress(), [])


def test_only_the_last_ones_are_kept_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    for step in (1, 2, 10):
        write(tmp_path, model, optimizer, step, keep_last=2)
    (tmp_path / ".step-00000011.tmp").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    progress, _ = load_latest(tmp_path, bindings=BINDINGS, model=model, optimizer=optimizer)
    assert progress.step == 10


@pytest.mark.parametrize("file", [*checkpoint.TENSOR_FILES, "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(file: str, damage: str, tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    train(model, optimizer, 1)
    write(tmp_path / "c", model, optimizer, 1)
    newest = write(tmp_path / "c", model, optimizer, 2)
    data = bytearray((newest / file).read_bytes())
    if damage == "remove":
        (newest / file).unlink()
    elif damage == "truncate":
        (newest / file).write_bytes(data[: len(data) // 2])
    else:
        data[-5 if file != "state.json" else 1] ^= 0xFF
        (newest / file).write_bytes(data)
    progress, notices = load_latest(tmp_path / "c", bindings=BINDINGS, model=model, optimizer=optimizer)
    assert progress.step == 1
    assert "step-00000002 is damaged" in notices[0]
    assert (tmp_path / "c" / "step-00000002.damaged").is_dir()


def test_with_no_sound_checkpoint_left_it_says_so(tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    (write(tmp_path / "c", model, optimizer, 1) / "state.json").unlink()
    with pytest.raises(StudentError, match="none of the 1 checkpoints"):
        load_latest(tmp_path / "c", bindings=BINDINGS, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"config": {"lr": 2.0, "losses": {"alpha": 0.7}}}, r"lr: 1\.0 there, 2\.0 asked"),
        ({"manifest": "n"}, "manifest: m there, n now"),
        ({"snapshot": None}, "snapshot: s there, None now"),
    ],
)
def test_another_run_is_refused_by_name(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, optimizer = parts(tmp_path, 0)
    write(tmp_path / "c", model, optimizer, 1)
    with pytest.raises(StudentError, match=says):
        load_latest(tmp_path / "c", bindings=BINDINGS | changed, model=model, optimizer=optimizer)


def test_all_generators_come_back() -> None:
    rng.seed_all(3)
    np.random.normal()  # leaves half a pair behind
    random.gauss(0, 1)
    tensors, rest = rng.capture()

    def draw() -> list[float]:
        return [torch.rand(1).item(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()]

    expected = draw()
    rng.seed_all(4)
    assert draw() != expected
    rng.restore(tensors, rest)
    assert draw() == expected
